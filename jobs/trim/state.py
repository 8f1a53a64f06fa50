"""What `dynacut trim` has done so far, in its directory: a step is done with all that it leaves, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynacut.shared.errors import DynacutError, ExitStatus
from dynacut.shared.private_folder import private_folder
from dynacut.shared.whole_file import write_whole

_FORMAT = 2
_NAME = "state.json"
_MAX_SIZE = 1 << 24


class State:
    """state.json of a directory: the request, and the details of each step that is done."""

    def __init__(self, directory: Path, request: dict[str, Any]) -> None:
        """Opens it, or begins it in a new or empty directory.

        request: what was asked for, as JSON has it; a directory serves one request.

        Raises:
            DynacutError: the directory holds something else, cannot be made, or can be written by others.
        """
        self._path = directory / _NAME
        self._steps: dict[str, dict[str, Any]] = {}
        self._process: dict[str, int] | None = None
        self._notes: dict[str, Any] = {}
        self._request = json.loads(json.dumps(request))
        advice = "give a new directory by -o DIR"
        is_new = private_folder(directory, advice, "choose what is removed, and which process is ended")
        try:
            has_state = self._path.exists()
            if not has_state and not is_new and any(directory.iterdir()):
                raise DynacutError(f"{directory} is not empty, and holds no trim", advice)
        except OSError as error:
            raise DynacutError(f"{directory} cannot be looked at: {error.strerror}", advice) from None
        if has_state:
            self._read()
        else:
            self._write()

    def _read(self) -> None:
        try:
            with self._path.open("rb") as file:
                document = json.loads(file.read(_MAX_SIZE))
            if document["format"] != _FORMAT:
                raise KeyError("format")
            request, self._steps, self._process = document["request"], document["steps"], document["process"]
            self._notes = document["notes"]
        except (OSError, ValueError, KeyError, TypeError):
            raise DynacutError(f"{self._path} cannot be read", "remove the directory, and begin anew") from None
        if request != self._request:
            raise DynacutError(
                f"{self._path.parent} holds a trim with another command or other options",
                "give the same again to resume it, or a new directory by -o DIR",
                status=ExitStatus.USAGE,
            )

    def details(self, step: str) -> dict[str, Any] | None:
        """What a step has noted; None if it is not done."""
        return self._steps.get(step)

    def finish(self, step: str, details: dict[str, Any]) -> None:
        """Notes that a step is done; the file is written as a whole."""
        self._steps[step] = details
        self._write()

    def forget(self, *steps: str) -> None:
        """Notes that steps are to be done again."""
        for step in steps:
            self._steps.pop(step, None)
        self._write()

    def note(self, name: str, what: Any) -> None:
        """Remembers something amid a step, as JSON has it, for the case that the step has to go on after a kill."""
        self._notes[name] = what
        self._write()

    def noted(self, name: str) -> Any:
        """What note() was told; None if nothing was."""
        return self._notes.get(name)

    @property
    def process(self) -> tuple[int, int] | None:
        """The process that was started and not ended: its pid and its start time in clock ticks."""
        return (self._process["pid"], self._process["started"]) if self._process else None

    @process.setter
    def process(self, process: tuple[int, int] | None) -> None:
        self._process = {"pid": process[0], "started": process[1]} if process else None
        self._write()

    def _write(self) -> None:
        document = {"format": _FORMAT, "request": self._request, "process": self._process, "steps": self._steps}
        document["notes"] = self._notes
        try:
            write_whole(self._path, (json.dumps(document, indent=2) + "\n").encode())
        except OSError as error:
            raise DynacutError(
                f"{self._path} cannot be written: {error.strerror}", "check the folder's space"
            ) from None
