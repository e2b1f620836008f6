"""`Candidate`: a commit row on its way through the rules of a filter."""

from hashlib import blake2b
from operator import itemgetter
from typing import Any

from megatron_ft.commits.languages import language_of
from megatron_ft.commits.row import TEXT_FIELDS
from megatron_ft.files.jsonl_row import NO_KEY, BadRow, keys_of, text_of

REQUIRED = ("commit", "old_file", *TEXT_FIELDS)
REQUIRED_OF, TEXTS_OF = itemgetter(*REQUIRED), itemgetter(*TEXT_FIELDS)
OPTIONAL = ("new_file", "message", "lang", "license", "repos")  # absent: empty


class Candidate:
    """A row whose texts rules look at and cleaning steps change.

    fields: the row as it was read. subject, lower, words: the subject, its lower case and its
    words. old, new: the contents. path: old_file. name: its base name. language: display name; the
    row's own, else by the path.
    """

    __slots__ = ("fields", "subject", "lower", "words", "old", "new", "path", "name", "language")

    def __init__(self, fields: dict[str, Any], line: bytes | None = None):
        """Raises BadRow if a text field is missing or is not a string. `line` is what the row was
        parsed from."""
        try:
            commit, path, old, new, subject = REQUIRED_OF(fields)
        except KeyError as missing:
            raise BadRow(f"{NO_KEY} {missing.args[0]!r}; {keys_of(fields)}") from None
        is_text = type(commit) is type(path) is type(old) is type(new) is type(subject) is str
        # ASCII, which takes no time to find out, has no lone surrogates.
        if not (is_text and new.isascii() and old.isascii() and (commit + path + subject).isascii()):
            for name in REQUIRED:
                text_of(fields, name, line)
        for name in OPTIONAL:
            value = fields.get(name)
            if value is not None and not (type(value) is str and value.isascii()):
                text_of(fields, name, line)
        self.fields, self.path, self.old, self.new = fields, path, old, new
        self.name = path.rpartition("/")[2]
        self.language = fields.get("lang") or language_of(path)
        self.set_subject(subject)

    def set_subject(self, subject: str) -> None:
        self.subject, self.lower, self.words = subject, subject.lower(), subject.split()

    @property
    def message(self) -> str:
        return self.fields.get("message") or ""

    @property
    def is_changed(self) -> bool:
        """Whether a step changed one of the texts, so that the original line is not its row."""
        old, new, subject = TEXTS_OF(self.fields)
        return self.subject != subject or self.new != new or self.old != old

    def row(self) -> dict[str, Any]:
        """The row with its texts as they are now; keys keep their order."""
        return self.fields | dict(zip(TEXT_FIELDS, (self.old, self.new, self.subject), strict=True))

    def chance(self, seed: int, of: str) -> float:
        """A number in [0, 1) from a hash of the seed, the commit and the name of a decision: the
        same in every shard and every order of the rows."""
        key = f"{seed} {of} {self.fields['commit']}".encode(errors="backslashreplace")
        return int.from_bytes(blake2b(key, digest_size=7).digest()) / (1 << 56)
