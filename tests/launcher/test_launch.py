"""launch/finetune.py outside SLURM: what it checks, what it starts, how it reports failures."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, one_error_line, run_program

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.training.signals import STOP_SIGNALS

LAUNCHED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from megatron_ft.launcher.local_ranks import local_environment, run_local_ranks
sys.exit(run_local_ranks([sys.executable, "-u", "-c", Path({ranks!r}).read_text()], 2, local_environment(2, {gpus}), Path({logs!r})))
"""


@pytest.fixture
def flags(tmp_path) -> list[str]:
    (tmp_path / "tokenizer.json").write_text("{}")
    for file in (ROOT / "tests/fixtures").glob("data_*_document.*"):
        shutil.copy(file, tmp_path)
    return shlex.split(
        f"--preset tiny --from-scratch --data-prefix {tmp_path}/data --tokenizer-file {tmp_path}/tokenizer.json --train-iters 3"
    )


class Launched:
    """Two ranks that run `code`, started by the launcher in a separate process."""

    def __init__(self, directory: Path, code: str, gpus: int = 0) -> None:
        (directory / "ranks.py").write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + code)
        self.log = directory / "logs" / "rank-001.log"
        program = LAUNCHED.format(
            root=str(ROOT), ranks=str(directory / "ranks.py"), logs=str(directory / "logs"), gpus=gpus
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(self, seconds: float = 30) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, out


def test_the_command_that_dry_run_prints_runs_as_printed(flags, tmp_path):
    shown = run_program("launch/finetune.py", "--dry-run", "--tensor_model_parallel_size=2", *flags).stdout
    assert "WORLD_SIZE=2" in shown and "RANK=0" in shown and "--tensor_model_parallel_size=2" in shown
    assert "--dry-run" not in shown
    shown = run_program("launch/finetune.py", "--dry-run", "--num-processes", "1", *flags).stdout
    environment_only = (
        shown[: shown.index(sys.executable)]
        + f"{sys.executable} -P -c 'import os, megatron_ft.errors; print(os.environ[\"WORLD_SIZE\"])'"
    )
    ran = subprocess.run(["bash", "-c", environment_only], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout == "1\n", ran.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--num-processes", "3", "--tensor-model-parallel-size", "2"], "3 processes cannot be split"),
        (["--num-processes", "0"], "--num-processes 0: must be at least 1"),
        (["--num-procceses", "2"], "unknown flag --num-procceses"),
        (["--learning-rate", "1"], "unknown flag --learning-rate"),
    ],
)
def test_wrong_flags_are_reported_before_anything_starts(flags, wrong, message):
    assert message in one_error_line(run_program("launch/finetune.py", *flags, *wrong, ok=False))


NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use CUDA here")


@NO_CUDA
def test_a_gpu_run_does_not_train_on_the_cpu_instead(flags):
    two = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    line = one_error_line(run_program("launch/finetune.py", *flags, "--bf16", ok=False, env=two))
    assert "cannot use one" in line and "CUDA_VISIBLE_DEVICES= before the command" in line


def test_more_processes_than_gpus_are_refused_before_anything_starts(flags):
    two = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    line = one_error_line(run_program("launch/finetune.py", *flags, "--num-processes", "3", ok=False, env=two))
    assert "--num-processes 3: there are 2 GPUs" in line


@pytest.mark.parametrize(("gpus", "local_rank", "device"), [(2, 1, 1), (1, 3, 0), (2, 2, None)])
def test_each_rank_uses_a_different_gpu(monkeypatch, gpus, local_rank, device):
    from megatron_ft.engine.device import set_up_device

    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    config = Config()
    if device is None:
        with pytest.raises(UserError, match="local rank 2 of 4 .*--num-processes 2"):
            set_up_device(config)
        return
    assert set_up_device(config) == torch.device("cuda", device)
    assert [notice for notice in config.notices if "sees one GPU" in notice] == config.notices
    assert len(config.notices) == (gpus == 1)


def test_only_rank_0_writes_to_the_terminal(tmp_path):
    launched = Launched(tmp_path, "print('hello from', rank, os.environ['MASTER_PORT'].isdigit())")
    assert launched.end() == (0, "hello from 0 True\n")
    assert launched.log.read_text() == "hello from 1 True\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_reaches_every_rank_and_the_status_is_resume(tmp_path, number):
    code = """
def stop(number, frame):
    print('rank', rank, 'saves at', signal.Signals(number).name, flush=True)
    sys.exit(75)
for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(n, stop)
print('ready', flush=True)
time.sleep(30)
"""
    launched = Launched(tmp_path, code)
    assert launched.process.stdout.readline() == "ready\n"
    while not launched.log.exists() or "ready" not in launched.log.read_text():
        time.sleep(0.05)
    launched.process.send_signal(number)
    status, out = launched.end()
    assert status == 75 and out.endswith(f"rank 0 saves at {number.name}\n")
    assert f"rank 1 saves at {number.name}" in launched.log.read_text()


def test_a_failed_rank_ends_all_and_its_traceback_is_printed_last(tmp_path):
    code = """
if rank == 1:
    print('noise before')
    raise RuntimeError('the disk is gone')
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('pid', os.getpid(), flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    status, out = Launched(tmp_path, code).end()
    assert status == 1
    assert out.rstrip().endswith("RuntimeError: the disk is gone")
    assert "rank 1 failed first" in out and "noise before" not in out
    assert time.monotonic() - started < 50  # the other rank sleeps for 60
    with pytest.raises(ProcessLookupError):
        os.kill(int(re.search(r"pid (\d+)", out)[1]), 0)


def test_the_status_of_a_killed_rank_is_128_plus_its_signal(tmp_path):
    status, out = Launched(tmp_path, "if rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)").end()
    assert status == 128 + 9
    assert out.rstrip().endswith("rank 1 was ended by SIGKILL")


def test_an_error_that_every_rank_notices_is_reported_once(tmp_path):
    status, out = Launched(tmp_path, "time.sleep(0.3 * (1 - rank))\nprint('error: no such file')\nsys.exit(2)").end()
    assert (status, out) == (2, "error: no such file\n")


TRAINING = """
from megatron_ft.finetune import run_rank
from megatron_ft.engine import parallel, step as steps
parallel.destroy = lambda: time.sleep(60)  # as NCCL's, while a peer waits in a collective
forward_backward = steps.forward_backward
def breaks(*args):
    if rank == {rank}:
        print('breaks at', time.time(), flush=True)
        raise {error}
    return forward_backward(*args)
steps.forward_backward = breaks
sys.argv[1:] = {flags!r}
run_rank()
"""


@pytest.fixture
def broken_training(golden, tmp_path):
    """Two ranks of real training, one of which raises `error` in its first step.

    Returns (status, output, log of rank 1, seconds from the error to the end).
    """

    def launch(rank: int, error: str, more: str = "") -> tuple[int, str, str, float]:
        flags = [
            *f"--load {golden}/hf/hf_tiny --tokenizer-file {golden}/data/tokenizer.json --data-prefix {golden}/data/short".split(),
            *f"--data-cache-path {tmp_path}/cache --seq-length 128 --train-iters 2 --save {tmp_path}/run {more}".split(),
        ]
        launched = Launched(tmp_path, TRAINING.format(rank=rank, error=error, flags=flags))
        status, out = launched.end(120)
        now, log = time.time(), launched.log.read_text()
        breaks = re.search(r"breaks at ([\d.]+)", out + log)
        assert breaks, out + log
        return status, out, log, now - float(breaks[1])

    return launch


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_the_run_at_once_and_is_named(broken_training, tmp_path, rank):
    status, out, _, seconds = broken_training(rank, "RuntimeError('the rank breaks')")
    assert status == 1 and seconds < 15
    assert ("rank 1 failed first" in out) == (rank == 1)
    assert "RuntimeError: the rank breaks" in out
    assert rank == 0 or out.rstrip().endswith("RuntimeError: the rank breaks")
    assert '"event": "start"' in (tmp_path / "run/events.jsonl").read_text(), "the log was written to disk"


def test_out_of_gpu_memory_is_one_line_with_flags_to_try(broken_training):
    error = "steps.torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 MiB free.')"
    flags = "--micro-batch-size 4 --global-batch-size 4 --tensor-model-parallel-size 2 --recompute-granularity full"
    status, out, log, seconds = broken_training(1, error, flags)
    assert status == 2 and seconds < 15
    line = log.splitlines()[-1]
    assert line.startswith("rank 1: out of GPU memory (after 0 iterations, tried to allocate 2.00 GiB)"), log
    assert "--micro-batch-size 2, or --sequence-parallel, or --lora-rank 16" in line
    assert "--recompute" not in line and "Traceback" not in log
    assert out.rstrip().endswith(line)


@NO_CUDA
def test_preflight_checks_the_torch_that_trains():
    def problems(**variables: str) -> list[str]:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1", **variables}
        return json.loads(run_program("launch/preflight.py", "--gpus", "2", env=env).stdout)["problems"]

    (problem,) = problems()
    assert problem.startswith("torch can use 0 GPUs, 2 needed")
    prints_two = shlex.join([sys.executable, "-c", "print('GPUS 2')"])
    assert problems(CONTAINER_COMMAND=prints_two) == []
    assert "cannot be started" in problems(CONTAINER_COMMAND="/not/there")[0]


def test_preflight_names_what_a_node_lacks(tmp_path):
    (tmp_path / "here").write_text("")
    command = (
        "launch/preflight.py",
        "--save",
        tmp_path / "run",
        "--gpus",
        "9",
        "--need-gb",
        "1e9",
        tmp_path / "here",
        tmp_path / "gone",
    )
    found = json.loads(run_program(*command).stdout)
    missing, gpus, space = found["problems"]
    assert missing == f"{tmp_path}/gone not found"
    assert "usable GPUs, 9 needed" in gpus
    assert "GB free, one checkpoint takes 1000000000.0 GB" in space
    assert "torch" in found["software"] and "checkout" in found["software"]
