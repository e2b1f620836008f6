"""The shards of a tokenize.py command, PREFIX-shard-I-of-N of slurm/preprocess.sh: which exist."""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ft.data.documents import TokenizedDocuments
from megatron_ft.data.provenance import Provenance, difference, path_of
from megatron_ft.errors import UserError


def shard_prefix(prefix: str, index: int, count: int) -> str:
    """The prefix of one shard, as in `part` of slurm/preprocess.sh.

    >>> shard_prefix("data/rows", 2, 16)
    'data/rows-shard-2-of-16'
    """
    return f"{prefix}-shard-{index}-of-{count}"


def missing_shards(prefix: str, count: int, expected: Provenance) -> Iterator[tuple[int, str]]:
    """Shards to tokenize, and why: one that does not exist, is damaged, or was made by another
    command than `expected`."""
    for index in range(1, count + 1):
        if reason := _why_missing(shard_prefix(prefix, index, count), replace(expected, shard=(index, count))):
            yield index, reason


def _why_missing(shard: str, expected: Provenance) -> str | None:
    try:
        TokenizedDocuments(shard)
        found = Provenance.read(shard)
    except UserError as error:
        return str(error)
    if found is None:
        return f"{path_of(shard)}: not found, so what the shard was made from is unknown"
    different = difference(expected, found)
    return different and f"{shard}: {different}"
