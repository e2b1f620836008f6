"""Ranks that decide together: what rank 0 finds is what all ranks do, and what fails on one fails on all, at the same line."""

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_ft.errors import UserError
from megatron_ft.weights.manifest import Damaged

MINUTES = 30


class Together:
    """All ranks of the run, talking over gloo: decisions and small objects stay off the accelerators. Every method is collective.

    A method waits `timeout_minutes` for the slowest rank, and never less than MINUTES: it may be reading or writing its part
    of a checkpoint on a slow file system. A rank that has died is noticed at once.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        timeout = timedelta(minutes=max(MINUTES, timeout_minutes))
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def on_rank_0(self, decide: Callable[[], Any]) -> Any:
        """Run `decide` on rank 0; every rank returns its result, or raises what it raised."""
        outcome = [_outcome_of(decide) if self.rank == 0 else None]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        return _unfold(outcome[0])

    def everywhere(self, work: Callable[[], Any]) -> Any:
        """Run `work` on every rank; rank 0's result, or on all ranks what the first failing one raised."""
        outcomes = self.all_of(_outcome_of(work))
        return _unfold(next((outcome for outcome in outcomes if outcome[0] == "raised"), outcomes[0]))

    def all_of(self, value: Any) -> list:
        """Every rank's value, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def to_rank_0(self, value: Any) -> list:
        """Every rank's value on rank 0, an empty list elsewhere."""
        values = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def total(self, number: int) -> int:
        """Sum over ranks."""
        tensor = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(tensor, group=self._group)
        return int(tensor.item())


def _outcome_of(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "returned", work()
    except (UserError, Damaged) as error:
        return "raised", error
    except Exception:  # any other error may not survive being sent; its traceback does
        return "raised", RuntimeError(traceback.format_exc())


def _unfold(outcome: tuple[str, Any]) -> Any:
    kind, value = outcome
    if kind == "raised":
        raise value
    return value
