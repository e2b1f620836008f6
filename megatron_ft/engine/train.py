"""The training loop: steps, validation, checkpoints, and all the ways a run ends."""

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ft.checkpoint.checkpointer import Checkpointer, TrainState
from megatron_ft.config.arguments import LENGTHS
from megatron_ft.config.config import Config
from megatron_ft.engine import parallel, signals
from megatron_ft.engine.batches import BatchReader, MicroBatch
from megatron_ft.engine.loss import token_losses
from megatron_ft.engine.optimizer import learning_rate
from megatron_ft.engine.pipeline import run_micro_batches
from megatron_ft.engine.schedule import Length, changed_rate, global_batch_at
from megatron_ft.engine.validation import evaluate, sequences_to_evaluate
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, UserError
from megatron_ft.files.log_lines import read_lines
from megatron_ft.metrics.metrics import MetricsLog


@dataclass
class Run:
    """Everything a training run is made of; built by finetune.py."""

    config: Config
    vocab_size: int | None  # columns of the logits that take part in the softmax; None: all, padding too
    length: Length
    state: TrainState
    checkpointer: Checkpointer
    log: MetricsLog
    watchdog: signals.Watchdog
    train_batches: BatchReader | None  # None with --skip-train
    valid_batches: dict[str, BatchReader]
    test_batches: dict[str, BatchReader]
    started: float = 0.0  # time.monotonic() at the program's start


def train(run: Run) -> int:
    """Train to the end, or to whatever stops the run first; returns the exit status. The state is saved in every case but an error."""
    config, state = run.config, run.state
    if config.validation.skip_train:
        return _evaluate_only(run)
    _forget_best_of_other_data(run)
    _say_how_it_goes_on(run)
    stop = _validate_at_start(run)
    if stop is None:
        stop = _validate_if_due(run)  # a run stopped during a validation does it again
    while stop is None and state.iteration < run.length.iterations and not _stopped_early(run):
        stop = step(run)
        if stop is None:
            stop = _validate_if_due(run)
        if stop is None and config.logging.exit_interval and state.iteration % config.logging.exit_interval == 0:
            stop = (
                f"--exit-interval {config.logging.exit_interval}" if state.iteration < run.length.iterations else None
            )
        if stop is None and run.checkpointer.due(state):
            with _weights_in_place(run):
                run.checkpointer.save(state)
        run.watchdog.alive()
    if stop is not None:
        with _weights_in_place(run):
            run.checkpointer.save(state)
        run.log.event(f"stopped by {stop} at iteration {state.iteration}; start the same command again to go on")
        return EXIT_RESUME
    return _finish(run)


def _say_how_it_goes_on(run: Run) -> None:
    """What a resumed run should know before its first step: nothing is left, it was stopped early, or its learning rate jumps."""
    config, state, last = run.config, run.state, run.log.last_step
    if state.iteration >= run.length.iterations:
        flag = next(f"--train-{unit}" for unit in LENGTHS if config.value(f"train_{unit}") is not None)
        run.log.event(
            f"nothing to do: {state.iteration} of {run.length.iterations} steps are done; raise {flag} to go on"
        )
    elif _stopped_early(run):
        run.log.event(f"was stopped early at {state.iteration}; raise --early-stop-patience, or leave it out, to go on")
    elif last and last["iteration"] == state.iteration:
        if changed_rate(state.scheduler, last["global_batch_size"], last["lr"]):
            rate = learning_rate(state.optimizer)
            run.log.event(f"learning rate goes on at {rate:.3e} (the last step used {last['lr']:.3e})")


def step(run: Run) -> str | None:
    """One optimizer step; returns what asks the run to stop (a signal, the time limit), the same on all ranks, or None."""
    config, state = run.config, run.state
    begun = time.perf_counter()
    batch = global_batch_at(config, state.consumed_samples)
    following = state.consumed_samples + batch
    next_batch = global_batch_at(config, following) if following < run.length.samples else 0
    micro_batches = run.train_batches.read(state.consumed_samples, batch, next_batch)
    sums = ("weight", "loss_tokens", "document_tokens", "squared_lengths")
    weight, loss_tokens, tokens, squared_lengths = parallel.sum_over_data_parallel(
        [sum(getattr(m, name) for m in micro_batches) for name in sums]
    )
    parallel.seed_step(config.training.seed, state.iteration)
    losses = forward_backward(config, state.model, state.optimizer, micro_batches, weight, run.vocab_size)
    loss, stop = _share(run, losses)
    if not math.isfinite(loss):
        _end_with_provenance(run, f"loss is {loss}", micro_batches, losses)
    lr = learning_rate(state.optimizer)
    updated, grad_norm, _ = state.optimizer.step()
    if updated:
        state.scheduler.step(increment=batch)
        if not math.isfinite(grad_norm):
            _end_with_provenance(run, f"gradient norm is {grad_norm}", micro_batches, [math.nan] * len(micro_batches))
    else:
        state.skipped_iterations += 1
    state.iteration += 1
    state.consumed_samples += batch
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
            "global_batch_size": batch,
            "loss_tokens": int(loss_tokens),
            "fill_rate": tokens / (batch * config.data.seq_length),
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
    """Gradients of the step's mean loss into the DDP buffers; returns each micro-batch's share of the loss (empty off the last stage).

    `weight` is the sum of loss weights over the global batch. Megatron's schedule divides a micro-batch's loss by their number
    and its DDP averages over data-parallel ranks; both are multiplied back, since the shares already add up to the mean.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    scale = len(micro_batches) * parallel.data_parallel_size()

    def loss_of(micro: MicroBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = token_losses(logits, micro.labels, vocab_size)
        share = (losses * micro.weights).sum() / (weight or 1.0)
        return share * scale, share.detach().clone()

    shares = run_micro_batches(config, model, micro_batches, loss_of)
    return [] if shares is None else shares.tolist()


def _share(run: Run, losses: list[float]) -> tuple[float, str | None]:
    """The step's loss and what asks to stop, agreed on by all ranks in one small sum."""
    minutes = run.config.logging.exit_duration_in_mins
    overtime = minutes is not None and time.monotonic() - run.started > minutes * 60
    loss = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
    loss, signalled, overtime = parallel.sum_over_all(
        [loss if parallel.counts_here() else 0.0, float(signals.received() is not None), float(overtime)]
    )
    if signalled:
        return loss, signals.received() or "a signal to another rank"
    return loss, f"--exit-duration-in-mins {minutes:g}" if overtime else None


def _end_with_provenance(run: Run, what: str, micro_batches: list[MicroBatch], losses: list[float]) -> None:
    """Write which rows, documents and files made the loss no number, and end without saving."""
    state = run.state
    ours = [
        {
            "data_parallel_rank": parallel.data_parallel_rank(),
            "micro_batch": number,
            "rows": [{"sample": i, **run.train_batches.dataset.provenance(i)} for i in micro.samples],
        }
        for number, (micro, loss) in enumerate(zip(micro_batches, losses, strict=False))
        if parallel.counts_here() and not math.isfinite(loss)
    ]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    path = Path(run.config.checkpoint.save or ".") / f"nonfinite_loss_iteration_{state.iteration + 1:07d}.json"
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "iteration": state.iteration + 1,
            "consumed_samples": state.consumed_samples,
            "what": what,
            "micro_batches": [entry for entries in everyone for entry in entries],
        }
        path.write_text(json.dumps(record, indent=2) + "\n")
    run.log.event(f"{what} at iteration {state.iteration + 1}; rows and documents in {path}")
    run.log.close()
    raise UserError(
        f"{what} at iteration {state.iteration + 1}; its rows and documents are in {path}, and the checkpoints are from before: "
        "lower --lr, take those documents out, or use --bf16 instead of --fp16"
    )


def _validate_at_start(run: Run) -> str | None:
    """The validation of --eval-at-start: what training starts from, to compare with. It is never the best, and a resumed run has done it."""
    if not run.config.validation.at_start or run.state.iteration:
        return None
    records = _evaluate_groups(run, run.valid_batches)
    if records is None:
        return signals.received() or "a signal to another rank"
    _log_validations(run, records)
    return None


def _validate_if_due(run: Run) -> str | None:
    """Validate every group where --eval-interval says so; returns a signal's name if one came meanwhile."""
    config, state = run.config, run.state
    if (
        not run.valid_batches
        or not config.validation.interval
        or state.iteration == 0
        or state.iteration % config.validation.interval
    ):
        return None
    if state.best and state.best["validated"] == state.iteration:
        return None
    return _validate(run)


def _validate(run: Run) -> str | None:
    config, state = run.config, run.state
    records = _evaluate_groups(run, run.valid_batches)
    if records is None:
        return signals.received() or "a signal to another rank"
    _log_validations(run, records)
    group = _measured_on(run)["group"]
    loss = records[group]["loss"]
    loss = loss if math.isfinite(loss) else math.inf  # a group without output tokens has none
    earlier = state.best
    better = earlier is None or loss < earlier["loss"]
    if better:
        state.best = {**_measured_on(run), "loss": loss, "iteration": state.iteration, "waited": 0}
    else:
        state.best["waited"] += 1
    state.best["validated"] = state.iteration
    if better and config.checkpoint.save:
        with _weights_in_place(run):
            saved = run.checkpointer.save(state, best=True)
        if not saved:  # what is not on the disk is nothing that a later model has to beat
            lost = {**state.best, "loss": math.inf}
            state.best = {**(earlier or lost), "waited": 0, "validated": state.iteration}
    if _stopped_early(run):
        run.log.event(
            f"early stop: {group} has not improved for {state.best['waited']} validations; best {state.best['loss']:.6f} "
            f"at iteration {state.best['iteration']}"
        )
    return None


def _evaluate_groups(run: Run, groups: dict[str, BatchReader]) -> dict[str, dict] | None:
    """Loss, perplexity and accuracy of every group, or None when a signal came in between."""
    records = {}
    with _weights_in_place(run):
        for group, rows in groups.items():
            records[group] = evaluate(run.config, run.state.model, rows, run.vocab_size, run.watchdog)
            if records[group] is None:
                return None
    return records


def _log_validations(run: Run, records: dict[str, dict]) -> None:
    for group, record in records.items():
        run.log.validation(run.state.iteration, group, record)


def _evaluate_only(run: Run) -> int:
    """Every validation and test group once, for --skip-train; the state stays as it was loaded."""
    groups = {**run.valid_batches, **{f"test {name}": rows for name, rows in run.test_batches.items()}}
    records = _evaluate_groups(run, groups)
    if records is None:
        run.log.event("stopped by a signal; start the same command again")
        return EXIT_RESUME
    for group, record in records.items():
        run.log.validation(run.log.plan.start_iteration, group, record)
    return EXIT_DONE


def _measured_on(run: Run) -> dict:
    """What the loss that decides on the best checkpoint is of: losses of other rows or tokens are not compared with it."""
    group = run.config.validation.best_group or next(iter(run.valid_batches))
    dataset = run.valid_batches[group].dataset
    tokens = round(dataset.fill_rate * len(dataset) * (run.config.data.seq_length + 1))
    return {"group": group, "rows": sequences_to_evaluate(run.config, run.valid_batches[group]), "tokens": tokens}


def _forget_best_of_other_data(run: Run) -> None:
    best = run.state.best
    if not best or not run.valid_batches:
        return
    now = _measured_on(run)
    was = {name: best.get(name, value) for name, value in now.items()}
    if was != now:
        run.state.best = None
        of = "group {group} ({rows} rows of a group of {tokens} tokens)"
        run.log.event(
            f"best loss {best['loss']:.6f} at iteration {best['iteration']} is of {of.format(**was)}, validation is now of "
            f"{of.format(**now)}: the best is looked for anew"
        )


def _stopped_early(run: Run) -> bool:
    patience, best = run.config.validation.early_stop_patience, run.state.best
    return patience is not None and best is not None and best["waited"] >= patience


def _finish(run: Run) -> int:
    """Last checkpoint, last validation, test groups."""
    config, state = run.config, run.state
    stop = None
    with _weights_in_place(run):
        run.checkpointer.save(state)
    validated = bool(state.best and state.best["validated"] == state.iteration)
    if config.validation.interval and not validated and not _logged(run, list(run.valid_batches)):
        stop = _validate(run)
    if stop is None and not _logged(run, [f"test {group}" for group in run.test_batches]):
        records = _evaluate_groups(run, run.test_batches)
        stop = None if records is not None else signals.received() or "a signal to another rank"
        _log_validations(run, {f"test {group}": record for group, record in (records or {}).items()})
    if stop is not None:
        run.log.event(f"stopped by {stop} after the last step; start the same command again for what is left")
        return EXIT_RESUME
    run.log.event(f"done: {state.iteration} iterations, {state.consumed_samples} rows, {state.consumed_tokens} tokens")
    if best := run.checkpointer.saved_best():
        run.log.event(
            f"best: iteration {best['iteration']} ({best['group']} loss {best['loss']:.6f}); convert it with --iteration best"
        )
    return EXIT_DONE


def _logged(run: Run, groups: list[str]) -> bool:
    """Whether there is nothing to evaluate: no groups, or an earlier start of this finished run has done it."""
    done = [not groups]
    if groups and run.config.checkpoint.save and dist.get_rank() == 0:
        lines = read_lines(Path(run.config.checkpoint.save) / "validation.jsonl")
        done = [any(line["group"] in groups and line["iteration"] == run.state.iteration for line in lines)]
    dist.broadcast_object_list(done, src=0)
    return done[0]


@contextlib.contextmanager
def _weights_in_place(run: Run):
    """With --overlap-param-gather the weights are gathered as the next forward pass needs them; here, at once."""
    if not run.config.parallel.overlap_param_gather:
        yield
        return
    for chunk in run.state.model:
        chunk.disable_forward_pre_hook()
    yield
    for chunk in run.state.model:
        chunk.enable_forward_pre_hook()
