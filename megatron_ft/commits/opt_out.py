"""Owners of repositories who do not want their code in a dataset."""

from pathlib import Path
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.os_error import remedy


def read_owners(path: str | Path) -> frozenset[str]:
    """The owners listed in a file, one per line, in lower case; # starts a comment.

    Raises UserError if the file cannot be read, or a line is not the name of an owner.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        what_to_do = remedy(error, "give a file with one owner per line")
        raise UserError(f"--opt-out {path}: cannot be read ({error.strerror}); {what_to_do}") from error
    except UnicodeDecodeError:
        raise UserError(f"--opt-out {path}: not text; expected one owner per line") from None
    owners = set()
    for number, line in enumerate(lines, 1):
        owner = line.partition("#")[0].strip()
        if "/" in owner or len(owner.split()) > 1:
            raise UserError(f"--opt-out {path}, line {number}: {owner!r} is not an owner; expected one name per line")
        if owner:
            owners.add(owner.lower())
    return frozenset(owners)


def has_opted_out(fields: dict[str, Any], owners: frozenset[str]) -> bool:
    """Whether an owner of one of the row's repositories is listed; forks do not keep a row.

    >>> has_opted_out({"repos": "fork/a, Jane/a"}, frozenset({"jane"}))
    True
    """
    repos = fields.get("repos") or ""
    return any(repo.strip().partition("/")[0].lower() in owners for repo in repos.split(","))
