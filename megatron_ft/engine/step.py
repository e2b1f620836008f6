"""Megatron-Core's side of a run: one optimizer step, and the losses of validation."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from megatron_ft.checkpoint.train_state import TrainState
from megatron_ft.config.config import Config
from megatron_ft.engine import parallel
from megatron_ft.engine.loss import token_hits, token_losses
from megatron_ft.engine.pipeline import run_micro_batches
from megatron_ft.training.batches import MicroBatch
from megatron_ft.training.run import Run
from megatron_ft.training.schedule import learning_rate
from megatron_ft.training.step import Step


class MegatronCore:
    """The `Engine` of a run: the model of `state` over tensor, pipeline and data-parallel ranks.

    `vocab_size`: columns of the logits that take part in the softmax; None: all, padding included.
    """

    def __init__(self, config: Config, state: TrainState, vocab_size: int | None) -> None:
        self.config, self.state, self.vocab_size = config, state, vocab_size
        self.data_parallel_rank, self.counts = parallel.data_parallel_rank(), parallel.counts_here()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for all chunks."""
        for chunk in self.state.model:
            chunk.eval()
        try:
            yield
        finally:
            for chunk in self.state.model:
                chunk.train()

    @contextlib.contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """--overlap-param-gather gathers weights during the next forward pass; within this context
        they are complete."""
        if not self.config.parallel.overlap_param_gather:
            yield
            return
        for chunk in self.state.model:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in self.state.model:
            chunk.enable_forward_pre_hook()

    def count(self, micro_batches: list[MicroBatch]) -> list[float]:
        """See Engine; empty except on the last pipeline stage."""
        return count_losses(self.config, self.state.model, micro_batches, self.vocab_size)

    def step(self, run: Run) -> str | None:
        """One optimizer step; returns what stops the run (see Step.finish)."""
        config, state, current = run.config, run.state, Step(run)
        parallel.seed_step(config.training.seed, state.iteration)
        weight = current.totals.weight
        losses = forward_backward(config, state.model, state.optimizer, current.micro_batches, weight, self.vocab_size)
        current.agree(losses)
        lr = learning_rate(state.optimizer)
        updated, grad_norm, _ = state.optimizer.step()
        loss_scale = float(state.optimizer.get_loss_scale()) if config.precision.fp16 else 1.0
        return current.finish(lr=lr, updated=updated, grad_norm=grad_norm, loss_scale=loss_scale)


def forward_backward(
    config: Config,
    model: list,
    optimizer,
    micro_batches: list[MicroBatch],
    weight: float,
    vocab_size: int | None,
) -> torch.Tensor:
    """Accumulate the gradients of the step's mean loss in the DDP buffers.

    `weight` is the sum of the loss weights over the global batch. Returns what each micro-batch
    contributes to the mean, [micro-batches] on the device; empty except on the last pipeline stage.

    Megatron's schedule divides a micro-batch's loss by their number, and its DDP averages over
    data-parallel ranks. Both are undone by `scale`, because the contributions already add up to the
    mean.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    scale = len(micro_batches) * parallel.data_parallel_size()

    def loss_of(micro: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = token_losses(logits, micro.labels, vocab_size)
        contribution = (losses * micro.weights).sum() / (weight or 1.0)
        return contribution * scale, contribution.detach().clone()

    contributions = run_micro_batches(config, model, micro_batches, loss_of)
    return torch.empty(0) if contributions is None else contributions


@torch.no_grad()
def count_losses(
    config: Config, model: list[nn.Module], micro_batches: list[MicroBatch], vocab_size: int | None
) -> list[float]:
    """Over this rank's micro-batches: [sum of weighted losses, sum of weights, hits, tokens with
    loss]; empty except on the last pipeline stage."""

    def counts_of(micro: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counted = (micro.loss_mask > 0).double()
        hits = token_hits(logits, micro.labels, vocab_size)
        losses = token_losses(logits, micro.labels, vocab_size)
        sums = [losses.double() * micro.weights, micro.weights.double(), hits * counted, counted]
        return logits.new_zeros(()), torch.stack([x.sum() for x in sums])

    counts = run_micro_batches(config, model, micro_batches, counts_of, forward_only=True)
    return [] if counts is None else counts.sum(0).tolist()
