"""What a mix consists of, from a YAML file: sources, and how many rows to take from each.

seed: 1234
rows: 20000                # in total, of the sources with a weight
sources:
  commits:
    files: commits/*.jsonl # relative to this file; --source commits=FILE replaces them
    by: lang
    quotas: {Python: 2000, Go: 500}
  questions:
    files: [a.jsonl, b.parquet]
    only: {license: [mit, apache-2.0]}
    rows: 5000             # or all
  chats:
    files: chats.jsonl
    weight: 3
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.extras import require
from megatron_ft.files.json_file import kind_of, read_small_text

ALL = "all"
MIX_KEYS = ("seed", "rows", "sources")
SOURCE_KEYS = ("files", "only", "by", "quotas", "rows", "weight")
DEFAULT_SEED = 1234


@dataclass(frozen=True)
class SourceSpec:
    """One source. `quotas` are numbers of rows by the value of the key `by`, None for all rows; the
    value "" stands for every row. `only` are the values of keys that a row must have. All values
    are in lower case."""

    name: str
    files: tuple[str, ...]
    only: Mapping[str, frozenset[str]]
    by: str | None
    quotas: Mapping[str, int | None]

    def group_of(self, fields: Mapping[str, Any]) -> str | None:
        """The quota that a row counts for; None if it is not of this mix."""
        for key, values in self.only.items():
            if _lower(fields.get(key)) not in values:
                return None
        group = _lower(fields.get(self.by)) if self.by else ""
        return group if group in self.quotas else None


@dataclass(frozen=True)
class MixSpec:
    """A mix. `seed` determines which rows are taken, and their order."""

    seed: int
    sources: tuple[SourceSpec, ...]


def read_spec(path: Path, given: Mapping[str, Iterable[str]], seed: int | None = None) -> MixSpec:
    """The mix that a YAML file describes.

    `given` are files by the name of their source, and `seed` a seed, that replace those of the
    file. Raises UserError with the place of a key that is unknown or has another kind of value.
    """
    found = _Fields(_parse(path), str(path), MIX_KEYS)
    sources = found.mapping("sources")
    if not sources:
        raise UserError(f"{path}: no sources; expected sources: NAME: files: FILE, rows: N")
    if unknown := set(given) - set(map(str, sources)):
        raise UserError(f"--source {min(unknown)}: not a source of {path}; it has {', '.join(map(str, sources))}")
    parts = {str(name): _Fields(fields, f"{path}: sources: {name}", SOURCE_KEYS) for name, fields in sources.items()}
    weights = {name: part.weight("weight") for name, part in parts.items() if "weight" in part.fields}
    total = found.rows("rows") if "rows" in found.fields else None
    if (total is None) != (not weights):
        raise UserError(f"{path}: rows at the top and weight of a source go together; give both or neither")
    shared = divided(total or 0, weights)
    if none := [name for name, count in shared.items() if not count]:
        raise UserError(f"{path}: rows is {total}, of which no row is left for {none[0]}; raise rows or its weight")
    specs = [_source(name, part, path.parent, given.get(name), shared.get(name)) for name, part in parts.items()]
    stored = found.integer("seed") if "seed" in found.fields else DEFAULT_SEED
    return MixSpec(stored if seed is None else seed, tuple(specs))


def divided(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """A number divided by weights into integers with this sum, the largest remainders rounded up.

    >>> divided(10, {"a": 1, "b": 1, "c": 1})
    {'a': 4, 'b': 3, 'c': 3}
    """
    exact = {name: total * Fraction(weight) / sum(map(Fraction, weights.values())) for name, weight in weights.items()}
    parts = {name: math.floor(number) for name, number in exact.items()}
    by_remainder = sorted(exact, key=lambda name: parts[name] - exact[name])  # stable: ties in order
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def _source(name: str, part: "_Fields", folder: Path, given: Iterable[str] | None, shared: int | None) -> SourceSpec:
    counts = [key for key in ("rows", "quotas", "weight") if key in part.fields]
    if len(counts) != 1:
        raise UserError(
            f"{part.where}: {' and '.join(counts) or 'nothing'} to count rows by; give one of rows, quotas, weight"
        )
    by = None
    quotas: dict[str, int | None]
    if "quotas" in part.fields:
        by = part.name("by")
        limits = _Fields(part.mapping("quotas"), f"{part.where}: quotas")
        quotas = {_text(value, limits.where): limits.rows(value) for value in limits.fields}
        if not quotas or len(quotas) < len(limits.fields):
            raise UserError(f"{limits.where}: expected different names with a number of rows each")
    elif "by" in part.fields:
        raise UserError(f"{part.where}: by is the key of quotas; give both or neither")
    elif shared is not None:
        quotas = {"": shared}
    else:
        quotas = {"": None if part.fields["rows"] == ALL else part.rows("rows", f"a number of rows or {ALL}")}
    only = _Fields(part.mapping("only") if "only" in part.fields else {}, f"{part.where}: only")
    values = {str(key): frozenset(_text(value, only.where) for value in only.several(key)) for key in only.fields}
    if given is not None:
        files = list(given)
    elif "files" in part.fields:
        files = [file for pattern in part.several("files") for file in _matching(folder, str(pattern), part.where)]
    else:
        raise UserError(f"{part.where}: no files; name them there, or give --source {name}=FILE")
    return SourceSpec(name, tuple(files), values, by, quotas)


def _matching(folder: Path, pattern: str, where: str) -> list[str]:
    """The files of a pattern, sorted."""
    path = folder / pattern
    if not any(character in pattern for character in "*?[") or path.exists():
        return [str(path)]
    anchor = Path(path.anchor) if path.is_absolute() else Path()
    try:
        files = sorted(map(str, anchor.glob(str(path.relative_to(anchor) if path.is_absolute() else path))))
    except ValueError as error:  # such as ***
        raise UserError(f"{where}: files is {pattern}: {error}") from None
    if files:
        return files
    raise UserError(f"{where}: no file matches {path}; correct files, or give --source")


def _text(value: Any, where: str) -> str:
    """A value of YAML in lower case. UserError for one that YAML made of another word."""
    if isinstance(value, bool):
        raise UserError(f"{where}: {str(value).lower()}, as YAML reads words like no, off and on; quote them: 'no'")
    return str(value).lower()


def _lower(value: Any) -> str | None:
    return value.lower() if isinstance(value, str) else None


def _parse(path: Path) -> Any:
    yaml = require("yaml", "dataset")
    safe_loader: Any = yaml.SafeLoader

    class Loader(safe_loader):
        """Refuses a key that is given twice; YAML's own loader keeps the last one in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key for key, _ in node.value if isinstance(key.value, str)]
            for i, key in enumerate(keys):
                if key.value in (before.value for before in keys[:i]):
                    line = key.start_mark.line + 1
                    raise UserError(f"{path}, line {line}: key {key.value[:40]!r} is given twice; remove one")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(read_small_text(path, "YAML"), Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None
    except UserError:
        raise
    except (ValueError, AttributeError) as error:  # of values with a tag, and of dates such as 2026-02-30
        raise UserError(f"{path}: a value does not fit its type ({error}); quote it if it is a text") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected YAML of a few levels") from None


class _Fields:
    """A mapping of the file, whose keys are checked; `where` is its place, for messages."""

    def __init__(self, fields: Any, where: str, known: Sequence[str] | None = None):
        if not isinstance(fields, dict):
            raise UserError(f"{where}: {kind_of(fields)}, expected keys with values")
        self.fields, self.where = fields, where
        for key in fields:
            if known is not None and key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise UserError(f"{where}: unknown key {str(key)[:40]!r}; {hint}")

    def mapping(self, key: Any) -> dict[Any, Any]:
        """The keys and values under a key."""
        value = self.fields.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key, "keys with values")
        return value

    def name(self, key: Any) -> str:
        """The text of a key."""
        value = self.fields.get(key)
        if not isinstance(value, str) or not value:
            raise self._wrong(key, "a name")
        return value

    def integer(self, key: Any) -> int:
        """The integer of a key, of any size."""
        value = self.fields.get(key)
        if type(value) is not int:
            raise self._wrong(key, "an integer")
        return value

    def rows(self, key: Any, expected: str = "a number of rows, at least 1") -> int:
        """The number of rows of a key."""
        value = self.fields.get(key)
        if type(value) is not int or value < 1:
            raise self._wrong(key, expected)
        return value

    def weight(self, key: Any) -> float:
        """The weight of a key."""
        value = self.fields.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._wrong(key, "a number above 0")
        return float(value)

    def _wrong(self, key: Any, expected: str) -> UserError:
        value = self.fields.get(key)
        shown = str(value)[:40] if type(value) in (int, float, str) else kind_of(value)
        found = f"{key} is {shown}" if key in self.fields else f"no {key}"
        return UserError(f"{self.where}: {found}, expected {expected}")

    def several(self, key: Any) -> list[Any]:
        """The values of a key that may have one or a list of them."""
        value = self.fields[key]
        values = value if isinstance(value, list) else [value]
        if not values or any(isinstance(item, dict | list) or item is None for item in values):
            raise UserError(f"{self.where}: {key} is {kind_of(value)}, expected a name or a list of names")
        return values
