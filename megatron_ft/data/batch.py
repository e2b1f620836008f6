"""Packed samples to a micro-batch: tokens, labels, positions, loss weights, and where attention has to stop."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ft.data.packed_dataset import PackedSample


@dataclass
class Batch:
    """A micro-batch of b rows of s positions.

    tokens, labels, position_ids: int64 [b, s]. loss_mask: float32 [b, s], the weight of each label. segment_ids: int32 [b, s], document of each
    token (from 1, 0 is padding). cu_seqlens: int32 [n + 1], bounds of the n pieces that attend within themselves alone, over
    the b*s positions of the rows laid end to end: each row's documents, and its padding. max_seqlen: the longest piece.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    segment_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int


def collate(
    samples: Sequence[PackedSample],
    *,
    loss_on_targets_only: bool = True,
    norm_target_loss: bool = False,
    eod_mask_loss: bool = False,
    eod: int = 0,
    reset_position_ids: bool = True,
    reset_attention_mask: bool = True,
) -> Batch:
    """Stack samples of s + 1 tokens into a Batch of s positions, each label being the next token.

    `loss_on_targets_only`: a label weighs 1 where it is an output token of the same document. Without it every label weighs 1 that is not
    padding, also the first token of the next document, as in the mtf branch. `norm_target_loss`: the weights of a document's outputs
    in a row (without `loss_on_targets_only`: of the whole row) are divided by their number; the branch's spans run on into the
    next row where one ends in a loss and the next begins with one, ours end with the row. `eod_mask_loss`: no loss
    at positions whose token is `eod` (Megatron's rule: what comes after end of text is not predicted). Without
    `reset_attention_mask` a row's documents are one piece.
    """
    ids = np.stack([sample.tokens for sample in samples])
    segments = np.stack([sample.segment_ids for sample in samples])
    is_inputs = np.stack([sample.is_inputs for sample in samples])
    tokens, segment_ids = ids[:, :-1], segments[:, :-1]
    rows, length = tokens.shape

    starts = np.ones((rows, length), bool)  # where a document, a row's padding or a row begins
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]

    weighs = segments[:, 1:] != 0
    if loss_on_targets_only:
        weighs &= ~is_inputs[:, 1:] & (segments[:, 1:] == segment_ids)
    if eod_mask_loss:
        weighs &= tokens != eod
    loss_mask = weighs.astype(np.float32)
    if norm_target_loss:
        _share_weight(loss_mask, weighs, starts if loss_on_targets_only else None)

    columns = np.arange(length)
    position_ids = np.tile(columns, (rows, 1))
    if reset_position_ids:
        position_ids -= np.maximum.accumulate(np.where(starts, columns, 0), axis=1)

    if not reset_attention_mask:
        padding = segment_ids == 0
        starts[:, 1:] = padding[:, 1:] & ~padding[:, :-1]
    cu_seqlens = np.append(np.flatnonzero(starts), rows * length).astype(np.int32)
    return Batch(
        tokens=_tensor(tokens, np.int64),
        labels=_tensor(ids[:, 1:], np.int64),
        position_ids=_tensor(position_ids, np.int64),
        loss_mask=torch.from_numpy(loss_mask),
        segment_ids=_tensor(segment_ids, np.int32),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
    )


def _share_weight(loss_mask: np.ndarray, weighs: np.ndarray, starts: np.ndarray | None) -> None:
    """Divide each weight by the number of labels in its span: a run of labels that weigh, ended by a row's end and by `starts`."""
    begins = np.ones_like(weighs)
    begins[:, 1:] = weighs[:, 1:] != weighs[:, :-1]
    if starts is not None:
        begins |= starts
    span = np.cumsum(begins.reshape(-1)) - 1
    loss_mask /= np.bincount(span).astype(np.float32)[span].reshape(loss_mask.shape)


def _tensor(array: np.ndarray, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
