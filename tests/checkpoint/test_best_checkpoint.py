"""The best checkpoint is kept, marked correctly after failures, and accepted as `best`."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from checkpoint_runs import FLAGS, run, state_and_checkpointer, train, write_inputs
from conversions import convert, refusal
from ranks import run_ranks

TRACKER, BEST = "latest_checkpointed_iteration.txt", "best_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def saved_iterations(save: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in save.glob("iter_*"))


def marks(save: Path) -> list[str | None]:
    return [(save / name).read_text() if (save / name).exists() else None for name in (TRACKER, BEST)]


def save_some(words, steps):
    """Start a run and save at each (iteration, validation loss or None, whether there is space).

    Returns the best checkpoint on disk, and the log.
    """
    from megatron_ft.checkpoint.train_state import BestCheckpoint, ValidationData

    _, state, checkpointer = state_and_checkpointer(words)
    log: list[str] = []
    checkpointer.log = log.append
    checkpointer.start(state)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for iteration, loss, possible in steps:
        state.iteration = iteration
        if loss is not None:
            data = ValidationData("valid")
            state.best = BestCheckpoint(data=data, loss=loss, iteration=iteration, validated=iteration)
        if not possible:  # as under a quota
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        checkpointer.save(state, best=loss is not None)
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    best = checkpointer.saved_best()
    checkpointer.finish()
    return best and best.to_dict(), log


@pytest.mark.parametrize("flags", ["", "--async-save"])
def test_the_best_on_disk_is_kept_if_a_better_one_could_not_be_saved(inputs, tmp_path, flags):
    words = f"{FLAGS} {inputs} --train-iters 20 --keep-last 1 --save {tmp_path} {flags}".split()
    [(best, log)] = run_ranks(save_some, 1, words, [(4, 2.0, True), (8, 1.0, False), (10, None, True)])
    assert any("File too large" in line for line in log)
    assert saved_iterations(tmp_path) == [4, 10] and marks(tmp_path) == ["10", "4"]
    assert (best["iteration"], best["loss"]) == (4, 2.0)
    [(best, _)] = run_ranks(save_some, 1, words, [(12, None, True), (14, 0.5, True), (16, None, True)])
    assert saved_iterations(tmp_path) == [14, 16] and marks(tmp_path) == ["16", "14"] and best["loss"] == 0.5


def train_with_a_full_disk(words, full_at):
    """A run whose save of the best at iteration `full_at` fails for lack of disk space."""
    from megatron_ft.checkpoint.checkpointer import Checkpointer

    save = Checkpointer.save
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_or_not(self, state, *, best=False):
        if best and state.iteration == full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        try:
            return save(self, state, best=best)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    Checkpointer.save = save_or_not
    return train(words)


def test_a_best_that_could_not_be_saved_is_not_compared_with(inputs, tmp_path):
    """From step 5 on the learning rate is 0.

    So iteration 6 is as good as 4, which could not be saved, and better than 2.
    """
    save = tmp_path / "save"
    words = f"{FLAGS} {inputs} --save {save} --train-iters 6 --eval-interval 2 --eval-iters 4 --keep-last 1"
    words += " --lr 1e-3 --lr-decay-style linear --lr-decay-iters 4 --min-lr 0"
    [(status, *_)] = run_ranks(train_with_a_full_disk, 1, words.split(), 4)
    assert status == 0 and marks(save) == ["6", "6"]
    losses = [json.loads(line)["loss"] for line in (save / "validation.jsonl").open()]
    assert losses[0] > losses[1] == losses[2]


def test_tracker_and_best_mark_follow_a_run_that_resumes_from_an_older_checkpoint(inputs, tmp_path):
    save = tmp_path / "save"
    words = f"{FLAGS} {inputs} --train-iters 20 --keep-last 0 --save {save}".split()
    run_ranks(save_some, 1, words, [(4, 2.0, True), (6, None, True), (8, 1.0, True)])
    assert marks(save) == ["8", "8"]
    shutil.rmtree(save / "iter_0000008")
    [(best, _)] = run_ranks(save_some, 1, words, [])  # ends at once
    assert marks(save) == ["6", "4"] and best["iteration"] == 4
    (save / TRACKER).unlink()
    shutil.rmtree(save / "iter_0000004")
    [(best, _)] = run_ranks(save_some, 1, words, [])
    assert marks(save) == ["6", None] and best is None


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> Path:
    """A run of 6 steps whose best is at 4: the learning rate of its last steps makes it worse."""
    save = tmp_path_factory.mktemp("trained") / "save"
    flags = "--eval-interval 2 --eval-iters 4 --keep-last 0 --lr-decay-style constant"
    assert run(inputs, save, f"{flags} --train-iters 6 --exit-interval 4 --lr 1e-3")[0] == 75
    assert run(inputs, save, f"{flags} --train-iters 6 --lr 10 --override-checkpoint-args")[0] == 0
    assert saved_iterations(save) == [2, 4, 6] and marks(save) == ["6", "4"]
    return save


def test_the_last_event_names_the_best(trained):
    events = [json.loads(line)["event"] for line in (trained / "events.jsonl").open()]
    loss = json.loads((trained / "iter_0000004/manifest.json").read_text())["state"]["best"]["loss"]
    assert events[-1] == f"best: iteration 4 (valid loss {loss:.6f}); convert it with --iteration best"


def test_best_is_accepted_wherever_an_iteration_is(trained, inputs, tmp_path):
    out = ("--load", trained, "--iteration", "best")
    convert("megatron_to_hf", *out, "--output", tmp_path / "hf")
    convert("megatron_to_hf", "--load", trained, "--iteration", "4", "--output", tmp_path / "by-number")
    convert("verify", tmp_path / "hf", tmp_path / "by-number")
    convert("verify", trained, tmp_path / "hf", "--iteration-a", "best")
    convert("reshard", *out, "--save", tmp_path / "resharded", "--tensor-parallel", "1")
    assert saved_iterations(tmp_path / "resharded") == [4]
    status, log = run(inputs, tmp_path / "next", f"--load {trained} --load-iteration best --train-iters 1")
    assert status == 0 and f"{trained / 'iter_0000004'}" in log

    unknown = tmp_path / "unknown"
    shutil.copytree(trained, unknown)
    back = ("megatron_to_hf", "--load", unknown, "--output", tmp_path / "x", "--iteration")
    shutil.rmtree(unknown / "iter_0000004")
    assert f"{BEST} names iteration 4; there are iter_0000002, iter_0000006" in refusal(*back, "best")
    (unknown / BEST).unlink()
    assert "so the best checkpoint is unknown" in refusal(*back, "best")
    assert "neither a number, 'release', 'best' nor 'latest'" in refusal(*back, "worst")


def test_readers_take_the_newest_complete_checkpoint_if_the_tracker_is_wrong(trained, inputs, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(trained, save)
    (save / TRACKER).write_text("8")
    os.truncate(save / "iter_0000006/__0_0.distcp", 1000)
    printed = convert("megatron_to_hf", "--load", save, "--output", tmp_path / "hf")
    assert f"{TRACKER} names 8, which does not exist; using the newest intact checkpoint, iteration 4" in printed
    convert("verify", trained, tmp_path / "hf", "--iteration-a", "4")
    status, log = run(inputs, tmp_path / "next", f"--load {save} --train-iters 1")
    assert status == 0 and "using the newest intact checkpoint, iteration 4" in log
    (save / TRACKER).unlink()
    assert "is missing; using the newest intact checkpoint, iteration 4" in convert("verify", save, tmp_path / "hf")
    assert "iteration 8 was asked for" in refusal("verify", save, tmp_path / "hf", "--iteration-a", "8")
