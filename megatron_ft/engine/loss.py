"""The loss of packed rows: cross entropy over the real vocabulary, and how tokens, spans and micro-batches weigh in it.

A step's loss is the weighted mean over all tokens of the global batch. Every rank reads its own rows, so the sum of weights is known
before the first forward pass; each micro-batch then contributes its share of the mean and nothing is divided afterwards:

    loss = sum over micro-batches, tokens of weight x cross entropy / sum of all weights

An empty loss mask has weight 0 and so contributes nothing, rather than 0 / 0.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def loss_weights(loss_mask: Tensor, average: str) -> Tensor:
    """Weight of each token's loss [b, s]: the mask itself ("token"), or summing to 1 over the micro-batch ("microbatch")."""
    if average == "token":
        return loss_mask
    total = loss_mask.sum()
    return loss_mask / torch.where(total > 0, total, 1.0)


def token_losses(logits: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
    """Cross entropy of each token, fp32 [...], from this rank's columns of the logits [..., padded vocabulary / TP], which it overwrites.

    With `vocab_size`, columns from there on are padding and get no probability; None leaves them in the softmax, as the branch does.
    """
    if vocab_size is not None:
        _hide_padding(logits, vocab_size)
    return vocab_parallel_cross_entropy(logits, labels)


def _hide_padding(logits: Tensor, vocab_size: int) -> None:
    """Minus infinity into the padding's columns, in place and unseen by autograd: their probability is 0, so their gradient is too."""
    columns = logits.shape[-1]
    first = columns * parallel_state.get_tensor_model_parallel_rank()
    real = min(max(vocab_size - first, 0), columns)
    if real < columns:
        logits.detach()[..., real:].fill_(float("-inf"))


def token_hits(logits: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
    """1.0 where the label has the largest logit of all tensor-parallel ranks' columns, else 0.0; call before `token_losses`."""
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
