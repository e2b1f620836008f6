"""The loss of packed sequences: cross entropy without vocabulary padding, and token weights.

A step's loss is the weighted mean over all tokens of the global batch. Every rank reads its own
sequences, so the sum of the weights is known before the first forward pass, and each micro-batch
adds its part of the mean:

    loss = sum over micro-batches and tokens of weight * cross entropy / sum of all weights

A micro-batch without target tokens has weight 0 and adds nothing, instead of 0 / 0.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ft.engine.cross_entropy import cross_entropy


def token_losses(logits: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
    """Cross entropy of each token, float32 [...], from this rank's logits [..., vocabulary / TP].

    The backward pass overwrites the logits. Columns from `vocab_size` on are padding and get no
    probability; None leaves them in the softmax, as in the mtf branch.
    """
    if vocab_size is not None:
        _hide_padding(logits, vocab_size)
    return cross_entropy(logits, labels)


def _hide_padding(logits: Tensor, vocab_size: int) -> None:
    """Set padding columns to -inf in place, without autograd, so that their probability and their
    gradient are 0."""
    columns = logits.shape[-1]
    first = columns * parallel_state.get_tensor_model_parallel_rank()
    real = min(max(vocab_size - first, 0), columns)
    if real < columns:
        logits.detach()[..., real:].fill_(float("-inf"))


def token_hits(logits: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
    """1.0 where the label has the largest logit over all tensor-parallel ranks, else 0.0.

    float32 [...], from this rank's logits [..., vocabulary / TP]. Call it before `token_losses`.
    """
    if vocab_size is not None:
        _hide_padding(logits, vocab_size)
    columns = logits.shape[-1]
    local = labels - columns * parallel_state.get_tensor_model_parallel_rank()
    ours = (local >= 0) & (local < columns)
    label_logit = logits.gather(-1, local.clamp(0, columns - 1).unsqueeze(-1)).squeeze(-1).float()
    label_logit = torch.where(ours, label_logit, torch.full_like(label_logit, float("-inf")))
    both = torch.stack([logits.max(dim=-1).values.float(), label_logit])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    return (both[1] >= both[0]).float()
