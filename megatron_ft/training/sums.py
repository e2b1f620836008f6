"""Sums over all ranks of a run."""

import torch
import torch.distributed as dist


def sum_over_all(values: list[float]) -> list[float]:
    """Element-wise sums over all ranks, in float64; values that several ranks of a model-parallel
    group hold must be 0 except where the engine `counts`."""
    return SumOverAll(values).result()


class SumOverAll:
    """`sum_over_all` on its way, so that the host can queue more work before it waits.

    `on_device`: float64 [values] on the device, added to `values`.
    """

    def __init__(self, values: list[float], on_device: torch.Tensor | None = None) -> None:
        host = torch.tensor(values, dtype=torch.float64)
        if not torch.cuda.is_available():
            self._sums = host if on_device is None else host + on_device
            dist.all_reduce(self._sums)
            return
        # Only copies between pinned memory and the device do not wait for the work before them.
        total = host.pin_memory().to("cuda", non_blocking=True)
        if on_device is not None:
            total += on_device
        dist.all_reduce(total)
        self._sums = torch.empty(host.shape, dtype=host.dtype, pin_memory=True)
        self._sums.copy_(total, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def result(self) -> list[float]:
        """The sums; waits until all ranks have given their values."""
        if torch.cuda.is_available():
            self._copied.synchronize()
        return self._sums.tolist()
