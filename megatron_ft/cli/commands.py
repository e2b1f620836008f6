"""The programs of each folder by the words that `megatron-ft` has for them."""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.called_as import FOLDERS, INTERNAL, words_of
from megatron_ft.launcher.command import PROGRAMS


@dataclass(frozen=True)
class Command:
    """A program: its words after `megatron-ft`, one or two, and its file."""

    words: tuple[str, ...]
    path: Path

    @property
    def summary(self) -> str:
        """The first sentence of the program's docstring."""
        text = re.split('"""', self.path.read_text(encoding="utf-8"), maxsplit=2)[1]
        return re.split(r"\.\s|:?\n\n|\.$", text.strip(), maxsplit=1)[0].replace("\n", " ")


def all_commands(directory: Path = PROGRAMS) -> dict[tuple[str, ...], Command]:
    """All commands by their words; `directory` holds the folders of programs."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((directory / folder).rglob("*.py")):
            program = path.relative_to(directory).as_posix()
            if program not in INTERNAL:
                found[words_of(program)] = Command(words_of(program), path)
    return found
