"""The training loop: steps, validation, checkpoints, and every way a run ends."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_ft.checkpoint.train_state import BestCheckpoint, TrainState, ValidationData
from megatron_ft.config.arguments import LENGTHS
from megatron_ft.config.flag import TRANSFORMERS
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME
from megatron_ft.metrics.lines import VALIDATION, read_log
from megatron_ft.training import signals
from megatron_ft.training.batches import BatchReader, sequences_to_evaluate
from megatron_ft.training.run import Run
from megatron_ft.training.schedule import changed_rate, learning_rate
from megatron_ft.training.validation import evaluate
from megatron_ft.weights.directory import iteration_directory


def train(run: Run, step: Callable[[Run], str | None]) -> int:
    """Train to the end, or until something stops the run; returns the exit status.

    `step` takes one optimizer step and returns what stops the run, the same on all ranks. The state
    is saved unless the run ends with an error.
    """
    stop = begin(run)
    while stop is None and not finished(run):
        stop = after_step(run, step(run))
    return end(run, stop)


def begin(run: Run) -> str | None:
    """What comes before the first step; returns what stopped the run, or None."""
    _forget_best_of_other_data(run)
    _log_how_the_run_resumes(run)
    # A run that was stopped during a validation repeats it.
    return _validate_at_start(run) or _validate_if_due(run)


def finished(run: Run) -> bool:
    """Whether no step is left: all are taken, or the run has stopped early."""
    return run.state.iteration >= run.length.iterations or _stopped_early(run)


def after_step(run: Run, stop: str | None) -> str | None:
    """What follows each step: validation and checkpoint where they are due.

    `stop` is what stops the run according to the step; returns the first thing that does, or None.
    """
    stop = stop or _validate_if_due(run) or _exit_interval(run)
    if stop is None and run.checkpointer.due(run.state):
        with run.engine.gathered_weights():
            run.checkpointer.save(run.state)
    run.watchdog.alive()
    return stop


def end(run: Run, stop: str | None) -> int:
    """After the last step of this start: save, and unless something stopped the run, finish it.

    Returns the exit status.
    """
    if stop is None:
        return _finish(run)
    with run.engine.gathered_weights():
        run.checkpointer.save(run.state)
    run.log.event(f"stopped by {stop} at iteration {run.state.iteration}; start the same command again to resume")
    return EXIT_RESUME


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


# --- validation and the best checkpoint ---


def _validate_at_start(run: Run) -> str | None:
    """The validation of --eval-at-start, a baseline before the first step; it is never the best.

    Returns a signal's name if one stopped it.
    """
    if not run.config.validation.at_start or run.state.iteration:
        return None
    records = _evaluate_groups(run, run.valid_batches)
    if records is None:
        return signals.reason()
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
        return signals.reason()
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
            with run.engine.gathered_weights():
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
    with run.engine.gathered_weights():
        for group, reader in groups.items():
            record = evaluate(run, reader)
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


# --- the end ---


def evaluate_only(run: Run) -> int:
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
    with run.engine.gathered_weights():
        run.checkpointer.save(state)
    if run.config.validation.interval and not _validated(state) and not _logged(run, list(run.valid_batches)):
        stop = _validate(run)
    if stop is None and not _logged(run, [f"test {group}" for group in run.test_batches]):
        records = _evaluate_groups(run, run.test_batches)
        stop = signals.reason() if records is None else None
        _log_validations(run, {f"test {group}": record for group, record in (records or {}).items()})
    if stop is not None:
        run.log.event(f"stopped by {stop} after the last step; start the same command again to finish")
        return EXIT_RESUME
    run.log.event(
        f"done: {state.iteration} iterations, {state.consumed_samples} sequences, {state.consumed_tokens} tokens"
    )
    if best := run.checkpointer.saved_best():
        save, how_to_use = run.config.checkpoint.save, "convert it with --iteration best"
        if save and run.config.engine == TRANSFORMERS:  # whose checkpoints are Hugging Face directories
            how_to_use = f"use it as {iteration_directory(Path(save), best.iteration)}"
        run.log.event(f"best: iteration {best.iteration} ({best.data.group} loss {best.loss:.6f}); {how_to_use}")
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
