"""SLURM's variables where SLURM is not: containers, copied shells; and programs that cannot run."""

import os
import sys
from pathlib import Path

import pytest
from conftest import one_error_line, run_program

from megatron_ft.errors import UserError
from megatron_ft.launcher import slurm_job
from megatron_ft.launcher.command import local_gpus, shared_environment
from megatron_ft.launcher.node_check import NodeReport


@pytest.fixture
def flags(tmp_path) -> list[str]:
    (tmp_path / "tokenizer.json").write_text("{}")
    words = f"--preset tiny --from-scratch --data-prefix {tmp_path}/data --tokenizer-file {tmp_path}/tokenizer.json"
    return [*words.split(), "--train-iters", "3", "--save", f"{tmp_path}/run", "--dry-run"]


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a[1-2]"}


def environment(**variables: str) -> dict[str, str]:
    return {"PATH": str(Path(sys.executable).parent), "HOME": "/nonexistent", **variables}


def test_variables_of_a_job_without_slurms_programs_are_one_line_with_what_to_type(flags):
    line = one_error_line(run_program("launch/finetune.py", *flags, ok=False, env=environment(**JOB)))
    assert "SLURM_JOB_ID=7 is set, but scontrol cannot be started" in line
    assert "--num-processes N" in line and "unset SLURM_JOB_ID" in line
    shown = run_program("launch/finetune.py", *flags, "--num-processes", "1", env=environment(**JOB)).stdout
    assert "WORLD_SIZE=1" in shown


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_JOB_ID": "7"}, "SLURM_JOB_NODELIST is missing"),
        ({"SLURM_JOB_ID": "", "SLURM_JOB_NODELIST": "a"}, "the id is not a number"),
        ({"SLURM_JOB_ID": "seven", "SLURM_JOB_NODELIST": "a"}, "the id is not a number"),
        ({**JOB, "SLURM_NTASKS": "many"}, "SLURM_NTASKS=many: expected a number"),
        ({**JOB, "SLURM_NTASKS_PER_NODE": "8(x2)"}, "SLURM_NTASKS_PER_NODE=8(x2): expected a number"),
        ({**JOB, "SLURM_GPUS_ON_NODE": "\u00b3"}, "SLURM_GPUS_ON_NODE=\u00b3: expected a number"),
        ({**JOB, "SLURM_RESTART_COUNT": "9" * 5000}, "expected a number"),
    ],
)
def test_odd_variables_of_a_job_are_user_errors(monkeypatch, variables, message):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_job, "_output", lambda *command: "a1\na2\n" if "hostnames" in command else "")
    with pytest.raises(UserError) as raised:
        slurm_job.Job.from_environment()
    assert message in str(raised.value)


def program(directory: Path, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    (directory / name).chmod(0o755)


def test_output_of_slurm_that_is_not_utf8_is_read(tmp_path, monkeypatch):
    program(tmp_path, "scontrol", b"#!/bin/sh\nprintf 'Comment=caf\\351 Restarts=1\\n'\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm_job.parse_fields(slurm_job._output("scontrol", "show", "job"))["Restarts"] == "1"


@pytest.mark.parametrize("content", [b"not a program", b"#!/nonexistent/sh\n", b"#!/bin/sh\nexit 9\n"])
def test_an_nvidia_smi_that_cannot_run_finds_no_gpus(tmp_path, monkeypatch, content):
    program(tmp_path, "nvidia-smi", content)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local_gpus() == 0


def test_ranks_read_and_print_utf8_whatever_the_locale(monkeypatch):
    monkeypatch.delenv("PYTHONUTF8", raising=False)
    assert shared_environment(1, 0)["PYTHONUTF8"] == "1"
    monkeypatch.setenv("PYTHONUTF8", "0")
    assert shared_environment(1, 0)["PYTHONUTF8"] == "0", "the user's choice is kept"


def test_logs_of_ranks_have_no_colors(monkeypatch):
    monkeypatch.delenv("PYTHON_COLORS", raising=False)
    assert shared_environment(1, 0)["PYTHON_COLORS"] == "0"


@pytest.mark.parametrize(
    "line",
    ["{", "{}", "5", "Welcome", '{"node": 5}', '{"node": "a", "problems": [5], "software": ""}', "[" * 5000],
)
def test_other_output_of_a_node_is_no_report(line):
    assert NodeReport.from_json(line) is None
    report = NodeReport("a", ["disk full"], "Python 3.11")
    assert NodeReport.from_json(report.to_json()) == report
