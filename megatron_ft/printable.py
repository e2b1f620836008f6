r"""Text of foreign files, made safe to print: on one line, without a character that controls a
terminal.

Names of files and tensors, keys and values of JSON, error messages of libraries: each may hold
escape sequences that clear the screen, newlines that forge a second line, or bidirectional
overrides that reorder it. And `counted`, a number with its noun.
"""

import re

MAX_CHARACTERS = 4000  # of one line; the end is kept, because remedies are there

# Control characters, white space other than a space, invisible and bidirectional format characters
# (Unicode's Cf without the joiners of Persian and emoji), and lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]|[^\\S ]"
)


def printable(text: object, limit: int | None = MAX_CHARACTERS, keep: str = "") -> str:
    r"""`str(text)` with unsafe characters as escapes, shortened in the middle to `limit` characters
    (None: not shortened).

    `keep` are characters to leave as they are, such as newlines of text that may have several. A
    byte of a file name that is not UTF-8 becomes \xNN.

    >>> print(printable("a\x1b[2J\nb \u202e\udcff"))
    a\x1b[2J\nb \u202e\xff
    >>> printable("abcdefghijklmnop", limit=9)
    'ab ... op'
    """
    shown = _shorten(str(text), limit)
    if shown.isprintable():
        return shown
    return _shorten(_UNSAFE.sub(lambda found: _escape(found.group(), keep), shown), limit)


def counted(number: int, noun: str) -> str:
    """A number of things, in the singular for one.

    >>> counted(1, "document"), counted(2500, "document")
    ('1 document', '2,500 documents')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _escape(character: str, keep: str) -> str:
    if character in keep:
        return character
    if "\udc80" <= character <= "\udcff":  # os.fsdecode of a byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _shorten(text: str, limit: int | None) -> str:
    if limit is None or len(text) <= limit:
        return text
    half = max(1, (limit - 5) // 2)
    return f"{text[:half]} ... {text[-half:]}"
