"""Cross entropy of logits that are split over tensor-parallel ranks, in the memory of the logits.

Megatron-Core's own keeps the softmax in fp32 for the backward pass and takes some ten passes over
it; its fused form returns gradients in bf16 only. Here the logits themselves are kept, in their
dtype, and become their gradient in place. What is computed is the same, operation by operation, in
fp32. On a GPU, torch.compile makes one kernel of the forward pass and one of the backward pass; on
the CPU, slices of rows bound the memory.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import jit, parallel_state
from torch import Tensor

ROWS = 64  # tokens whose fp32 logits exist at a time on the CPU


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each token, float32 [...].

    Takes this rank's logits [..., vocabulary / TP] and labels int64 [...]. The backward pass
    overwrites the logits by their gradient, so it can run only once.
    """
    return _CrossEntropy.apply(logits, labels)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        columns = logits.shape[-1]
        flat = logits.reshape(-1, columns)
        local = labels.reshape(-1) - columns * group.rank()
        highest = flat.amax(-1).float()
        if group.size() > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        sums = _sums(flat, local, highest)
        if group.size() > 1:
            dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        ctx.save_for_backward(flat, local, highest, sums[0])
        ctx.shape = logits.shape
        return (sums[0].log() - sums[1]).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        flat, local, highest, total = ctx.saved_tensors
        _to_gradient(flat, local, highest, total, gradients[0].reshape(-1))
        return flat.view(ctx.shape), None


def _sums(logits: Tensor, local: Tensor, highest: Tensor) -> Tensor:
    """This rank's part of the sum of exp(logit - highest), and of the label's logit - highest.

    float32 [2, t], from logits [t, columns], labels counted from this rank's first column [t], and
    the highest logit of each token [t].
    """
    if logits.is_cuda:
        return _compiled_sums(logits, local, highest)
    slices = zip(logits.split(ROWS), local.split(ROWS), highest.split(ROWS), strict=True)
    return torch.cat([_plain_sums(*rows) for rows in slices], 1)


def _plain_sums(logits: Tensor, local: Tensor, highest: Tensor) -> Tensor:
    below = logits.float() - highest[:, None]
    ours = (local >= 0) & (local < logits.shape[-1])
    at_label = below.gather(1, local.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
    return torch.stack([below.exp().sum(-1), torch.where(ours, at_label, 0.0)])


def _to_gradient(logits: Tensor, local: Tensor, highest: Tensor, total: Tensor, gradient: Tensor) -> None:
    """Overwrite logits [t, columns] by (softmax - 1 at the label) * gradient [t]."""
    if logits.is_cuda:
        _compiled_to_gradient(logits, local, highest, total, gradient)
        return
    tensors = (logits, local, highest, total, gradient)
    for rows in zip(*(tensor.split(ROWS) for tensor in tensors), strict=True):
        _plain_to_gradient(*rows)


def _plain_to_gradient(logits: Tensor, local: Tensor, highest: Tensor, total: Tensor, gradient: Tensor) -> None:
    softmax = (logits.float() - highest[:, None]).exp() / total[:, None]
    at_label = torch.arange(logits.shape[-1], device=logits.device) == local[:, None]
    logits.copy_((softmax - at_label.float()) * gradient[:, None])


# Only GPUs run these two: where there is none, set_up_device has turned the fuser off.
_compiled_sums = jit.jit_fuser(_plain_sums)
_compiled_to_gradient = jit.jit_fuser(_plain_to_gradient)
