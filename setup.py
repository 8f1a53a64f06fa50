"""The one build step that pyproject.toml cannot say: compiling the handler into the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.build_py import build_py

PROJECT = Path(__file__).resolve().parent
HANDLERS = PROJECT / "handlers"


def _build_module() -> ModuleType:
    # By its path: neither dynacut nor the project's folder can be imported while the package is being built.
    spec = importlib.util.spec_from_file_location("dynacut_handler_build", HANDLERS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithHandler(build_py):
    """Adds dynacut/handlers/trap.bin; an editable install gets it beside its sources."""

    def _handler(self) -> Path:
        if self.editable_mode:
            return HANDLERS / "trap.bin"
        return Path(self.build_lib, "dynacut", "handlers", "trap.bin")

    def run(self) -> None:
        """Copies the sources, then compiles; a trap.bin lying in the sources is not trusted to be recent."""
        super().run()
        module = _build_module()
        try:
            module.build(HANDLERS, self._handler())
        except module.BuildError as error:
            sys.exit(f"dynacut: {error}")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files that are built, the handler among them."""
        outputs: list[str] = super().get_outputs(include_bytecode)
        handler = str(self._handler())
        return outputs if handler in outputs else [*outputs, handler]


setup(cmdclass={"build_py": BuildWithHandler})
