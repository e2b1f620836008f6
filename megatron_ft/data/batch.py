"""Packed samples to a micro-batch: tokens, labels, positions, loss weights and attention bounds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ft.data.packed_dataset import PackedSample


@dataclass
class Batch:
    """A micro-batch of b packed sequences of s tokens.

    tokens, labels, position_ids: int64 [b, s].
    loss_mask: float32 [b, s], the weight of each label.
    segment_ids: int32 [b, s], the document of each token, from 1; 0 is padding.
    cu_seqlens: int32 [n + 1], the bounds of n segments over the b * s concatenated tokens. A token
    attends only within its segment: a document of a packed sequence, or the sequence's padding.
    max_seqlen: tokens of the longest segment.
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
    """Stack samples of s + 1 tokens into a Batch of s tokens; each label is the next token.

    loss_on_targets_only: a label weighs 1 if it is a target token of the same document. Otherwise
      every label that is not padding weighs 1, also the first token of the next document, as in the
      mtf branch.
    norm_target_loss: the weights of each span of consecutive labels with loss are divided by the
      span's length. A span is a document's targets in one packed sequence (without
      loss_on_targets_only: the entire sequence). The branch joins a span at the end of a sequence
      with one at the start of the next; spans here end with the sequence.
    eod_mask_loss: no loss at positions whose token is `eod` (Megatron's rule: the token after the
      end of text is not predicted).
    reset_position_ids: positions restart at 0 in every document.
    reset_attention_mask: without it all documents of a packed sequence are one segment.
    """
    ids = np.stack([sample.tokens for sample in samples])
    segments = np.stack([sample.segment_ids for sample in samples])
    is_inputs = np.stack([sample.is_inputs for sample in samples])
    tokens, segment_ids = ids[:, :-1], segments[:, :-1]
    num_sequences, length = tokens.shape

    starts = np.ones((num_sequences, length), bool)  # of documents, padding and sequences
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]

    has_loss = segments[:, 1:] != 0
    if loss_on_targets_only:
        has_loss &= ~is_inputs[:, 1:] & (segments[:, 1:] == segment_ids)
    if eod_mask_loss:
        has_loss &= tokens != eod
    loss_mask = has_loss.astype(np.float32)
    if norm_target_loss:
        _normalize_spans(loss_mask, has_loss, starts if loss_on_targets_only else None)

    columns = np.arange(length)
    position_ids = np.tile(columns, (num_sequences, 1))
    if reset_position_ids:
        position_ids -= np.maximum.accumulate(np.where(starts, columns, 0), axis=1)

    if not reset_attention_mask:
        padding = segment_ids == 0
        starts[:, 1:] = padding[:, 1:] & ~padding[:, :-1]
    cu_seqlens = np.append(np.flatnonzero(starts), num_sequences * length).astype(np.int32)
    return Batch(
        tokens=_tensor(tokens, np.int64),
        labels=_tensor(ids[:, 1:], np.int64),
        position_ids=_tensor(position_ids, np.int64),
        loss_mask=torch.from_numpy(loss_mask),
        segment_ids=_tensor(segment_ids, np.int32),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
    )


def _normalize_spans(loss_mask: np.ndarray, has_loss: np.ndarray, starts: np.ndarray | None) -> None:
    """Divide each weight, in place, by the number of labels in its span: consecutive labels with
    loss, up to the end of the sequence or the next of `starts`."""
    begins = np.ones_like(has_loss)
    begins[:, 1:] = has_loss[:, 1:] != has_loss[:, :-1]
    if starts is not None:
        begins |= starts
    span = np.cumsum(begins.reshape(-1)) - 1
    loss_mask /= np.bincount(span).astype(np.float32)[span].reshape(loss_mask.shape)


def _tensor(array: np.ndarray, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype))
