"""Reading a JSON array of objects, however it is laid out in lines, one element at a time."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron_ft.files.json_file import parse_integer
from megatron_ft.files.jsonl_row import MAX_LINE_BYTES, BadRow

CHUNK_BYTES = 1 << 20
BLANKS = " \t\n\r"


def elements(stream: BinaryIO, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Any]:
    r"""The elements of the JSON array that a stream holds, each parsed when it is reached.

    Memory is bounded by the largest element, of at most MAX_LINE_BYTES. Raises BadRow if the text
    is not a JSON array, which may be after its first elements.

    >>> import io
    >>> list(elements(io.BytesIO(b'[\n  {"a": 1},\n  {"a": 2}\n]\n')))
    [{'a': 1}, {'a': 2}]
    """
    text = _Text(stream, chunk_bytes)
    if text.next_character() != "[":
        raise BadRow("not a JSON array")
    text.position += 1
    count = 0
    if text.next_character() != "]":
        while True:
            count += 1
            value = text.next_value(count)
            separator = text.next_character()
            text.position += 1
            if separator not in (",", "]"):  # then the value may be the start of a number
                raise BadRow(f"{separator!r} after element {count} of the JSON array" if separator else _cut_off(count))
            yield value
            if separator == "]":
                break
    else:
        text.position += 1
    if rest := text.next_character():
        raise BadRow(f"{rest!r} after the end of the JSON array")


class _Text:
    """The text of a stream from `position` on, as far as it was read."""

    def __init__(self, stream: BinaryIO, chunk_bytes: int):
        self._stream, self._chunk_bytes = stream, chunk_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(parse_int=parse_integer)
        self._text, self._ended, self.position = "", False, 0

    def _read_more(self) -> bool:
        """Append the next chunk, as large as what is held, so that an element is parsed again only
        a few times; False at the end."""
        if self._ended:
            return False
        self._text, self.position = self._text[self.position :], 0
        chunk = self._stream.read(max(self._chunk_bytes, len(self._text)))
        self._ended = not chunk
        try:
            self._text += self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError:
            raise BadRow("invalid UTF-8") from None
        return not self._ended

    def next_character(self) -> str:
        """The next character that is not white space, which is skipped; "" at the end."""
        while True:
            while self.position < len(self._text):
                if self._text[self.position] not in BLANKS:
                    return self._text[self.position]
                self.position += 1
            if not self._read_more():
                return ""

    def next_value(self, count: int) -> Any:
        """Parse the next value, element `count`."""
        self.next_character()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self.position)
            except RecursionError:
                raise BadRow(f"element {count} of the JSON array is nested too deeply") from None
            except json.JSONDecodeError as error:
                if len(self._text) - self.position > MAX_LINE_BYTES:
                    raise BadRow(
                        f"element {count} of the JSON array is longer than {MAX_LINE_BYTES >> 20} MiB"
                    ) from None
                if not self._read_more():
                    cut_off = not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated")
                    reason = (
                        _cut_off(count) if cut_off else f"element {count} of the JSON array is not JSON ({error.msg})"
                    )
                    raise BadRow(reason) from None
            else:
                if end == len(self._text) and self._read_more():  # a number may continue
                    continue
                self.position = end
                return value


def _cut_off(count: int) -> str:
    return f"the JSON array is cut off at element {count}; copy the file again"
