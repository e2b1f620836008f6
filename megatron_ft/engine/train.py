"""The training loop: steps, validation, checkpoints, and every way a run ends."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_ft.checkpoint.checkpointer import Checkpointer
from megatron_ft.checkpoint.train_state import BestCheckpoint, TrainState, ValidationData
from megatron_ft.config.arguments import LENGTHS
from megatron_ft.config.config import Config
from megatron_ft.engine import parallel, signals
from megatron_ft.engine.batches import BatchReader, MicroBatch
from megatron_ft.engine.loss import token_losses
from megatron_ft.engine.nonfinite_loss import write_provenance
from megatron_ft.engine.optimizer import learning_rate
from megatron_ft.engine.pipeline import run_micro_batches
from megatron_ft.engine.schedule import Length, changed_rate, global_batch_at
from megatron_ft.engine.validation import evaluate, sequences_to_evaluate
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, UserError
from megatron_ft.metrics.lines import VALIDATION, read_log
from megatron_ft.metrics.metrics import MetricsLog


@dataclass
class Run:
    """The parts of a training run; run.py builds them.

    `vocab_size`: columns of the logits that take part in the softmax; None: all, padding included.
    `train_batches`: None with --skip-train. `started`: time.monotonic() when the program started.
    """

    config: Config
    vocab_size: int | None
    length: Length
    state: TrainState
    checkpointer: Checkpointer
    log: MetricsLog
    watchdog: signals.Watchdog
    train_batches: BatchReader | None
    valid_batches: dict[str, BatchReader]
    test_batches: dict[str, BatchReader]
    started: float = 0.0


def train(run: Run) -> int:
    """Train to the end, or until something stops the run; returns the exit status.

    The state is saved unless the run ends with an error.
    """
    config, state = run.config, run.state
    if config.validation.skip_train:
        return _evaluate_only(run)
    _forget_best_of_other_data(run)
    _log_how_the_run_resumes(run)
    # A run that was stopped during a validation repeats it.
    stop = _validate_at_start(run) or _validate_if_due(run)
    while stop is None and state.iteration < run.length.iterations and not _stopped_early(run):
        stop = step(run) or _validate_if_due(run) or _exit_interval(run)
        if stop is None and run.checkpointer.due(state):
            with _gathered_weights(run):
                run.checkpointer.save(state)
        run.watchdog.alive()
    if stop is not None:
        with _gathered_weights(run):
            run.checkpointer.save(state)
        run.log.event(f"stopped by {stop} at iteration {state.iteration}; start the same command again to resume")
        return EXIT_RESUME
    return _finish(run)


def _log_how_the_run_resumes(run: Run) -> None:
    """Log if no steps are left, if the run was stopped early, or if the learning rate jumps."""
    config, state, last = run.config, run.state, run.log.last_step
    if state.iteration >= run.length.iterations:
        flag = next(f"--train-{unit}" for unit in LENGTHS if config.value(f"train_{unit}") is not None)
        run.log.event(
            f"nothing to do: {state.iteration} of {run.length.iterations} steps are done; raise {flag} to continue"
        )
    elif _stopped_early(run):
        run.log.event(f"stopped early at {state.iteration}; raise --early-stop-patience, or leave it out, to continue")
    elif last and last["iteration"] == state.iteration and last["global_batch_size"] and last["lr"] is not None:
        if changed_rate(state.scheduler, last["global_batch_size"], last["lr"]):
            rate = learning_rate(state.optimizer)
            run.log.event(f"learning rate continues at {rate:.3e} (the last step used {last['lr']:.3e})")


def _exit_interval(run: Run) -> str | None:
    """`--exit-interval N` if it stops the run after this step, else None."""
    interval, iteration = run.config.logging.exit_interval, run.state.iteration
    due = interval and iteration % interval == 0 and iteration < run.length.iterations
    return f"--exit-interval {interval}" if due else None


# --- a step ---


def step(run: Run) -> str | None:
    """One optimizer step; returns what stops the run (a signal, the time limit), the same on all
    ranks, or None."""
    config, state, reader = run.config, run.state, run.train_batches
    assert reader is not None  # only --skip-train has none
    begun = time.perf_counter()
    batch_size = global_batch_at(config, state.consumed_samples)
    following = state.consumed_samples + batch_size
    next_batch_size = global_batch_at(config, following) if following < run.length.samples else 0
    micro_batches = reader.read(state.consumed_samples, batch_size, next_batch_size)
    sums = ("weight", "loss_tokens", "document_tokens", "squared_lengths")
    weight, loss_tokens, tokens, squared_lengths = parallel.sum_over_data_parallel(
        [sum(getattr(micro, name) for micro in micro_batches) for name in sums]
    )
    parallel.seed_step(config.training.seed, state.iteration)
    losses = forward_backward(config, state.model, state.optimizer, micro_batches, weight, run.vocab_size)
    loss, stop = _agree(run, losses)
    if not math.isfinite(loss):
        _end_nonfinite(run, f"non-finite loss ({loss})", reader, micro_batches, losses)
    lr = learning_rate(state.optimizer)
    updated, grad_norm, _ = state.optimizer.step()
    if updated:
        state.scheduler.step(increment=batch_size)
        if not math.isfinite(grad_norm):
            every = [math.nan] * len(micro_batches)
            _end_nonfinite(run, f"non-finite gradient norm ({grad_norm})", reader, micro_batches, every)
    else:
        state.skipped_iterations += 1
    state.iteration += 1
    state.consumed_samples += batch_size
    state.consumed_tokens += int(tokens)
    run.log.step(
        {
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": state.consumed_tokens,
            "loss": loss if weight else None,
            "lr": lr,
            "grad_norm": grad_norm if updated else None,
            "loss_scale": float(state.optimizer.get_loss_scale()) if config.precision.fp16 else 1.0,
            "global_batch_size": batch_size,
            "loss_tokens": int(loss_tokens),
            "fill_rate": tokens / (batch_size * config.data.seq_length),
            "skipped_iterations": state.skipped_iterations,
            "squared_lengths": squared_lengths,
            "memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "step_seconds": time.perf_counter() - begun,
        }
    )
    return stop


def forward_backward(
    config: Config,
    model: list,
    optimizer,
    micro_batches: list[MicroBatch],
    weight: float,
    vocab_size: int | None,
) -> list[float]:
    """Accumulate the gradients of the step's mean loss in the DDP buffers.

    `weight` is the sum of the loss weights over the global batch. Returns what each micro-batch
    contributes to the mean; empty except on the last pipeline stage.

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
    return [] if contributions is None else contributions.tolist()


def _agree(run: Run, losses: list[float]) -> tuple[float, str | None]:
    """The step's loss and what stops the run, the same on all ranks, by one small all-reduce."""
    minutes = run.config.logging.exit_duration_in_mins
    overtime = minutes is not None and time.monotonic() - run.started > minutes * 60
    local_loss = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
    loss, signaled, any_overtime = parallel.sum_over_all(
        [local_loss if parallel.counts_here() else 0.0, float(signals.received() is not None), float(overtime)]
    )
    if signaled:
        return loss, _signal()
    return loss, f"--exit-duration-in-mins {minutes:g}" if any_overtime else None


def _signal() -> str:
    return signals.received() or "a signal to another rank"


def _end_nonfinite(
    run: Run, what: str, reader: BatchReader, micro_batches: list[MicroBatch], losses: list[float]
) -> NoReturn:
    """End without saving; what led to the non-finite loss or gradient norm is written to a file."""
    iteration = run.state.iteration + 1
    path = write_provenance(
        Path(run.config.checkpoint.save or "."),
        what,
        iteration=iteration,
        consumed_samples=run.state.consumed_samples,
        reader=reader,
        micro_batches=micro_batches,
        losses=losses,
    )
    found = f"{what} at iteration {iteration}; its sequences and documents are in {path}"
    run.log.event(found)
    run.log.close()
    raise UserError(
        f"{found}, and the newest checkpoint is from before it: "
        "lower --lr, remove those documents, or use --bf16 instead of --fp16"
    )


# --- validation and the best checkpoint ---


def _validate_at_start(run: Run) -> str | None:
    """The validation of --eval-at-start, a baseline before the first step; it is never the best.

    Returns a signal's name if one stopped it.
    """
    if not run.config.validation.at_start or run.state.iteration:
        return None
    records = _evaluate_groups(run, run.valid_batches)
    if records is None:
        return _signal()
    _log_validations(run, records)
    return None


def _validate_if_due(run: Run) -> str | None:
    """Validate every group if --eval-interval asks for it; returns the signal that stopped it."""
    state, interval = run.state, run.config.validation.interval
    if not run.valid_batches or not interval or state.iteration == 0 or state.iteration % interval:
        return None
    return None if _validated(state) else _validate(run)


def _validated(state: TrainState) -> bool:
    """Whether the model of this iteration was validated already."""
    return state.best is not None and state.best.validated == state.iteration


def _validate(run: Run) -> str | None:
    """Validate every group, and save the model if it is the best so far."""
    state = run.state
    records = _evaluate_groups(run, run.valid_batches)
    if records is None:
        return _signal()
    _log_validations(run, records)
    data = _validation_data(run)
    loss = records[data.group]["loss"]
    loss = loss if math.isfinite(loss) else math.inf  # a group without target tokens has none
    earlier = state.best
    if earlier is not None and loss >= earlier.loss:
        state.best = earlier.not_improved(state.iteration)
    else:
        state.best = best = BestCheckpoint(data=data, loss=loss, iteration=state.iteration, validated=state.iteration)
        if run.config.checkpoint.save:
            with _gathered_weights(run):
                saved = run.checkpointer.save(state, best=True)
            if not saved:  # later models need not beat one that is not on disk
                on_disk = earlier or replace(best, loss=math.inf)
                state.best = replace(on_disk, waited=0, validated=state.iteration)
    if _stopped_early(run):
        run.log.event(
            f"early stop: {data.group} has not improved for {state.best.waited} validations; "
            f"best {state.best.loss:.6f} at iteration {state.best.iteration}"
        )
    return None


def _evaluate_groups(run: Run, groups: dict[str, BatchReader]) -> dict[str, dict[str, float]] | None:
    """Loss, perplexity and accuracy of every group, or None after a signal."""
    records = {}
    with _gathered_weights(run):
        for group, reader in groups.items():
            record = evaluate(run.config, run.state.model, reader, run.vocab_size, run.watchdog)
            if record is None:
                return None
            records[group] = record
    return records


def _log_validations(run: Run, records: dict[str, dict[str, float]]) -> None:
    for group, record in records.items():
        run.log.validation(run.state.iteration, group, record)


def _validation_data(run: Run) -> ValidationData:
    """The data whose loss decides on the best checkpoint."""
    group = run.config.validation.best_group or next(iter(run.valid_batches))
    reader = run.valid_batches[group]
    tokens = round(reader.dataset.fill_rate * len(reader.dataset) * (run.config.data.seq_length + 1))
    return ValidationData(group, sequences_to_evaluate(run.config, reader), tokens)


def _forget_best_of_other_data(run: Run) -> None:
    best = run.state.best
    if not best or not run.valid_batches:
        return
    was, now = best.data, _validation_data(run)
    if not was.comparable(now):
        run.state.best = None
        run.log.event(
            f"best loss {best.loss:.6f} at iteration {best.iteration} was measured on {was}, validation now uses {now}: "
            "the search for the best checkpoint starts again"
        )


def _stopped_early(run: Run) -> bool:
    patience, best = run.config.validation.early_stop_patience, run.state.best
    return patience is not None and best is not None and best.waited >= patience


@contextlib.contextmanager
def _gathered_weights(run: Run) -> Iterator[None]:
    """--overlap-param-gather gathers weights during the next forward pass; within this context they
    are complete."""
    if not run.config.parallel.overlap_param_gather:
        yield
        return
    for chunk in run.state.model:
        chunk.disable_forward_pre_hook()
    yield
    for chunk in run.state.model:
        chunk.enable_forward_pre_hook()


# --- the end ---


def _evaluate_only(run: Run) -> int:
    """--skip-train: evaluate every validation and test group once; the state does not change."""
    groups = {**run.valid_batches, **{f"test {name}": reader for name, reader in run.test_batches.items()}}
    records = _evaluate_groups(run, groups)
    if records is None:
        run.log.event("stopped by a signal; start the same command again")
        return EXIT_RESUME
    for group, record in records.items():
        run.log.validation(run.log.plan.start_iteration, group, record)
    return EXIT_DONE


def _finish(run: Run) -> int:
    """After the last step: the last checkpoint, the last validation, the test groups."""
    state = run.state
    stop = None
    with _gathered_weights(run):
        run.checkpointer.save(state)
    if run.config.validation.interval and not _validated(state) and not _logged(run, list(run.valid_batches)):
        stop = _validate(run)
    if stop is None and not _logged(run, [f"test {group}" for group in run.test_batches]):
        records = _evaluate_groups(run, run.test_batches)
        stop = _signal() if records is None else None
        _log_validations(run, {f"test {group}": record for group, record in (records or {}).items()})
    if stop is not None:
        run.log.event(f"stopped by {stop} after the last step; start the same command again to finish")
        return EXIT_RESUME
    run.log.event(
        f"done: {state.iteration} iterations, {state.consumed_samples} sequences, {state.consumed_tokens} tokens"
    )
    if best := run.checkpointer.saved_best():
        run.log.event(
            f"best: iteration {best.iteration} ({best.data.group} loss {best.loss:.6f}); "
            "convert it with --iteration best"
        )
    return EXIT_DONE


def _logged(run: Run, groups: list[str]) -> bool:
    """Whether these groups need no evaluation: there are none, or an earlier start of this finished
    run has logged it."""
    done = [not groups]
    if groups and run.config.checkpoint.save and dist.get_rank() == 0:
        lines = read_log(Path(run.config.checkpoint.save), VALIDATION)
        done = [any(line["group"] in groups and line["iteration"] == run.state.iteration for line in lines)]
    dist.broadcast_object_list(done, src=0)
    return done[0]
