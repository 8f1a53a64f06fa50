"""Modules of a target are chosen by name or path."""

from __future__ import annotations

import os

import pytest

from dynacut.live.process import Process
from dynacut.shared.errors import DynacutError
from dynacut.shared.modules import chosen_modules


def test_modules_are_chosen_by_name_or_path_each_once() -> None:
    with Process(os.getpid()) as process:
        executable, *others = process.modules
        (libc,) = (module for module in others if module.name.startswith("libc.so"))
        assert chosen_modules(process, ()) == [executable]
        assert chosen_modules(process, ("libc", libc.path, executable.name)) == [libc, executable]
        with pytest.raises(DynacutError, match="has no module 'nonsense'") as caught:
            chosen_modules(process, ("libc", "nonsense"))
        assert libc.name in caught.value.advice
