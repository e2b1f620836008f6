"""Micro-batches of packed sequences for this rank, read ahead by threads during the previous step.

Every rank reads its own sequences from the dataset's files, so nothing is broadcast. In the
step that starts at `consumed_samples`, micro-batch m of data-parallel rank r consists of sequences
consumed_samples + (m * data_parallel_size + r) * micro_batch_size + 0, 1, ...: Megatron's order.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ft.config.config import Config
from megatron_ft.data.batch import Batch, collate
from megatron_ft.data.packed_dataset import PackedDataset


@dataclass
class MicroBatch:
    """b packed sequences, concatenated to one of t = b * s tokens, on this rank's device.

    tokens, labels, position_ids: int64 [1, t].
    loss_mask: float32 [1, t].
    weights: float32 [1, t], the weight of each token's loss in the mean of the step.
    cu_seqlens: int32 [n + 1], the bounds of n documents over the t tokens, for attention.
    lengths: tokens of each of them, on the host.
    samples: the sequences' numbers in the dataset.
    weight: sum of `weights`.
    loss_tokens: tokens with loss, whatever their weight.
    document_tokens: tokens that are not padding.
    squared_lengths: sum of the squared lengths of documents, l^2, or l^2 - (l - W)^2 where they
        exceed a window of W: twice the pairs of tokens that attention computes.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    weights: Tensor
    cu_seqlens: Tensor
    lengths: list[int]
    samples: list[int]
    weight: float
    loss_tokens: int
    document_tokens: int
    squared_lengths: int


class BatchReader:
    """Reads this rank's micro-batches of one PackedDataset.

    `once` (validation): each sequence counts once, so sequences past the end of the dataset, which
    complete the last batch, have weight 0.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        config: Config,
        eod: int,
        device: torch.device,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
        once: bool = False,
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.eod = eod
        self.device = device
        self.once = once
        self._rank, self._size = data_parallel_rank, data_parallel_size
        num_workers = config.memory.num_workers
        self._threads = ThreadPoolExecutor(num_workers, "batches") if num_workers else None
        self._ahead: dict[tuple[int, int], list[Future[MicroBatch]]] = {}

    def read(self, consumed_samples: int, batch_size: int, next_batch_size: int = 0) -> list[MicroBatch]:
        """This rank's micro-batches of the `batch_size` sequences from `consumed_samples` on.

        The `next_batch_size` sequences after them are read in the background.
        """
        ahead = self._ahead.pop((consumed_samples, batch_size), None)
        self._ahead.clear()
        ready: Iterable[MicroBatch]
        if ahead is None:
            ready = [self._read(samples) for samples in self._samples(consumed_samples, batch_size)]
        else:
            ready = (future.result() for future in ahead)
        if next_batch_size and self._threads:
            following = consumed_samples + batch_size
            self._ahead[following, next_batch_size] = [
                self._threads.submit(self._read, samples) for samples in self._samples(following, next_batch_size)
            ]
        return [self._to_device(micro) for micro in ready]

    def read_ahead(self, consumed_samples: int, batch_size: int) -> list[MicroBatch]:
        """What `read` is going to return, still on the CPU: this rank's micro-batches of the
        `batch_size` sequences from `consumed_samples` on."""
        key = consumed_samples, batch_size
        if key not in self._ahead:  # nothing is read in the background
            self._ahead[key] = [_done(self._read(samples)) for samples in self._samples(*key)]
        return [future.result() for future in self._ahead[key]]

    def close(self) -> None:
        """Stop the reading threads."""
        if self._threads:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _samples(self, first: int, batch_size: int) -> list[list[int]]:
        """Numbers of the sequences in each of this rank's micro-batches."""
        size = self.config.training.micro_batch_size
        starts = range(first + self._rank * size, first + batch_size, self._size * size)
        return [list(range(start, start + size)) for start in starts]

    def _read(self, samples: list[int]) -> MicroBatch:
        config, length = self.config, len(self.dataset)
        batch = collate(
            [self.dataset[i % length if self.once else i] for i in samples],
            loss_on_targets_only=config.loss.on_targets_only,
            norm_target_loss=config.loss.norm_target,
            eod_mask_loss=config.loss.eod_mask,
            eod=self.eod,
            reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=config.data.reset_attention_mask,
        )
        mask = batch.loss_mask
        if self.once:
            mask = mask * torch.tensor([[float(i < length)] for i in samples])
        window = config.shape.window_size if config.shape else 0
        return micro_batch_from(batch, mask, config.loss.average, samples, window)

    def _to_device(self, micro: MicroBatch) -> MicroBatch:
        if self.device.type == "cpu":
            return micro
        for name in ("tokens", "labels", "position_ids", "loss_mask", "weights", "cu_seqlens"):
            setattr(micro, name, getattr(micro, name).pin_memory().to(self.device, non_blocking=True))
        return micro


def _done(micro: MicroBatch) -> Future[MicroBatch]:
    future: Future[MicroBatch] = Future()
    future.set_result(micro)
    return future


def micro_batch_from(batch: Batch, loss_mask: Tensor, average: str, samples: list[int], window: int = 0) -> MicroBatch:
    """A collated Batch as a MicroBatch on the CPU; `loss_mask` [b, s] replaces the batch's own.

    `window`: ModelShape.window_size.
    """
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
        cu_seqlens=batch.cu_seqlens,
        lengths=lengths.tolist(),
        samples=samples,
        weight=weights.sum(dtype=torch.float64).item(),
        loss_tokens=int(loss_mask.count_nonzero()),
        document_tokens=int(documents.sum()),
        squared_lengths=int((documents**2).sum() - (documents - window).clamp(min=0).square().sum() * (window > 0)),
    )


def loss_weights(loss_mask: Tensor, average: str) -> Tensor:
    """Weight of each token's loss, float32 [b, s].

    `average` "token": `loss_mask` [b, s] itself; "microbatch": normalized to a sum of 1.
    """
    if average == "token":
        return loss_mask
    total = loss_mask.sum()
    return loss_mask / torch.where(total > 0, total, 1.0)


def sequences_to_evaluate(config: Config, reader: BatchReader) -> int:
    """Sequences of a group that --eval-iters covers."""
    available = len(reader.dataset)
    if config.validation.iters == "full":
        return available
    return min(available, int(config.validation.iters) * config.training.global_batch_size)
