"""The programming language of a conversation: what its first fenced code block is tagged with."""

import re
from collections.abc import Iterable

from megatron_ft.commits.languages import LANGUAGES, NAMES

FENCE = re.compile(r"^[ \t]*(?:```|~~~)([^\n]*)(?:\n|\Z)", re.MULTILINE)
TAG = re.compile(r"[\w#+.-]{1,20}(?![\w#+.-])")
NO_CODE, NO_TAG, UNKNOWN = "no code", "code without a tag", "code with an unknown tag"
# Tags that are neither a language's name nor its file suffix.
ALIASES = {
    "asm": "Assembly", "bash": "Shell", "batch": "Batchfile", "console": "Shell", "csharp": "C#",
    "delphi": "Pascal", "golang": "Go", "jsx": "JavaScript", "latex": "TeX", "node": "JavaScript",
    "nodejs": "JavaScript", "objc": "Objective-C", "plaintext": "Text", "python2": "Python",
    "python3": "Python", "py3": "Python", "react": "JavaScript", "rscript": "R",
    "shell-session": "Shell", "terminal": "Shell", "tsx": "TypeScript", "vbnet": "Visual Basic",
    "vba": "Visual Basic", "vbscript": "Visual Basic", "wolfram": "Mathematica", "zsh": "Shell",
}  # fmt: skip
_NAMES = {name.lower(): name for name in NAMES}


def tagged_language(tag: str) -> str | None:
    """CommitPack's name of the language that a tag names; None if it names none.

    >>> [tagged_language(tag) for tag in ("python", "JS", "c++", "golang", "output")]
    ['Python', 'JavaScript', 'C++', 'Go', None]
    """
    tag = tag.lower()
    return _NAMES.get(tag) or ALIASES.get(tag) or LANGUAGES.get(f".{tag}")


def fenced_language(texts: Iterable[str]) -> str:
    r"""The language of the first fenced code block of these texts; NO_CODE, NO_TAG or UNKNOWN if
    there is none.

    >>> fenced_language(["Print 1.", "Here:\n```py\nprint(1)\n```"])
    'Python'
    """
    for text in texts:
        if ("```" in text or "~~~" in text) and (fence := FENCE.search(text)):
            line = fence[1].strip()
            if not line:
                return NO_TAG
            tag = TAG.match(line)
            return _NAMES.get(line.lower()) or (tag and tagged_language(tag.group())) or UNKNOWN
    return NO_CODE
