"""Reading a JSON file that somebody else may have written: one object within limits, or a UserError
of one line.

    config = read_json(path)
    layers = require(config, "n_layer", int, str(path), low=1, high=10_000)

Such a file may be missing, truncated, of another format (see `first_bytes`), gigabytes long, nested
until the stack overflows, or hold values of other types than its reader expects.
"""

import codecs
import json
import math
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron_ft.errors import UserError
from megatron_ft.files.first_bytes import describe

MAX_BYTES = 16 << 20  # a parsed file takes up to 30 times as much memory
MAX_DEPTH = 100  # levels of lists and objects: what was parsed can also be copied and written
MAX_DIGITS = 300  # longer integers become floats: Python refuses 4,301 digits, floats end at 309

T = TypeVar("T")
D = TypeVar("D")
KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    type(None): "null",
}
SEVERAL = {dict: "objects", list: "lists", str: "strings", bool: "booleans", int: "integers", float: "numbers"}


def read_json(path: str | Path, *, max_bytes: int = MAX_BYTES, remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    NaN and Infinity are accepted, as transformers and Python do; `require` refuses them. An integer
    of more than MAX_DIGITS digits becomes a float. Raises UserError if the file does not exist, is
    larger than `max_bytes`, or does not hold one JSON object of at most MAX_DEPTH levels; `remedy`
    is then the end of the message.
    """
    path = Path(path)
    content = read_small_file(path, max_bytes)
    if content and (other := describe(content)):
        raise UserError(f"{path}: {other}")
    return parse_json(content, str(path), remedy)


def read_small_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `max_bytes`; UserError if it is anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: {'a directory' if path.is_dir() else 'not a regular file'}, expected a file")
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > max_bytes:
        raise UserError(f"{path}: {status.st_size:,} bytes, expected at most {max_bytes:,}")
    return content


def read_small_text(path: Path, expected: str) -> str:
    """The text of a small file in UTF-8, without a byte order mark; UserError, which names what was
    `expected`, if it is not text, or a page or pointer in place of it."""
    content = read_small_file(path)
    if content and (other := describe(content)):
        raise UserError(f"{path}: {other}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; expected {expected}") from None


def parse_json(content: bytes | str, where: str, remedy: str = "") -> dict[str, Any]:
    """The object in a JSON text, with the limits of `read_json`; `where` names the text in the
    UserError if there is none."""
    try:
        if isinstance(content, bytes):
            content = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        found = json.loads(content, parse_int=parse_integer)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}, expected JSON"
    except json.JSONDecodeError as error:
        reason = _why_not_json(error)
    except RecursionError:
        reason = f"JSON of more than {MAX_DEPTH} levels"
    else:
        if isinstance(found, dict) and _is_deeper_than(MAX_DEPTH, found):
            reason = f"JSON of more than {MAX_DEPTH} levels"
        elif isinstance(found, dict):
            return found
        else:
            reason = f"holds {kind_of(found)}, expected a JSON object"
    raise UserError(f"{where}: {reason}" + (f"; {remedy}" if remedy else "")) from None


def parse_integer(digits: str) -> int | float:
    """For `json.loads(parse_int=...)`: a float, usually infinite, for a number of many digits."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _why_not_json(error: json.JSONDecodeError) -> str:
    if not error.doc.strip():
        return "empty, expected JSON"
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
        return "JSON that ends too early; if it was copied, copy it again"
    return f"not JSON (line {error.lineno}, column {error.colno}: {error.msg})"


def _is_deeper_than(limit: int, found: dict | list) -> bool:
    level: list[dict | list] = [found]
    for _ in range(limit):
        values = (value for parent in level for value in (parent.values() if isinstance(parent, dict) else parent))
        level = [value for value in values if isinstance(value, (dict, list))]
        if not level:
            return False
    return True


def kind_of(value: object) -> str:
    """The kind of a JSON value, for messages.

    >>> kind_of([]), kind_of(True), kind_of(None)
    ('a list', 'true or false', 'null')
    """
    return KINDS.get(type(value), type(value).__name__)


def require(
    found: Mapping,
    key: str,
    kind: type[T],
    where: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    of: type | None = None,
) -> T:
    """The value of a key: exactly of type `kind`, so that true is not an integer.

    A float is finite and may be written as an integer. `low` and `high` bound a number, or the
    length of a string, list or object. `of` is the type of the values of a list or object. `where`
    names the file. Raises UserError with what was found and expected.

    >>> require({"n_layer": 2}, "n_layer", int, "config.json", low=1)
    2
    >>> require({"n_layer": True}, "n_layer", int, "config.json", low=1, high=9)
    Traceback (most recent call last):
    megatron_ft.errors.UserError: config.json: "n_layer" is true, expected an integer, 1 to 9
    """
    expected = f"expected {_expected(kind, low, high, of)}"
    if key not in found:
        raise UserError(f'{where}: no "{key}", {expected}')
    value = found[key]
    if not is_a(value, kind) or not _within(value, low, high):
        raise UserError(f'{where}: "{key}" is {_shown(value)}, {expected}')
    if of is not None:
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            if not is_a(item, of):
                raise UserError(f'{where}: "{key}" has {_shown(item)} at {name!r}, {expected}')
    if kind is float:
        value = float(value)
    return value


def optional(
    found: Mapping,
    key: str,
    kind: type[T],
    where: str,
    default: D,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    of: type | None = None,
) -> T | D:
    """As `require`, but `default` if there is no such key or its value is null."""
    return default if found.get(key) is None else require(found, key, kind, where, low=low, high=high, of=of)


def is_a(value: Any, kind: type) -> bool:
    """Whether a JSON value is of exactly this type; a float is finite and may be an integer.

    >>> is_a(True, int), is_a(1, float), is_a(float("nan"), float)
    (False, True, False)
    """
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind


def _within(value: Any, low: float, high: float) -> bool:
    if isinstance(value, bool):
        return True
    return low <= (value if isinstance(value, (int, float)) else len(value)) <= high


def _expected(kind: type, low: float, high: float, of: type | None) -> str:
    name = "a finite number" if kind is float else KINDS[kind]
    if of is not None:
        name += f" of {SEVERAL[of]}"
    if kind is bool or (low, high) == (-math.inf, math.inf):
        return name
    bounds = f"{low} or more" if high == math.inf else f"at most {high}" if low == -math.inf else f"{low} to {high}"
    if kind in (int, float):
        return f"{name}, {bounds}"
    return f"{name} of {bounds} {'characters' if kind is str else 'values'}"


def _shown(value: object) -> str:
    """A value for messages: itself if it is short, else its kind."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = json.dumps(value)
        if len(text) <= 40:
            return text
    return kind_of(value)
