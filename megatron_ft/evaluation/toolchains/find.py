"""The six toolchains of this machine."""

from collections.abc import Callable

from megatron_ft.evaluation.toolchains import cpp, go, java, js, python, rust
from megatron_ft.evaluation.toolchains.toolchain import Toolchain

FINDERS: dict[str, Callable[[], Toolchain]] = {
    "python": python.find,
    "cpp": cpp.find,
    "js": js.find,
    "java": java.find,
    "go": go.find,
    "rust": rust.find,
}


def find_toolchain(language: str) -> Toolchain:
    """The toolchain of a language; what has to be built once is built now.

    Raises ToolchainError if something is missing, with what installs it.
    """
    return FINDERS[language]()
