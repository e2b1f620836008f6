"""Collective decisions: rank 0 decides for all; a failure on any rank is raised on every rank."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from megatron_ft.errors import UserError
from megatron_ft.weights.manifest import Damaged

MINUTES = 30  # at least, before a method fails

T = TypeVar("T")


class Collective:
    """All ranks of the run, for decisions and small objects, over gloo and not the accelerators.

    All ranks must call the same methods in the same order. A method waits `timeout_minutes`, and at
    least MINUTES, for the slowest rank, which may be reading or writing its part of a checkpoint on
    a slow file system. A rank that has died is noticed at once.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        timeout = timedelta(minutes=max(MINUTES, timeout_minutes))
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def on_rank_0(self, decide: Callable[[], T]) -> T:
        """Run `decide` on rank 0 only; every rank returns its result, or raises what it raised."""
        outcomes: list[_Outcome[T]] = [_Outcome.of(decide) if self.rank == 0 else _Outcome()]
        dist.broadcast_object_list(outcomes, src=0, group=self._group)
        return outcomes[0].unfold()

    def everywhere(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; returns rank 0's result.

        If it fails anywhere, every rank raises what the first failing rank raised.
        """
        outcomes = self.all_of(_Outcome.of(work))
        return next((outcome for outcome in outcomes if outcome.error), outcomes[0]).unfold()

    def each(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; returns this rank's result, which need not be sent.

        If it fails anywhere, every rank raises what the first failing rank raised.
        """
        outcome = _Outcome.of(work)
        for failed in self.all_of(_Outcome[T](error=outcome.error)):
            failed.unfold()
        return outcome.unfold()

    def all_of(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def to_rank_0(self, value: T) -> list[T]:
        """Every rank's value on rank 0, an empty list on the others."""
        values = [value] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def total(self, number: int) -> int:
        """Sum over ranks."""
        tensor = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(tensor, group=self._group)
        return int(tensor.item())


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What a function returned or raised, to be sent to other ranks."""

    value: T | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, work: Callable[[], T]) -> "_Outcome[T]":
        try:
            return cls(work())
        except (UserError, Damaged) as error:
            return cls(error=error)
        except Exception:  # other exceptions may not survive pickling; their tracebacks do
            return cls(error=RuntimeError(traceback.format_exc()))

    def unfold(self) -> T:
        if self.error:
            raise self.error
        return self.value  # type: ignore[return-value]  # of type T unless there is an error
