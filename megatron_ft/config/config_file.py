"""Flags from a YAML file: `--config FILE`, the same for every program.

    preset: starcoderbase-1b
    optimizer:                    # a section: its name is free, only the keys are flags
      lr: 5e-5
    bf16: true                    # as --bf16; `false` as --no-bf16, where there is one
    train-weighted-split-paths:   # several values as a list
      - "train: 0.7 0:1 data/a"

Keys are the flags' long names without the two hyphens, or the name of an argument without a flag.
Values are taken as they are written, not as YAML reads them. What is also on the command line
takes precedence.
"""

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import read_small_text

CONFIG, PRINT_CONFIG = "--config", "--print-config"
KEPT = "config.yaml"  # in --save: what repeats the run
LAUNCHED_WITH = "MEGATRON_FT_LAUNCHED_WITH"  # variable by which ranks know the launcher's own settings, as JSON
MOST_LEVELS = 20  # of sections
EXPECTED = "YAML, like 'seq-length: 2048'"


@dataclass(frozen=True)
class Setting:
    """A key of a file with its value: one text, several, or true or false."""

    key: str
    texts: tuple[str, ...]
    several: bool  # a list in the file
    truth: bool | None  # None for anything but true and false
    where: str  # file, line and key, for messages

    def option(self, known: Mapping[str, Any], spellings: Mapping[str, str]) -> str:
        """The flag in `known` that the key names, `spellings` maps former names to current ones.

        UserError where there is none.
        """
        option = "--" + self.key.replace("_", "-").removeprefix("--")
        option = spellings.get(option, option)
        if option in known:
            return option
        near = difflib.get_close_matches(option, known, n=1)
        raise UserError(f"{self.where}: unknown key" + (f"; did you mean {near[0].lstrip('-')}?" if near else ""))

    def words(self, option: str, action: argparse.Action, known: Mapping[str, Any]) -> list[str]:
        """The setting as typed on the command line; nothing for a switch that is off.

        UserError where the flag takes another kind of value.
        """
        if action.nargs == 0:
            if self.switch():
                return [option]
            off = f"--no-{option.removeprefix('--')}"
            return [off] if off in known else []
        return [option, *self.values(action)]

    def switch(self) -> bool:
        """The value of a flag that takes none. UserError where it is not true or false."""
        if self.truth is None:
            raise UserError(f"{self.where}: expected true or false, found {self._shown()}")
        return self.truth

    def values(self, action: argparse.Action) -> tuple[str, ...]:
        """The texts of the values of an action that takes some, as many as it takes."""
        repeated = isinstance(action.nargs, int) or action.nargs in ("+", "*") or is_appended(action)
        if self.several and not repeated:
            raise UserError(f"{self.where}: expected one value, found {self._shown()}")
        if isinstance(action.nargs, int) and len(self.texts) != action.nargs:
            raise UserError(f"{self.where}: expected {action.nargs} values, found {self._shown()}")
        if not self.texts and action.nargs != "*":
            raise UserError(f"{self.where}: expected at least one value, found {self._shown()}")
        return self.texts

    def _shown(self) -> str:
        return f"a list of {len(self.texts)}" if self.several else repr(self.texts[0][:40])


def is_appended(action: argparse.Action) -> bool:
    """Whether each occurrence of the flag adds a value to those before."""
    return isinstance(action, argparse._AppendAction)


def take_files(words: Sequence[str]) -> tuple[list[str], list[Setting]]:
    """The words without `--config FILE`, and the settings of these files, later ones last.

    Raises UserError for a file that is missing or is not YAML.
    """
    rest: list[str] = []
    settings: list[Setting] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *remaining]
        elif name == CONFIG:
            file = value if equals else next(remaining, None)
            if file is None:
                raise UserError(f"{CONFIG}: expected a YAML file of flags after it; see --help")
            settings += read_settings(Path(file))
        else:
            rest.append(word)
    return rest, settings


def read_settings(path: Path) -> list[Setting]:
    """The settings of a YAML file, in order. Keys that are given twice, and those whose value is
    null, are left out or refused: the former raise UserError."""
    import yaml

    try:
        root = yaml.compose(read_small_text(path, EXPECTED), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected YAML of a few levels") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: expected keys with values, like 'seq-length: 2048'")
    first_lines: dict[str, int] = {}
    settings = []
    for number, key, value in _pairs(root, path, MOST_LEVELS):
        where = f"{path}, line {number}: {key[:60]!r}"
        name = key.replace("_", "-")
        if name in first_lines:
            raise UserError(f"{where}: given on line {first_lines[name]} already; remove one")
        first_lines[name] = number
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise UserError(f"{where}: expected a value or a list of values, found a list of lists or of keys")
        if value.tag == "tag:yaml.org,2002:null":
            continue
        truth = yaml.SafeLoader("").construct_yaml_bool(value) if value.tag == "tag:yaml.org,2002:bool" else None
        several = isinstance(value, yaml.SequenceNode)
        settings.append(Setting(name, tuple(item.value for item in items), several, truth, where))
    return settings


def _pairs(node: Any, path: Path, levels: int) -> Iterator[tuple[int, str, Any]]:
    """Line, key and value of everything in a mapping that is not a section, those of sections."""
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key.value, str):
            raise UserError(f"{path}, line {line}: a list or mapping as a key; expected the name of a flag")
        if type(value).__name__ != "MappingNode":
            yield line, key.value, value
        elif levels:
            yield from _pairs(value, path, levels - 1)
        else:
            raise UserError(f"{path}, line {line}: sections in more than {MOST_LEVELS} levels")


def as_yaml(values: Mapping[str, Any], comment: str = "") -> str:
    """Settings as a file that `--config` reads; a mapping within it becomes a section."""
    import yaml

    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)
