"""Owners of repositories who do not want their code in a dataset."""

from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import read_small_text


def read_owners(path: str | Path) -> frozenset[str]:
    """The owners listed in a file, one per line, in lower case; # starts a comment.

    Raises UserError if the file cannot be read, or a line is not the name of an owner.
    """
    lines = read_small_text(Path(path), "one owner per line").splitlines()
    owners = set()
    for number, line in enumerate(lines, 1):
        owner = line.partition("#")[0].strip()
        if "/" in owner or len(owner.split()) > 1:
            raise UserError(f"--opt-out {path}, line {number}: {owner!r} is not an owner; expected one name per line")
        if owner:
            owners.add(owner.lower())
    return frozenset(owners)


def has_opted_out(repos: str | None, owners: frozenset[str]) -> bool:
    """Whether an owner of one of a row's repositories is listed; forks do not keep a row.

    >>> has_opted_out("fork/a, Jane/a", frozenset({"jane"}))
    True
    """
    return any(repo.strip().partition("/")[0].lower() in owners for repo in (repos or "").split(","))
