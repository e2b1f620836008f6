"""Rules of the preset `edit`, from datasets of edits that came after CommitPackFT; called as those
of rules.py.

Sources: EditPackFT (arXiv 2312.12450), Granite Code (2405.04324), StarCoder (2305.06161).
"""

import ast
import json
import re
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable

from megatron_ft.commits.candidate import Candidate
from megatron_ft.commits.edit_distance import is_closer_than
from megatron_ft.commits.rules import Limits

# A comment at the start of a file, after a line that names an interpreter.
FIRST_COMMENT = re.compile(
    r"(#![^\n]*\n)?\s*(?:/\*.*?\*/|<!--.*?-->|(?:[ \t]*(?://|#|--|;|%)[^\n]*(?:\n|\Z))+)\s*", re.DOTALL
)
LICENSE_WORDS = re.compile(r"copyright|licen[sc]e|all rights reserved", re.IGNORECASE)
TODO = re.compile(r"\b(?:TODO|FIXME)\b")
BOTS = ("[bot]", "dependabot", "greenkeeper", "renovate", "pyup", "snyk", "auto-generated", "automatically generated")
REVERT = ("merge ", "merged ", "revert ", "reverts ", "reverted ")
# Languages of data and prose, of which a fraction is enough: YAML is the largest of CommitPackFT.
DATA_LANGUAGES = frozenset(
    ("CSV", "Gettext Catalog", "INI", "JSON", "Markdown", "SVG", "Text", "Unity3D Asset", "XML", "YAML")
)
MIN_LETTERS = 0.25  # of a file's characters
MIN_HTML_TEXT, MIN_HTML_CHARS = 0.2, 100  # visible text, as a fraction of the file and in characters
DATA_CHARS = range(50, 5001)  # characters of a JSON or YAML file
HTML_CODE = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|<[^>]*>", re.DOTALL | re.IGNORECASE)
ASCII_LETTERS = bytes(code for code in range(128) if chr(code).isalpha())
NOT_LETTERS = re.compile(r"[\W\d_]+")


def strip_license_header(row: Candidate, limits: Limits) -> bool:
    """Remove a first comment about the license from both files. Never drops."""
    row.old, row.new = _without_license(row.old), _without_license(row.new)
    return False


def _without_license(text: str) -> str:
    comment = FIRST_COMMENT.match(text)
    if comment is None or not LICENSE_WORDS.search(comment.group()):
        return text
    return (comment[1] or "") + text[comment.end() :]


def blank_file(row: Candidate, limits: Limits) -> bool:
    """The file is blank before or after the commit."""
    return not row.old.strip() or not row.new.strip()


def todo(row: Candidate, limits: Limits) -> bool:
    """The new file is unfinished: has the word TODO or FIXME."""
    return ("TODO" in row.new or "FIXME" in row.new) and TODO.search(row.new) is not None


def bot(row: Candidate, limits: Limits) -> bool:
    """The message names a bot or a generator."""
    text = f"{row.lower}\n{row.message.lower()}"
    return any(name in text for name in BOTS)


def merge_or_revert(row: Candidate, limits: Limits) -> bool:
    return row.lower.startswith(REVERT) or "this reverts commit" in row.message.lower()


def changed_lines(row: Candidate, limits: Limits) -> bool:
    """Too few or too many lines are in one of the files only; lines that moved do not count."""
    old, new = Counter(row.old.splitlines()), Counter(row.new.splitlines())
    count = (old - new).total() + (new - old).total()
    return not limits.min_changed_lines <= count <= limits.max_changed_lines


def edit_distance(row: Candidate, limits: Limits) -> bool:
    """Too few characters differ (Levenshtein)."""
    return is_closer_than(row.old, row.new, limits.min_edit_distance)


def few_letters(row: Candidate, limits: Limits) -> bool:
    """Less than a quarter of the new file's characters are letters."""
    text = row.new
    if text.isascii():
        letters = len(text) - len(text.encode().translate(None, ASCII_LETTERS))
    else:
        letters = len(NOT_LETTERS.sub("", text))
    return letters < MIN_LETTERS * len(text)


def html_markup(row: Candidate, limits: Limits) -> bool:
    """The new file is HTML with little visible text."""
    if row.language != "HTML":
        return False
    visible = len(HTML_CODE.sub("", row.new).strip())
    return visible < MIN_HTML_CHARS or visible < MIN_HTML_TEXT * len(row.new)


def data_size(row: Candidate, limits: Limits) -> bool:
    """The new file is JSON or YAML and too short or too long to be a configuration."""
    return row.language in ("JSON", "YAML") and len(row.new) not in DATA_CHARS


def data_language(row: Candidate, limits: Limits) -> bool:
    """The language is one of data, of which a fraction is kept, chosen by a hash of the commit."""
    return row.language in DATA_LANGUAGES and row.chance(limits.seed, "data_language") >= limits.data_fraction


def does_not_parse(row: Candidate, limits: Limits) -> bool:
    """The new file is Python 3, JSON or TOML by its name and cannot be parsed."""
    parse = PARSERS.get(row.language)
    if parse is None:
        return False
    try:
        parse(row.new)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    return False


def _parse_python(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as for invalid escapes
        ast.parse(text)


PARSERS: dict[str, Callable[[str], object]] = {
    "Python": _parse_python,
    "JSON": json.loads,
    "TOML": tomllib.loads,
}
