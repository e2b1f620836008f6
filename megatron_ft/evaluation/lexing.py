"""Source text without its comments and strings, so that braces and names in it are code."""

import re

_LINE = r"//[^\n]*"
_BLOCK = r"/\*.*?\*/"
_STRING = r'"(?:\\.|[^"\\\n])*"'
_CHARACTER = r"'(?:\\[^'\n]+|\\'|[^'\\\n])'"  # of one character, so that 'a is Rust's lifetime
_C = [_LINE, _BLOCK, _STRING, _CHARACTER]

_NOT_CODE = {
    "python": [r'(?s:""".*?"""|\'\'\'.*?\'\'\')', r"#[^\n]*", _STRING, r"'(?:\\.|[^'\\\n])*'"],
    "cpp": [r'R"\(.*?\)"', *_C],
    "js": [_LINE, _BLOCK, _STRING, r"'(?:\\.|[^'\\\n])*'", r"`(?:\\.|[^`\\])*`"],
    "java": [r'""".*?"""', *_C],
    "go": [*_C, r"`[^`]*`"],
    "rust": [r'\br(#*)".*?"\1', *_C],
}
_PATTERNS = {language: re.compile("|".join(parts), re.DOTALL) for language, parts in _NOT_CODE.items()}


def code_only(text: str, language: str) -> str:
    r"""`text` with comments and strings replaced by blanks: positions and lines stay the same.

    >>> code_only('a("}"); // {', "js")
    'a(   );     '
    """
    return _PATTERNS[language].sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
