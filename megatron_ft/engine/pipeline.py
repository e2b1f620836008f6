"""Micro-batches through the model by Megatron-Core's pipeline schedule."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_ft.config.config import Config
from megatron_ft.engine.packed_attention import PackedSequences
from megatron_ft.training.batches import MicroBatch


def run_micro_batches(
    config: Config,
    model: list[nn.Module],
    micro_batches: list[MicroBatch],
    loss_of: Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor]],
    *,
    forward_only: bool = False,
) -> Tensor | None:
    """Run the forward pass, and the backward pass unless `forward_only`.

    `loss_of(micro_batch, logits)`, with logits [1, t, vocabulary / TP], returns the loss to
    differentiate and what to report, [...]. Returns the reports [micro-batches, ...] on the last
    pipeline stage, None on the others.
    """

    # The loss computes in fp32 itself, without a copy of the logits. fp32 models have no such flag.
    precision = {"fp32_output": False} if config.precision.bf16 or config.precision.fp16 else {}

    def forward(batches: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Tensor, Callable]:
        micro = next(batches)
        packed = PackedSequences.of(micro.cu_seqlens, micro.lengths, micro.position_ids)
        logits = chunk(micro.tokens, micro.position_ids, None, packed_seq_params=packed, **precision)
        return logits, partial(loss_of, micro)

    reports = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(micro_batches),
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(micro_batches),
        # The sequences of a micro-batch are concatenated to one.
        seq_length=config.data.seq_length * config.training.micro_batch_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return torch.stack(reports) if reports else None
