"""Micro-batches through the model by Megatron-Core's pipeline schedule, for training and validation alike."""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_ft.config.config import Config
from megatron_ft.engine.batches import MicroBatch


def run_micro_batches(
    config: Config,
    model: list[nn.Module],
    micro_batches: list[MicroBatch],
    loss_of: Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor]],
    *,
    forward_only: bool = False,
) -> Tensor | None:
    """Forward, and backward unless `forward_only`. `loss_of(micro_batch, logits [1, t, vocabulary / TP])` gives the loss to
    differentiate and what to report of it, [...]; returns the reports stacked, [micro-batches, ...], None off the last stage."""

    def forward(rows, chunk):
        micro = next(rows)
        logits = chunk(micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed_seq_params)
        return logits, partial(loss_of, micro)

    reports = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(micro_batches),
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(micro_batches),
        seq_length=config.data.seq_length
        * config.training.micro_batch_size,  # a micro-batch's rows lie end to end in one
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return torch.stack(reports) if reports else None
