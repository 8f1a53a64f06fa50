"""What the unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_builder import BuiltImage, build_image


@pytest.fixture
def built_image() -> BuiltImage:
    """An image in memory, to be changed before it is written."""
    return build_image()


@pytest.fixture
def image(built_image: BuiltImage, tmp_path: Path) -> Path:
    """A directory with an image, in a folder of its own."""
    return built_image.write(tmp_path / "folder" / "image")
