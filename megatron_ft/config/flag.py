"""How a flag of the training program is described: all that is known about it, in one place.

A flag is a field of one of the dataclasses in flags.py, made by `flag`. Its annotation gives the
type, its default the default; what else there is to say stands in `Flag`. From these the parser,
the bounds, what a resumed run may change, the mtf engine's command line, the planner's proposals,
the model card and the table in docs/training.md are derived.
"""

import types
import typing
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from enum import Enum, auto
from typing import Any

from megatron_ft.config.bounds import Bound


class Resume(Enum):
    """What it means to resume a run with another value."""

    FIXED = auto()  # it would be another run: refused without --override-checkpoint-args
    LISTED = auto()  # allowed; the log lists it
    SILENT = auto()  # where the run is or how it starts, not what it computes


class Mtf(Enum):
    """How `--engine mtf` passes a flag to BigCode's branch."""

    SAME = auto()  # under the same name
    TRANSLATED = auto()  # launcher/mtf.py writes it another way, or the branch always does so
    UNKNOWN = auto()  # the branch has no counterpart: refused


# Engines of this project, as `--engine` names them.
MEGATRON, TRANSFORMERS = "megatron-core", "transformers"


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Everything about a flag besides its type and default, which are the field's."""

    name: str  # Megatron's spelling, with hyphens
    help: str
    choices: Sequence[str] | None = None
    metavar: str | tuple[str, ...] | None = None
    nargs: int | str | None = None
    bounds: Bound | None = None
    resume: Resume = Resume.LISTED
    mtf: Mtf | str = Mtf.UNKNOWN  # or the branch's own name of the same value
    only: str | None = None  # the one engine, MEGATRON or TRANSFORMERS, that has it
    aliases: tuple[str, ...] = ()  # other accepted spellings: the branch's, and our former ones
    alternatives: str | None = None  # of the flags that share this word the last takes precedence
    negatable: bool = False  # a switch that also has a --no-... form
    planned: bool = False  # plan.py repeats it in its proposals where it differs from the default
    local: bool = False  # a path on somebody's machine, left out of model cards

    @property
    def dest(self) -> str:
        """Name in manifests: the flag's, with underscores."""
        return self.name.removeprefix("--").replace("-", "_")


def flag(name: str, default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field that is the flag `name`; `facts` are fields of `Flag`."""
    return field(default=default, metadata={"flag": Flag(name=name, help=help, **facts)})


def flag_of(item: Field) -> Flag | None:
    """The flag that a dataclass field is, None for a field that is not on the command line."""
    return item.metadata.get("flag")


def flag_fields(group: type) -> list[tuple[Field, Flag]]:
    """The fields of a group that are flags, in order."""
    return [(item, found) for item in fields(group) if (found := flag_of(item)) is not None]


def value_type(group: type, name: str) -> type:
    """Type of one value of a field: `int` for `int`, `int | None` and `list[int] | None`."""
    hint = typing.get_type_hints(group)[name]
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    if typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
    return hint
