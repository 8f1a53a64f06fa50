"""Pages for a browser, each one file that loads nothing: rendered, and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynacut.shared.errors import DynacutError
from dynacut.shared.whole_file import write_whole

if TYPE_CHECKING:
    from jinja2 import Environment

FILES = Path(__file__).parent
"""Where the templates and styles lie that several pages use."""


def environment(*folders: Path) -> Environment:
    """Jinja2 for templates in these folders and in this one; a name that is not there is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([*folders, FILES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(template: Path, styles: Sequence[Path], **values: Any) -> str:
    """Renders a template, which gets the text of all styles as `style`."""
    from markupsafe import Markup

    style = Markup("".join(file.read_text("utf-8") for file in styles))
    return environment(template.parent).get_template(template.name).render(style=style, **values)


def write_text(path: Path, text: str) -> None:
    """Writes a page, or another text, as a whole or not at all; DynacutError if it cannot be written."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise DynacutError(f"{path} cannot be written: {error.strerror}", "check the folder and its space") from None
