"""The command line of the training program, made from the table of flags."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ft.config.config import ENTRIES, GROUPS, Config, Entry
from megatron_ft.config.config_file import KEPT, LAUNCHED_WITH, as_yaml, take_files
from megatron_ft.config.flag import Flag, flag_fields, value_type
from megatron_ft.config.parser import Help, Parser
from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.printable import printable

# Flags of launch/finetune.py in a run's config.yaml, which other programs skip.
LAUNCHER = ("num-processes", "engine")


class TakesPrecedence(argparse.Action):
    """A flag of several that set one thing in different ways: the last on the command line is used.

    The others return to their defaults, with a line in `notices`. So a flag after a script's own
    overrides it even under another name (--train-epochs over --train-iters).
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        reset_alternatives(namespace, self.dest, option_string)
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


class SwitchTakesPrecedence(argparse.BooleanOptionalAction):
    """`TakesPrecedence` of a switch that also has a --no-... form, which turns off only itself."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        on = not (option_string or "").startswith("--no-")
        if on:
            reset_alternatives(namespace, self.dest, option_string)
        setattr(namespace, self.dest, on)


def reset_alternatives(namespace: argparse.Namespace, dest: str, option_string: str | None) -> None:
    """Return the flags that set the same as `dest` to their defaults, with a line in `notices`."""
    for other, entry in alternatives_of(dest).items():
        if getattr(namespace, other) != entry.default:
            setattr(namespace, other, entry.default)
            namespace.notices.append(
                f"{option_string} comes later on the command line than {entry.flag.name} and takes precedence"
            )


def alternatives_of(dest: str) -> dict[str, Entry]:
    """The other flags that set the same as the flag `dest`, by their names with underscores."""
    word = ENTRIES[dest].flag.alternatives
    return {other: entry for other, entry in ENTRIES.items() if other != dest and entry.flag.alternatives == word}


def build_parser(*, reads_config: bool = True) -> Parser:
    """The parser with all groups; every flag is explained in one line.

    `reads_config` is False where a program's own parser has --config.
    """
    parser = Parser(
        prog="megatron_ft.finetune",
        usage="python -m megatron_ft.finetune [flags]",
        description="Fine-tune a StarCoder-family model. Hyphens and underscores in flags are interchangeable.",
        formatter_class=Help,
        allow_abbrev=False,
        reads_config=reads_config,
    )
    for kind in GROUPS.values():
        title, _, description = (kind.__doc__ or "").strip().rstrip(".").partition(": ")
        group = parser.add_argument_group(title, description or None)
        for item, described in flag_fields(kind):
            options: dict[str, Any] = {"default": item.default, "help": described.help.replace("%", "%%")}
            if described.choices is not None:
                options["choices"] = described.choices
            options |= _how_to_parse(value_type(kind, item.name), described)
            group.add_argument(described.name, dest=described.dest, **options)
    parser.set_defaults(notices=[])
    return parser


def with_config(argv: Sequence[str], own: Parser | None = None) -> list[str]:
    """A command line with the flags of its `--config FILE` in front, so that all others override
    them. `own` has the flags of a program that takes those of training as well.

    Raises UserError.
    """
    words, settings = take_files(argv)
    if not settings:
        return words
    training, spellings = build_parser(reads_config=False), former_spellings()
    known = training.settable | (own.settable if own else {})
    front = []
    for setting in settings:
        if setting.key in LAUNCHER and f"--{setting.key}" not in known:
            continue
        option = setting.option(known, spellings)
        front += setting.words(option, known[option], known)
        if known[option].nargs != 0:
            training.check(known[option], setting)
    return front + words


def keep_settings(config: Config, directory: Path) -> None:
    """Write the run's config.yaml: what the user has set, with absolute paths.

    The launcher's own settings are included, so that the file repeats the run.
    """
    settings = {}
    for name, value in {**json.loads(os.environ.get(LAUNCHED_WITH, "{}")), **config.given}.items():
        entry = option_strings().get(f"--{name}")
        is_path = entry is not None and entry.flag.metavar in ("DIR", "FILE", "PREFIX") and isinstance(value, str)
        settings[name] = os.path.abspath(value) if is_path else value
    comment = f"Repeats this run: launch/finetune.py --config {directory.absolute() / KEPT}, with another --save."
    replace_file(directory / KEPT, as_yaml(settings, printable(comment)).encode())


def _how_to_parse(value: type, described: Flag) -> dict[str, Any]:
    """argparse's keywords for a flag whose values are of type `value`."""
    how: dict[str, Any] = {}
    if value is bool:
        if described.negatable:
            return {"action": SwitchTakesPrecedence if described.alternatives else argparse.BooleanOptionalAction}
        if described.alternatives is None:
            return {"action": "store_true"}
        return {"action": TakesPrecedence, "nargs": 0, "const": True}
    if value is not str:
        how["type"] = value
    if described.nargs is not None:
        how["nargs"] = described.nargs
    if described.metavar is not None:
        how["metavar"] = described.metavar
    if described.alternatives is not None:
        how["action"] = TakesPrecedence
    return how


def option_strings() -> dict[str, Entry]:
    """Every option string of the training program with its flag, `--no-...` forms included."""
    found = {}
    for entry in ENTRIES.values():
        found[entry.flag.name] = entry
        if entry.flag.negatable:
            found[f"--no-{entry.flag.name.removeprefix('--')}"] = entry
    return found


def former_spellings() -> dict[str, str]:
    """Accepted spellings, the branch's and our former ones, mapped to the current ones."""
    return {alias: entry.flag.name for entry in ENTRIES.values() for alias in entry.flag.aliases}


def check_bounds(values: dict[str, Any]) -> None:
    """Raise UserError for the first flag that is out of its bounds.

    `values` are by names with underscores; None, a flag that was not given, is not checked.
    """
    for dest, entry in ENTRIES.items():
        value, bound = values.get(dest), entry.flag.bounds
        if bound is not None and value is not None and value not in bound:
            raise UserError(f"{entry.flag.name} {value:.10g}: must be {bound}")


def words_of(entry: Entry, value: Any) -> list[str]:
    """A flag and its value as they are typed; nothing for a switch that is off by default."""
    if isinstance(value, bool):
        if value:
            return [entry.flag.name]
        typed = entry.flag.negatable and entry.default is not False
        return [f"--no-{entry.flag.name.removeprefix('--')}"] if typed else []
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    return [entry.flag.name, *map(str, values)]
