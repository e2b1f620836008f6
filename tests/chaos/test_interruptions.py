"""A run that is stopped and killed many times ends with the bytes of the uninterrupted run."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from checkpoint_runs import (
    DROPOUT,
    FLAGS,
    LAYOUTS,
    Ranks,
    final_state,
    iterations_done,
    train,
    wait_for_iteration,
    write_inputs,
)
from ranks import run_ranks

from megatron_ft.weights.directory import list_iterations
from megatron_ft.weights.manifest import check_files, read_manifest

pytestmark = pytest.mark.slow
ITERATIONS = 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def command(layout: str, inputs: str, save: Path, more: str) -> tuple[int, list[str]]:
    ranks, flags = LAYOUTS[layout]
    return ranks, f"{FLAGS} {flags} {inputs} {DROPOUT} --train-iters {ITERATIONS} --save {save} {more}".split()


@pytest.mark.parametrize("layout", ["TP2", "PP2", "DP2"])
@pytest.mark.parametrize("precision", ["--bf16", ""], ids=["bf16", "fp32"])
def test_three_sigterms_and_three_sigkills_change_nothing(inputs, tmp_path, layout, precision):
    more = f"{precision} --save-interval 4 --eval-interval 10 --eval-iters 1"
    ranks, words = command(layout, inputs, tmp_path / "uninterrupted", more)
    assert {status for status, _ in run_ranks(train, ranks, words)} == {0}
    save = tmp_path / "interrupted"
    ranks, words = command(layout, inputs, save, more)
    for number, iteration in ((15, 6), (9, 11), (15, 17), (9, 23), (9, 29), (15, 34)):
        with Ranks(train, ranks, words) as run:
            wait_for_iteration(run, save, iteration)
            run.signal(number)
            ended = run.results()
        if number == signal.SIGTERM:
            assert {status for status, _ in ended} == {75}
            assert (save / "latest_checkpointed_iteration.txt").read_text() == str(iterations_done(save))
        else:
            assert ended == [None] * ranks
    assert {status for status, _ in run_ranks(train, ranks, words)} == {0}
    assert final_state(save) == final_state(tmp_path / "uninterrupted")


def assert_only_complete_checkpoints(save: Path) -> None:
    """Every directory called iter_* contains what its manifest lists."""
    for iteration in list_iterations(save):
        where = save / f"iter_{iteration:07d}"
        assert check_files(where, read_manifest(where), checksums=True) == []


def wait_for_checkpoint(run: Ranks, save: Path, after: int) -> None:
    """Return once a later checkpoint is complete, or the run has ended. The log would not do: a
    killed run leaves lines of steps that the next one repeats."""
    until = time.monotonic() + 300
    while run.running and max(list_iterations(save), default=0) <= after:
        assert time.monotonic() < until, f"no checkpoint after {after}"
        time.sleep(0.01)


def test_25_sigkills_and_damaged_files_change_nothing(inputs, tmp_path):
    save, uninterrupted = tmp_path / "save", tmp_path / "uninterrupted"
    draw = random.Random(20261124)
    more = "--save-interval 1 --keep-last 3 --verify-checkpoint"
    ranks, words = command("DP2", inputs, uninterrupted, more)
    assert {status for status, _ in run_ranks(train, ranks, words)} == {0}
    expected = final_state(uninterrupted)

    died_in_a_save, snapshot = 0, None
    ranks, words = command("DP2", inputs, save, more)
    for kill in range(25):
        before = max(list_iterations(save), default=0)
        with Ranks(train, ranks, words + ["--async-save"] * (kill % 2)) as run:
            if kill % 5:  # most die while training, the others while starting
                wait_for_checkpoint(run, save, before)
            time.sleep(draw.uniform(0, 0.25 if kill % 5 else 2))
            run.signal(signal.SIGKILL)
        assert_only_complete_checkpoints(save)
        assert max(list_iterations(save), default=0) >= before  # no saved checkpoint is lost
        died_in_a_save += any(".writing-" in path.name for path in save.iterdir()) if save.is_dir() else 0
        if snapshot is None and len(list_iterations(save)) >= 3:
            snapshot = tmp_path / "snapshot"
            shutil.copytree(save, snapshot)
    assert died_in_a_save > 0
    assert {status for status, _ in run_ranks(train, ranks, words)} == {0}
    assert final_state(save) == expected

    for trial in range(6):
        shutil.rmtree(save)
        shutil.copytree(snapshot, save)
        damaged = damage(draw, save, checkpoints=1 + trial % 2)
        results = run_ranks(train, ranks, words)
        assert {status for status, _ in results} == {0}
        reasons = "\n".join(results[0][1])
        for file in damaged:
            assert f"{file.parent.name}: " in reasons and file.name in reasons
        assert final_state(save) == expected


def damage(draw: random.Random, save: Path, checkpoints: int) -> list[Path]:
    """Truncate, flip a bit in, or delete a random file of each of the newest checkpoints.

    Returns the files.
    """
    hit = []
    for iteration in list_iterations(save)[:checkpoints]:
        file = draw.choice(sorted((save / f"iter_{iteration:07d}").iterdir()))
        content = bytearray(file.read_bytes())
        match draw.choice(["truncate", "flip", "delete"]):
            case "truncate":
                file.write_bytes(content[: draw.randrange(len(content))])
            case "flip":
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
                file.write_bytes(content)
            case "delete":
                file.unlink()
        hit.append(file)
    return hit


def test_an_error_lists_the_damage_if_every_checkpoint_is_damaged(inputs, tmp_path):
    save = tmp_path / "save"
    ranks, words = command("1", inputs, save, "--save-interval 1 --verify-checkpoint --exit-interval 3")
    assert {status for status, _ in run_ranks(train, ranks, words)} == {75}
    damaged = damage(random.Random(1), save, checkpoints=2)
    ((status, _),) = run_ranks(train, ranks, words)
    assert status.startswith("error: ") and all(file.name in status for file in damaged)
    tracker = json.loads((save / "latest_checkpointed_iteration.txt").read_text())
    assert tracker == 3
