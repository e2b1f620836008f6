"""Phrases by category, and which of them a text contains.

A file of phrases has one per line, under the name of its category in brackets:

    # what assistants write about themselves
    [boilerplate]
    as an ai language model
    my programming
    prioritiz*

Case, line breaks and the kind of apostrophe do not matter. A phrase is found only between word
boundaries; a `*` at its end stands for the rest of a word.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import read_small_text

WORD = re.compile(r"\w+")
APOSTROPHES = "\u2019\u2018\u02bc\u00b4"


@dataclass(frozen=True)
class Phrase:
    """One phrase. `core` is its normalized text without the `*`, `words` are its complete words."""

    category: str
    text: str
    core: str
    words: frozenset[str]
    expression: re.Pattern[str]


def normalized(text: str) -> str:
    r"""Text in lower case, with single blanks and straight apostrophes.

    >>> normalized("I\u2019m\n  Sorry")
    "i'm sorry"
    """
    if not text.isascii():
        for apostrophe in APOSTROPHES:
            text = text.replace(apostrophe, "'")
    return " ".join(text.lower().split())


def read_phrases(path: Path) -> list[Phrase]:
    """The phrases of a file in its order; UserError if it cannot be read or holds none."""
    lines = read_small_text(path, "one phrase per line, under [category]").splitlines()
    phrases: dict[str, Phrase] = {}
    category = ""
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("[") and line.endswith("]"):
            category = line[1:-1].strip()
            continue
        if not category:
            raise UserError(f"{path}, line {number}: a phrase without a category; write one above it, as [refusal]")
        phrase = phrase_of(category, line)
        if not WORD.search(phrase.core):
            raise UserError(f"{path}, line {number}: {line[:40]!r} has no word; write a phrase")
        if phrase.text in phrases:
            raise UserError(f"{path}, line {number}: {phrase.text!r} is listed twice; remove one")
        phrases[phrase.text] = phrase
    if not phrases:
        raise UserError(f"{path}: no phrases; expected one per line, under [category]")
    return list(phrases.values())


def phrase_of(category: str, text: str) -> Phrase:
    """The phrase that a line of a file of phrases means."""
    text = normalized(text)
    core = text.removesuffix("*")
    words = WORD.findall(core)
    before = r"(?<!\w)" if WORD.match(core) else ""
    ends_in_word = WORD.match(core[-1:]) is not None
    after = r"(?!\w)" if ends_in_word and text == core else ""
    if ends_in_word and text != core:
        words.pop()  # only the start of a word
    return Phrase(category, text, core, frozenset(words), re.compile(before + re.escape(core) + after))


def phrases_in(text: str, phrases: list[Phrase]) -> list[Phrase]:
    """Those of the phrases that a text contains, in their order.

    >>> bias = phrase_of("moralizing", "your bias")
    >>> [bool(phrases_in(text, [bias])) for text in ("Your  bias!", "add bias to y", "your biases")]
    [True, False, False]
    """
    text = normalized(text)
    words = set(WORD.findall(text))  # a text that lacks one of a phrase's words is not searched for it
    return [phrase for phrase in phrases if phrase.words <= words and phrase.expression.search(text)]
