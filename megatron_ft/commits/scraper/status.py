"""What became of a row of metadata: the statuses of the scraper."""

from collections.abc import Iterable
from enum import StrEnum


class Status(StrEnum):
    """Every row gets one. RETRIED ones are asked for again, and never recorded as done."""

    OK = "ok"
    REPO_GONE = "repo_gone"  # deleted, private or blocked
    COMMIT_GONE = "commit_gone"  # the repository does not have the commit and its parent
    NO_PARENT = "no_parent"  # the first commit of a history
    NOT_MODIFIED = "not_modified"  # the commit adds, deletes or does not touch the file
    SYMLINK_OR_SUBMODULE = "symlink_or_submodule"
    MISSING_BLOB = "missing_blob"  # the repository does not have the file's content
    BINARY = "binary"  # contains a NUL byte
    NOT_UTF8 = "not_utf8"
    LFS_POINTER = "lfs_pointer"  # the content is in Git LFS, not in the repository
    TOO_LARGE = "too_large"
    TIMEOUT = "timeout"
    REFUSED = "refused"  # HTTP 429 or 403, or 401 where others need no login
    SERVER_ERROR = "server_error"  # any other failure: HTTP 5xx, no connection, a truncated answer


RETRIED = frozenset({Status.TIMEOUT, Status.REFUSED, Status.SERVER_ERROR})
# What another repository with the same commit may still have, the best reason first.
ANOTHER_MAY_HAVE = (Status.MISSING_BLOB, Status.COMMIT_GONE, Status.REPO_GONE)


def best(statuses: Iterable[Status]) -> Status:
    """The status of a row after several repositories failed with one of ANOTHER_MAY_HAVE.

    >>> best([Status.REPO_GONE, Status.COMMIT_GONE])
    <Status.COMMIT_GONE: 'commit_gone'>
    """
    return min(statuses, key=ANOTHER_MAY_HAVE.index)
