"""The programs by the names that `megatron-ft` gives them, found in their folders.

A file's name with hyphens is its command: preprocess/train_tokenizer.py is `train-tokenizer`. The
programs of dataset/ and evaluation/, and the converters, are the commands of a group: `dataset
near-dedup`, `evaluate score`, `convert megatron-to-hf`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.launcher.command import PROGRAMS

GROUPS = {"dataset": "dataset", "evaluation": "evaluate"}  # by folder
CONVERTERS = ("megatron_to_hf", "hf_to_megatron", "reshard")
# In the order of a project: rows, tokens, training, what comes after.
FOLDERS = ("dataset", "preprocess", "launch", "convert", "evaluation")
# Parts of other programs, which people do not call.
INTERNAL = {"dataset/row_shards.py", "launch/preflight.py", "launch/rank.py"}


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
            if str(path.relative_to(directory)) not in INTERNAL:
                words = (*_group(folder, path.stem), path.stem.replace("_", "-"))
                found[words] = Command(words, path)
    return found


def _group(folder: str, stem: str) -> tuple[str, ...]:
    if stem in CONVERTERS:
        return ("convert",)
    return (GROUPS[folder],) if folder in GROUPS else ()
