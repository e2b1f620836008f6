"""Which rows a mix takes: of each source and quota, those with the smallest hashes.

The hash is of the seed and the row's texts, so the choice is independent of the order of the rows
and of how they are split into files, and a smaller quota takes a subset of what a larger one takes.
"""

import heapq
from collections.abc import Mapping

from megatron_ft.errors import UserError
from megatron_ft.files.hash_order import KEY_BYTES
from megatron_ft.mixing.spec import SourceSpec

KEYS = 1 << 8 * KEY_BYTES  # keys are integers from 0 to KEYS - 1
QUOTA_BITS = 16  # of an order key: the number of the quota, which makes keys of different quotas differ


class Smallest:
    """The `count` smallest distinct keys of those added; all of them if `count` is None.

    Only they are in memory, about 150 bytes each, and none if all are taken.
    """

    def __init__(self, count: int | None):
        self.count, self.rows = count, 0
        self._heap: list[int] = []  # negative, so that the largest kept key comes first
        self._kept: set[int] = set()

    def add(self, key: int) -> None:
        """Count a row, and keep its key if it is among the smallest."""
        self.rows += 1
        if self.count is None or key in self._kept:
            return
        if len(self._heap) < self.count:
            heapq.heappush(self._heap, -key)
        elif key < -self._heap[0]:
            self._kept.discard(-heapq.heapreplace(self._heap, -key))
        else:
            return
        self._kept.add(key)

    @property
    def distinct(self) -> int:
        """Keys that are kept, fewer than `count` only if no more were added."""
        return len(self._kept)

    @property
    def end(self) -> int:
        """All keys below this one are taken."""
        return KEYS if self.count is None else (-self._heap[0] + 1 if self._heap else 0)


class Selection:
    """The choice for one source: one `Smallest` for each of its quotas, which have the numbers
    `first` and following among all of the mix."""

    def __init__(self, spec: SourceSpec, first: int):
        self.spec = spec
        self._numbers = {group: first + i for i, group in enumerate(spec.quotas)}
        self.groups = {group: Smallest(count) for group, count in spec.quotas.items()}

    def add(self, group: str, key: int) -> None:
        """Consider a row of a group."""
        self.groups[group].add(key)

    def check(self, others: Mapping[str, int]) -> None:
        """Raise UserError if a quota is larger than what the source has. `others` counts the values
        of `by` that have no quota, for the message."""
        for group, smallest in self.groups.items():
            if smallest.count is None and smallest.rows:
                continue
            if smallest.count is not None and smallest.distinct == smallest.count:
                continue
            of = f" with {self.spec.by} {group}" if self.spec.by else ""
            expected = f"{smallest.count:,}" if smallest.count is not None else "at least one"
            seen = ", ".join(list(others)[:8]) if self.spec.by and not smallest.rows else ""
            raise UserError(
                f"source {self.spec.name}: {smallest.distinct:,} different rows{of}, the mix needs {expected}; lower its "
                f"number or add files{f' (other values of {self.spec.by}: {seen})' if seen else ''}"
            )

    def order_of(self, group: str, key: int) -> bytes | None:
        """The key by which a row of a group is ordered in the mix; None if the row is not taken.

        The keys of a quota are stretched over all keys, so that its rows are spread evenly over the
        mix. Rows of one quota stay in the order of their keys.
        """
        end = self.groups[group].end
        if key >= end:
            return None
        stretched = key * KEYS // end
        return (stretched >> QUOTA_BITS << QUOTA_BITS | self._numbers[group]).to_bytes(KEY_BYTES)
