"""Rows of JSONL: one line as the texts it holds, or a `BadRow` with the reason."""

import json
import re
from collections.abc import Sequence

import orjson

from megatron_ft.files.first_bytes import NUL, describe
from megatron_ft.files.json_file import kind_of, parse_integer

MAX_LINE_BYTES = 64 << 20
SHOWN_KEYS = 8
NO_KEY = "no key"
ONE_PER_LINE = "writes one object per line"
EXACT = {str, int, bool, type(None)}  # types whose values orjson and json give alike
PIECE_DEPTH = 100  # levels that are parsed at a time where all are too many for the stack
# A string, complete or not, or one bracket.
STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


class BadRow(ValueError):
    """A line that is not a valid row; the message is the reason, equal for all such lines."""


def of_the_file(reason: BadRow) -> bool:
    """Whether the reason is a defect of the file, not of the row, and so tells what to do.

    >>> of_the_file(BadRow("a zip archive; unzip extracts it"))
    True
    """
    return "; " in str(reason) and not str(reason).startswith(NO_KEY)


def parse_object(line: bytes | None) -> dict:
    """One line as a JSON object; BadRow with the reason if it is not one.

    Values are those of json.loads, except where it fails on valid JSON: an integer of thousands of
    digits becomes a float, and what is nested hundreds of levels deep becomes None.
    """
    if line is None:
        raise BadRow(f"longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        row = orjson.loads(line)
        # The quick test is enough for nearly all rows.
        rounded = not (type(row) is dict and EXACT.issuperset(map(type, row.values()))) and _may_be_rounded(row)
    except orjson.JSONDecodeError:  # also for NaN, lone surrogates and infinite numbers
        rounded = True
    if rounded:
        line = line.removesuffix(b"\n")  # json would find it in a string that is cut off
        try:
            row = _loads(line.decode("utf-8"))
        except ValueError as error:
            raise BadRow(_why_not_json(line, error)) from None
    if isinstance(row, list):
        raise BadRow(f"a JSON array, not an object; jq -c '.[]' {ONE_PER_LINE}")
    if not isinstance(row, dict):
        raise BadRow(f"{kind_of(row)}, not a JSON object")
    return row


def _may_be_rounded(value: object) -> bool:
    """Whether it holds a float that orjson may have made of an integer beyond 64 bits."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            values = value.values() if isinstance(value, dict) else value
            if not EXACT.issuperset(map(type, values)):
                waiting.extend(values)
        elif isinstance(value, float) and abs(value) >= 1 << 63:
            return True
    return False


def _loads(text: str) -> object:
    """json.loads, also for values of any depth and numbers of any length; ValueError otherwise."""
    try:
        return json.loads(text)
    except RecursionError:
        return _parse_deep(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python converts no more than 4,300 digits
        try:
            return json.loads(text, parse_int=parse_integer)
        except RecursionError:
            return _parse_deep(text)


def _parse_deep(text: str) -> object:
    """Parse JSON in pieces of PIECE_DEPTH levels, from the inside out.

    Every piece is checked, but replaced by null in the one around it.
    """
    pieces: list[list[str]] = [[]]  # of each piece that is not closed yet: its text so far
    start = depth = 0
    for match in STRING_OR_BRACKET.finditer(text):
        bracket = match.group()
        if bracket in "[{":
            if depth and depth % PIECE_DEPTH == 0:
                pieces[-1].append(text[start : match.start()])
                pieces.append([])
                start = match.start()
            depth += 1
        elif bracket in "]}":
            depth -= 1
            if depth and depth % PIECE_DEPTH == 0 and len(pieces) > 1:
                piece = "".join([*pieces.pop(), text[start : match.end()]])
                json.loads(piece, parse_int=parse_integer)
                pieces[-1].append("null")
                start = match.end()
    if len(pieces) > 1:
        raise json.JSONDecodeError("Expecting ',' delimiter", text, len(text))
    return json.loads("".join([*pieces[0], text[start:]]), parse_int=parse_integer)


def _why_not_json(line: bytes, error: ValueError) -> str:
    text = line.strip()
    if not text:
        return "empty line"
    if other := describe(line):
        return other
    if b"\0" in line:
        return f"holds {NUL}"
    if not isinstance(error, json.JSONDecodeError):
        return "invalid UTF-8"
    rest = error.doc[error.pos :].lstrip()
    if text in (b"[", b"{", b"[{"):
        return f"JSON over several lines; jq -c {'.' if text == b'{' else repr('.[]')} {ONE_PER_LINE}"
    if error.msg == "Extra data" and rest == ",":
        return f"JSON over several lines; jq -c '.[]' {ONE_PER_LINE}"
    if error.msg == "Extra data" and b"\r" in text:
        return "lines end in CR only; tr '\\r' '\\n' converts the file"
    if error.msg == "Extra data" and rest.startswith(("{", "[")):
        return f"more than one JSON object on the line; jq -c . {ONE_PER_LINE}"
    if text.startswith((b"{'", b"['")):
        return "a Python dictionary, not JSON; json.dumps writes JSON"
    if error.msg.startswith("Invalid control character"):
        return "a control character in a string that is not escaped, such as a tab; json.dumps writes it as an escape"
    if text[:1] in b"{[" and (not rest or error.msg.startswith("Unterminated string")):
        return "incomplete JSON, cut off or continued on the next line"
    if text[:1] not in b'{["' and re.search(rb"[,;\t]", text):
        return "text, not JSON; pandas.read_csv(FILE).to_json(OUT, orient='records', lines=True) converts CSV"
    return "not JSON"


def parse_row(line: bytes | None, keys: Sequence[Sequence[str]]) -> list[str]:
    """The texts of one line, one per entry of `keys`. An entry lists the names that a field may
    have; the first one found is used.

    BadRow if the line is not an object, a key is missing, or a value is not a string, is empty, or
    contains a lone surrogate.

    >>> parse_row(b'{"inputs": "1 + 1", "targets": "2"}', [["inputs"], ["outputs", "targets"]])
    ['1 + 1', '2']
    """
    row = parse_object(line)
    texts = []
    for names in keys:
        name = next((name for name in names if name in row), None)
        if name is None:
            raise BadRow(f"{NO_KEY} {' or '.join(map(repr, names))}; {keys_of(row)}")
        text = text_of(row, name, line)
        if not text:
            raise BadRow(f"{name!r} is empty")
        texts.append(text)
    return texts


def to_line(row: dict) -> bytes:
    r"""The row as a line of JSONL in UTF-8, with its newline.

    >>> to_line({"a": "é"}).decode(), to_line({"a": "\ud800"}).decode()
    ('{"a": "é"}\n', '{"a": "\\ud800"}\n')
    """
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can express
        return json.dumps(row).encode() + b"\n"


def text_of(row: dict, name: str, line: bytes | None) -> str:
    """The string of a key of a row that was parsed from `line`; BadRow if it is of another type, or
    contains half a surrogate pair, which only an escape like \\ud83d can produce."""
    text = row[name]
    if not isinstance(text, str):
        raise BadRow(f"{name!r} is {kind_of(text)}, not a string")
    if line and not text.isascii() and b"\\u" in line:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow("lone surrogate") from None
    return text


def keys_of(row: dict) -> str:
    """The keys of a row, for messages."""
    shown = ", ".join(repr(key[:40]) for key in list(row)[:SHOWN_KEYS])
    return f"the row has {shown or 'no keys'}" + (", ..." if len(row) > SHOWN_KEYS else "")
