"""Micro-batches of packed rows for this rank, read ahead by threads while the step before is computed.

Every rank reads its own rows from the memory-mapped data set, so nothing is broadcast. Data-parallel rank r takes, of the step that
starts at `consumed` rows, rows consumed + (m * data_parallel + r) * micro_batch_size + 0, 1, ... for micro-batch m: Megatron's order.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ft.config.config import Config
from megatron_ft.data.batch import Batch, collate
from megatron_ft.engine.loss import loss_weights
from megatron_ft.engine.packed_attention import PackedRow


@dataclass
class MicroBatch:
    """b packed rows laid end to end as one row [1, t], t = b * s, on this rank's device."""

    tokens: Tensor  # int64 [1, t]
    labels: Tensor  # int64 [1, t]
    position_ids: Tensor  # int64 [1, t]
    loss_mask: Tensor  # float32 [1, t]
    weights: Tensor  # float32 [1, t]: what each token's loss weighs in the step's mean
    row: PackedRow
    samples: list[int]  # row numbers in the data set
    weight: float  # sum of `weights`
    loss_tokens: int  # positions whose loss counts, whatever it weighs
    document_tokens: int  # positions that hold documents
    squared_lengths: int  # sum of squared document lengths


class Rows:
    """This rank's micro-batches of one PackedDataset. `whole` data sets (validation) give each row once: rows past the end weigh nothing."""

    def __init__(
        self,
        dataset,
        config: Config,
        eod: int,
        device: torch.device,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
        whole: bool = False,
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.eod = eod
        self.device = device
        self.whole = whole
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._threads = ThreadPoolExecutor(config.memory.num_workers, "rows") if config.memory.num_workers else None
        self._ahead: dict[tuple[int, int], list[Future]] = {}

    def step(self, consumed_samples: int, batch: int, next_batch: int = 0) -> list[MicroBatch]:
        """Micro-batches of the `batch` rows from `consumed_samples` on; `next_batch` rows after them are read meanwhile."""
        waiting = self._ahead.pop((consumed_samples, batch), None)
        self._ahead.clear()
        read = [self._read(s) for s in self._samples(consumed_samples, batch)] if waiting is None else None
        if next_batch and self._threads:
            after = consumed_samples + batch
            self._ahead[(after, next_batch)] = [
                self._threads.submit(self._read, samples) for samples in self._samples(after, next_batch)
            ]
        return [self._to_device(m) for m in (read if waiting is None else (future.result() for future in waiting))]

    def close(self) -> None:
        """End the reading threads."""
        if self._threads:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _samples(self, first: int, batch: int) -> list[list[int]]:
        rows = self.config.training.micro_batch_size
        starts = range(first + self._rank * rows, first + batch, self._size * rows)
        return [list(range(start, start + rows)) for start in starts]

    def _read(self, samples: list[int]) -> MicroBatch:
        config, length = self.config, len(self.dataset)
        batch = collate(
            [self.dataset[i % length if self.whole else i] for i in samples],
            loss_on_targets_only=config.loss.on_targets_only,
            norm_target_loss=config.loss.norm_target,
            eod_mask_loss=config.loss.eod_mask,
            eod=self.eod,
            reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=config.data.reset_attention_mask,
        )
        mask = batch.loss_mask
        if self.whole:
            mask = mask * torch.tensor([[float(i < length)] for i in samples])
        return micro_batch_from(batch, mask, config.loss.average, samples)

    def _to_device(self, micro: MicroBatch) -> MicroBatch:
        if self.device.type == "cpu":
            return micro
        for name in ("tokens", "labels", "position_ids", "loss_mask", "weights"):
            setattr(micro, name, getattr(micro, name).pin_memory().to(self.device, non_blocking=True))
        micro.row.cu_seqlens_q = micro.row.cu_seqlens_kv = micro.row.cu_seqlens_q.to(self.device, non_blocking=True)
        return micro


def micro_batch_from(batch: Batch, loss_mask: Tensor, average: str, samples: list[int]) -> MicroBatch:
    """A collated Batch as one row on the CPU, with `loss_mask` [b, s] in place of its own."""
    weights = loss_weights(loss_mask, average)
    segments = batch.segment_ids.reshape(-1)
    lengths = batch.cu_seqlens.diff().long()
    documents = lengths[segments[batch.cu_seqlens[:-1].long()] > 0]
    return MicroBatch(
        tokens=batch.tokens.reshape(1, -1),
        labels=batch.labels.reshape(1, -1),
        position_ids=batch.position_ids.reshape(1, -1),
        loss_mask=loss_mask.reshape(1, -1),
        weights=weights.reshape(1, -1),
        row=PackedRow.from_cu_seqlens(batch.cu_seqlens),
        samples=samples,
        weight=weights.sum(dtype=torch.float64).item(),
        loss_tokens=int(loss_mask.count_nonzero()),
        document_tokens=int(documents.sum()),
        squared_lengths=int((documents**2).sum()),
    )
