"""generate.py killed by SIGKILL at random instants gives the samples of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_program
from generate_program import GENERATE, write_data
from tiny_model import write_model

from megatron_ft.evaluation.records import Generation, read_generations, read_records

TASKS = "explain,fixdocs"
SAMPLES = 6
KILLS = 5  # per shard


def command(model: Path, data: Path, output: Path, shard: str) -> list[str]:
    flags = ["--data", str(data), "--languages", "js", "--style", "octocoder", "--tasks", TASKS, "--temperature", "1"]
    more = ["--samples", str(SAMPLES), "--max-length", "400", "--batch-size", "1", "--seed", "3", "--shard", shard]
    return [str(model), *flags, *more, "--output", str(output)]


def samples(output: Path) -> dict[tuple[str, str, int], Generation]:
    tasks = ("explaindescribe", "explainsynthesize", "fixdocs")
    return {(task, *key): found for task in tasks for key, found in read_generations(output, task, "js").items()}


def written(output: Path) -> int:
    return sum(path.stat().st_size for path in output.glob("generations/*"))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_killed_shards_give_the_samples_of_an_uninterrupted_run(shards, tmp_path):
    model, data = write_model(tmp_path / "model"), write_data(tmp_path / "data")
    run_program(GENERATE, *command(model, data, tmp_path / "one", "1/1"))
    expected = samples(tmp_path / "one")
    assert len(expected) == 3 * 3 * SAMPLES
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    output, killed = tmp_path / "killed", 0
    # Shards in turn, and the first again: explainsynthesize needs the descriptions of its own only.
    for shard in [f"{i}/{shards}" for i in range(1, shards + 1)]:
        for _ in range(KILLS):
            killed += kill_while_writing(command(model, data, output, shard), output, draw)
        run_program(GENERATE, *command(model, data, output, shard))
    assert killed >= 2, "no process was killed while it was writing"
    assert samples(output) == expected
    lines = [record for path in output.glob("generations/*") for record in read_records(path, Generation)]
    assert len(lines) == len(expected), "a sample was generated twice"
    size = written(output)
    run_program(GENERATE, *command(model, data, output, f"1/{shards}"))
    assert written(output) == size


def kill_while_writing(arguments: list[str], output: Path, draw: random.Random) -> bool:
    """Kill the program at a random instant after its next record; whether it was still running."""
    before = written(output)
    with subprocess.Popen(
        [sys.executable, str(ROOT / GENERATE), *arguments], stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        while process.poll() is None and written(output) == before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.4))
        running = process.poll() is None
        if running:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return running
