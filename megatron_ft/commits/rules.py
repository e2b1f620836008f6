"""The rules of CommitPackFT (arXiv 2308.07124 and its published code), one function each.

A rule is called with a `Candidate` and `Limits` and returns True if the row is to be dropped; a
cleaning step changes the candidate and returns False. Where the published code does not do what it
is meant to, the rule does, and its docstring gives the difference.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ft.commits.candidate import Candidate


@dataclass(frozen=True)
class Limits:
    """Thresholds of the rules; a preset may have others. Sizes of contents are in characters."""

    max_old_chars: int = 49_999
    min_subject_chars: int = 11
    max_subject_chars: int = 999
    min_subject_words: int = 5
    max_subject_words: int = 999
    mass_update_fraction: float = 0.1  # of version bumps, which are many, that are kept
    min_tokens: int = 50
    max_tokens: int = 768
    min_changed_lines: int = 2
    max_changed_lines: int = 200
    min_edit_distance: int = 10
    data_fraction: float = 0.25  # of rows of data languages that are kept
    seed: int = 1234


def _lines_of(file: str) -> list[str]:
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


# Last pieces of the file names that are taken for a language; any for other languages.
EXTENSIONS = {
    "Python": {"py"},
    "Java": {"java"},
    "JavaScript": {"js"},
    "Rust": {"rs"},
    "Go": {"go"},
    "C++": {"cpp"},
    "C": {"c", "h"},
    "HTML": {"html"},
    "XML": {"xml"},
    "Shell": {"sh", "bash", "zsh", "csh", "slurm"},
}
VERBS = frozenset(_lines_of("verbs.txt"))
TWO_WORD_VERBS = tuple(f"{verb} " for verb in sorted(VERBS) if " " in verb)
# Complete subjects, in lower case.
NOISE = frozenset(
    "readme|update|dummy|updated|test|update readme|update readme.md|updated readme.md|updated readme".split("|")
)
JOKES = frozenset(
    (
        "fix that bug where things didn't work but now they should",
        "put the thingie in the thingie",
        "add a beter commit message",
    )
)
VERSION_OR_HASH = re.compile(r"v?\d+\.\d+\.\d+(?=$|\S)|[a-f0-9]+(?:-[a-f0-9]+)*$")
HEX_DIGITS = frozenset("0123456789abcdef")
COMMIT_ID = re.compile(r"[a-f0-9]{40}")
TICKET = re.compile(r"(?:issue|bug|feature)\s*\d")
WIP = re.compile(r"\bwip\b")


def old_too_long(row: Candidate, limits: Limits) -> bool:
    return len(row.old) > limits.max_old_chars


def new_empty(row: Candidate, limits: Limits) -> bool:
    return not row.new


def unchanged(row: Candidate, limits: Limits) -> bool:
    return row.old == row.new


def hash_sign(row: Candidate, limits: Limits) -> bool:
    """The subject has a #, as in issue numbers."""
    return "#" in row.subject


def extension(row: Candidate, limits: Limits) -> bool:
    """The file name has no dot, or its last piece is not one that is taken for the language.

    The published code compares "py" with ".py", so that nine languages lose every row, and takes a
    dot in a directory's name for an extension.
    """
    pieces = row.pieces
    if len(pieces) == 1:
        return True
    allowed = EXTENSIONS.get(row.language)
    return allowed is not None and pieces[-1] not in allowed


def file_name_in_subject(row: Candidate, limits: Limits) -> bool:
    """The subject names the file: contains the last but one dot-separated piece of its name.

    In the published code the empty piece of a name like .vimrc is in every subject.
    """
    pieces = row.pieces
    return len(pieces) > 1 and pieces[-2] != "" and pieces[-2] in row.subject


def subject_length(row: Candidate, limits: Limits) -> bool:
    """Characters or words of the subject are too few or too many."""
    if not limits.min_subject_chars <= len(row.subject) <= limits.max_subject_chars:
        return True
    return not limits.min_subject_words <= len(row.words) <= limits.max_subject_words


def clean_subject(row: Candidate, limits: Limits) -> bool:
    """Remove "[skip ci]", a first word in brackets, then one that ends in a colon, and a last word
    in brackets; single blanks between words. Never drops."""
    subject = row.subject
    if "[" not in subject and ":" not in subject and " ".join(row.words) == subject:
        return False
    words = subject.replace("[skip ci]", "").split() if "[skip ci]" in subject else [*row.words]
    if words and words[0].startswith("[") and words[0].endswith("]"):
        del words[0]
    if words and words[0].endswith(":"):
        del words[0]
    if words and words[-1].startswith("[") and words[-1].endswith("]"):
        del words[-1]
    row.set_subject(" ".join(words))
    return False


def clean_ci_skip(row: Candidate, limits: Limits) -> bool:
    """Remove "[ci skip]". Never drops.

    In the published code two blanks are left where it stood between words.
    """
    if "[ci skip]" in row.subject:
        row.set_subject(" ".join(row.subject.replace("[ci skip]", " ").split()))
    return False


def not_capitalized(row: Candidate, limits: Limits) -> bool:
    """The subject's first character is not an upper-case letter."""
    return not row.subject[:1].isupper()


def no_verb(row: Candidate, limits: Limits) -> bool:
    """The subject does not start with one of the 257 verbs of verbs.txt and a blank.

    In the published list "plug" ends in a blank, so that it takes two.
    """
    first, blank, _ = row.lower.partition(" ")
    return not (blank and first in VERBS) and not row.lower.startswith(TWO_WORD_VERBS)


def noise(row: Candidate, limits: Limits) -> bool:
    return row.lower in NOISE


def noise_phrase(row: Candidate, limits: Limits) -> bool:
    lower = row.lower
    return (
        "auto commit" in lower
        or "update contributing" in lower
        or "<?xml" in lower
        or "merge branch" in lower
        or "merge pull request" in lower
        or "signed-off-by" in lower
    )


def version_or_hash(row: Candidate, limits: Limits) -> bool:
    """The subject is a version or a hash, or its first word starts with a version, as 1.2.3-rc1."""
    lower = row.lower
    if " " in lower and lower[0] != "v" and not lower[0].isdecimal():
        return False  # nearly all; seen faster without the pattern
    return VERSION_OR_HASH.match(lower) is not None


def cherry_pick(row: Candidate, limits: Limits) -> bool:
    return "cherry picked from commit" in row.lower


def commit_id(row: Candidate, limits: Limits) -> bool:
    """The subject has 40 hexadecimal digits."""
    # Any 40 characters in a row include one of these; if none is a digit, there is no id.
    return not HEX_DIGITS.isdisjoint(row.lower[39::40]) and COMMIT_ID.search(row.lower) is not None


def mass_update(row: Candidate, limits: Limits) -> bool:
    """A version bump, of which a fraction is kept, chosen by a hash of the commit and the seed.

    The published code draws without a seed.
    """
    return (
        row.subject.startswith(("Bump", "Set version", "Update version"))
        and row.chance(limits.seed, "mass_update") >= limits.mass_update_fraction
    )


def first_person(row: Candidate, limits: Limits) -> bool:
    lower = row.lower
    return " i " in lower or "i've" in lower or "i'm" in lower


def thanks(row: Candidate, limits: Limits) -> bool:
    return "thanks to" in row.lower and "for" in row.subject


def code_review(row: Candidate, limits: Limits) -> bool:
    """The subject refers to a review, or carries the signature of a bot of Chromium's."""
    lower = row.lower
    return "code review" in lower or "//codereview" in lower or "cdpcp" in lower


def joke(row: Candidate, limits: Limits) -> bool:
    return row.lower in JOKES


def ticket(row: Candidate, limits: Limits) -> bool:
    """The subject has the number of an issue, a bug or a feature."""
    lower = row.lower  # most have none of the words, which is seen faster without the pattern
    return ("issue" in lower or "bug" in lower or "feature" in lower) and TICKET.search(lower) is not None


def work_in_progress(row: Candidate, limits: Limits) -> bool:
    """The subject has "work in progress" or the word "wip".

    The published code looks for "wip" in words, too, and so drops swipe and wipe.
    """
    return "work in progress" in row.lower or ("wip" in row.lower and WIP.search(row.lower) is not None)


def url(row: Candidate, limits: Limits) -> bool:
    return "http://" in row.lower or "https://" in row.lower


def leetcode(row: Candidate, limits: Limits) -> bool:
    return "| leetcode" in row.lower


def few_words(row: Candidate, limits: Limits) -> bool:
    """Fewer than four words are left after cleaning."""
    return len(row.words) < 4
