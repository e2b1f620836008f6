"""What a job does when its ranks end, with stand-ins for srun and scontrol."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SUPERVISE = """
import sys
sys.path.insert(0, {root!r})
from megatron_ft.config.arguments import parse_args
from megatron_ft.errors import run_program
from megatron_ft.launcher.slurm_job import Job
from megatron_ft.launcher.supervise import supervise
job = Job("7", "run", ("node1",), 2, None, 0, {{}})
run_program(lambda: supervise(job, parse_args({flags!r}, world_size=2), ["true"], {{}}))
"""
CHECKED = """echo '{"node": "node1", "problems": [], "software": "the same"}'"""
CANCEL = "kill -TERM $PPID; sleep 0.5"
BOTH_DONE = "for r in 0 1; do echo rank-ended rank=$r node=node1 status=0 time=1.5 >&2; done"
ONE_DONE = "echo rank-ended rank=0 node=node1 status=0 time=1.5 >&2"


def supervised(directory: Path, check: str, ranks: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a job whose srun runs these shell commands."""
    program = directory / "bin/srun"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$*" in *preflight*) {check};; *--job-name=ranks*) {ranks};; esac\n')
    program.chmod(0o755)
    (directory / "tokenizer.json").write_text("{}")
    flags = shlex.split(
        f"--preset tiny --from-scratch --data-prefix d --tokenizer-file {shlex.quote(str(directory))}/tokenizer.json "
        f"--train-iters 3 --global-batch-size 2 --save {shlex.quote(str(directory))}/run"
    )
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "GPUS_PER_NODE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISE.format(root=str(ROOT), flags=flags)],
        capture_output=True, text=True, env=env, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("ranks", "status", "expected"),
    [
        (CANCEL, 75, "ended by SLURM; the newest checkpoint is of iteration 0"),
        (f"{ONE_DONE}; {CANCEL}", 75, "ended by SLURM; the newest checkpoint is of iteration 0"),
        (f"{CANCEL}; exit 143", 143, "ended by SLURM; the newest checkpoint is of iteration 0"),
        (f"{BOTH_DONE}; {CANCEL}", 0, "finished at iteration 0"),
        (BOTH_DONE, 0, "finished at iteration 0"),
    ],
    ids=["before any rank ended", "after one rank ended", "by its signal", "after all ranks finished", "not at all"],
)
def test_a_canceled_job_finished_only_if_every_rank_reported_it(tmp_path, ranks, status, expected):
    ended, out, err = supervised(tmp_path, CHECKED, ranks)
    assert (ended, out.splitlines()[-1].endswith(expected)) == (status, True), out + err


@pytest.mark.parametrize("check", [f"{CANCEL}; exit 1", f"{CHECKED}; {CANCEL}"])
def test_a_job_canceled_while_its_nodes_are_checked_starts_no_ranks_and_blames_no_node(tmp_path, check):
    ended, out, err = supervised(tmp_path, check, "echo the ranks started")
    assert ended == 75 and "ended by SLURM before its ranks started" in out and err == "", out + err
    assert "the ranks started" not in out and "cannot" not in out


@pytest.mark.parametrize("damage", ["a directory", "not UTF-8", "truncated"])
def test_a_damaged_history_of_starts_keeps_no_job_from_running(tmp_path, damage):
    starts = tmp_path / "run/starts.jsonl"
    starts.parent.mkdir()
    if damage == "a directory":
        starts.mkdir()
    else:
        starts.write_bytes(b'{"job": "6"}\n' + (b"\xff\xfe\n" if damage == "not UTF-8" else b'{"job": "6'))
    ended, out, err = supervised(tmp_path, "echo '{\"greeting\": 1}'; " + CHECKED, BOTH_DONE)
    assert ended == 0, out + err
    assert ("launch/status.py will not show this start" in out) == (damage == "a directory")
    assert f"start {1 if damage == 'a directory' else 2}: job 7" in out
    if damage != "a directory":
        assert b'\n{"time": ' in starts.read_bytes(), "the new line is glued to the truncated one"
