"""Mutated files of a run, its logs, trackers and owner's file, never keep it from resuming.

For these files an error is a failure as well; a run is refused only for a damaged checkpoint. Each
other input ends in success or in one `error:` line with status 2: see workers.py, whose
`check` also tells how to repeat one input.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from minimal import FOREIGN, MINIMAL_JSON
from mutations import json_lines, json_tree, text
from one_input import Reader, program
from test_fuzz_weights import FIXED_TRACKERS
from workers import check

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
LOGS = ("metrics.jsonl", "validation.jsonl", "events.jsonl", "starts.jsonl")
TRACKERS = ("latest_checkpointed_iteration.txt", "best_checkpointed_iteration.txt")
FLAGS = (
    f"--load {FIXTURES}/model --tokenizer-file {FIXTURES}/tokenizer.json --data-prefix {FIXTURES}/data --overlong truncate "
    "--seq-length 64 --micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --eval-interval 0 --num-workers 0 --save-interval 1 "
    "--hidden-dropout 0 --attention-dropout 0"
)


def write_run(directory: Path) -> None:
    """A run of two steps with two checkpoints, as training leaves it, and a best one."""
    train(directory, directory, iterations=2)
    for name in LOGS:
        (directory / name).touch()
    validation = {
        "iteration": 1,
        "group": "valid",
        "loss": 5.0,
        "perplexity": 148.4,
        "token_accuracy": 0.1,
        "tokens": 99,
        "time": 1.7e9,
    }
    (directory / "validation.jsonl").write_text(
        "".join(json.dumps({**validation, "iteration": i}) + "\n" for i in (1, 2))
    )
    starts = [{"time": "2026-01-01 00:00:00", "job": str(job), "nodes": 1} for job in (70, 71)]
    (directory / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (directory / TRACKERS[1]).write_text("1")
    (directory / ".owner.json").write_text(json.dumps(owner()))


def owner() -> dict:
    """An owner on another host that has gone."""
    return {
        "token": "0123456789ab", "host": "another", "namespace": "", "pid": 7, "process_started": "1", "slurm_job": None,
        "slurm_restarts": 0, "since": "2026-01-01 00:00:00",
    }  # fmt: skip


def train(directory: Path, save: Path, iterations: int) -> None:
    """Train on one rank, in this process."""
    from ranks import free_port

    from megatron_ft.finetune import main

    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(single, MASTER_PORT=str(free_port()))
    flags = [
        *FLAGS.split(),
        "--save",
        str(save),
        "--train-iters",
        str(iterations),
        "--data-cache-path",
        str(directory.parent / "cache"),
    ]
    status = main(flags)
    assert status == 0, f"training ended with {status}"


def resume(directory: Path) -> None:
    """The third step, from the newest checkpoint."""
    hurry()
    train(directory, directory, iterations=3)
    newest = json.loads((directory / "iter_0000003/manifest.json").read_bytes())
    assert newest["iteration"] == 3


def resume_or_refuse(directory: Path) -> None:
    """As `resume`; a damaged checkpoint may leave nothing to start from."""
    hurry()
    train(directory, directory, iterations=3)


def hurry() -> None:
    """Do not wait a minute for the heartbeat of an owner on another host."""
    from megatron_ft.checkpoint import lease

    lease.STALE, lease.POLL = 0.05, 0.02


def show_status(directory: Path) -> None:
    """status.py on two runs: a damaged one does not hide the other."""
    os.environ["PATH"] = "/nonexistent"  # no squeue
    other = directory.parent / "runs/other"
    other.mkdir(parents=True)
    shutil.copy(other.parents[2] / "template/metrics.jsonl", other)
    shutil.copytree(directory, directory.parent / "runs/damaged")
    program("launch/status.py", directory.parent / "runs")


def report(directory: Path) -> None:
    from megatron_ft.metrics.report import write_report

    write_report(directory)


def best_and_newest(directory: Path) -> None:
    """What a resume looks up before it loads anything."""
    from megatron_ft.checkpoint.resume import candidates
    from megatron_ft.weights.directory import read_best

    candidates(directory)
    read_best(directory)


def claim(directory: Path) -> None:
    """Take the save directory over; a damaged owner's file is no owner."""
    from megatron_ft.checkpoint.lease import SaveDirectoryLease

    hurry()
    lease = SaveDirectoryLease(directory)
    lease.claim()
    lease.release()


FIXED_LINES = (
    *MINIMAL_JSON.items(), *FOREIGN.items(),
    ("a line that is not UTF-8", b"\xff\xfe\n"),
    ("an object without keys", b"{}\n"),
    ("a number", b"5\n"),
    ("null", b"null\n"),
    ("an iteration as text", b'{"iteration": "1", "event": "start", "group": "valid", "loss": "a", "time": 1}\n'),
    ("an iteration as float", b'{"iteration": 1.5, "event": "start", "train_iters": 2.5, "time": 1}\n'),
    ("a huge iteration", b'{"iteration": 1e400, "event": "start", "train_iters": -1, "time": 1e400}\n'),
    ("an escape sequence", b'{"iteration": 1, "event": "\\u001b[2J\\nforged", "job": "\\u001b[2J", "loss": 1, "time": 1}\n'),
    ("a job with spaces", b'{"job": "7 --help", "time": "now"}\n'),
    ("a job as list", b'{"job": [7], "time": "now"}\n'),
    ("a time before 1970", b'{"iteration": 1, "event": "start", "time": -1e18}\n'),
)  # fmt: skip
FIXED_LOGS = tuple((name, *case) for name in LOGS for case in FIXED_LINES)
LOG_FILES = tuple((name, (json_lines,)) for name in LOGS)
FIXED_OWNERS = (
    *((".owner.json", *case) for case in {**MINIMAL_JSON, **FOREIGN}.items()),
    *(
        (".owner.json", f"{change!r:.60}", json.dumps({**owner(), **change}).encode())
        for change in (
            {"pid": -1}, {"pid": 0}, {"pid": 2**70}, {"pid": "7"}, {"pid": 1.5}, {"pid": None}, {"pid": [1]}, {"host": 5}, {"host": None},
            {"host": os.uname().nodename, "pid": -1}, {"host": os.uname().nodename, "pid": 2**70},
            {"host": os.uname().nodename, "pid": "7"}, {"host": os.uname().nodename, "process_started": []}, {"token": 5}, {"token": None},
            {"slurm_restarts": "1"}, {"slurm_restarts": None}, {"slurm_job": []}, {"since": "\x1b[2J\nerror: forged"}, {"namespace": []},
        )
    ),
)  # fmt: skip
MANIFESTS = (
    ("iter_0000002/manifest.json", (json_tree,)),
    ("iter_0000002/.metadata", ()),
    ("iter_0000002/common.pt", ()),
)

READERS = [
    Reader("logs in status", write_run, show_status, LOG_FILES, FIXED_LOGS, count=200, refuses=False),
    Reader("logs in a report", write_run, report, LOG_FILES[:3], FIXED_LOGS[: 3 * len(FIXED_LINES)], count=200),
    Reader(
        "trackers of a run",
        write_run,
        best_and_newest,
        tuple((name, (text,)) for name in TRACKERS),
        FIXED_TRACKERS,
        refuses=False,
    ),
    Reader("owner", write_run, claim, ((".owner.json", (json_tree,)),), FIXED_OWNERS, refuses=False),
    Reader(
        "resume with logs", write_run, resume, LOG_FILES, FIXED_LOGS[::8], count=30, refuses=False, inputs_per_worker=1
    ),
    Reader(
        "resume with trackers",
        write_run,
        resume,
        tuple((name, (text,)) for name in TRACKERS),
        FIXED_TRACKERS[::8],
        count=10,
        refuses=False,
        inputs_per_worker=1,
    ),
    Reader(
        "resume with an owner",
        write_run,
        resume,
        ((".owner.json", (json_tree,)),),
        FIXED_OWNERS[::8],
        count=10,
        refuses=False,
        inputs_per_worker=1,
    ),
    Reader("resume with a manifest", write_run, resume_or_refuse, MANIFESTS, count=30, inputs_per_worker=1),
]


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_mutated_files_of_a_run_are_read_or_refused(reader: Reader, tmp_path: Path):
    check(reader, tmp_path)
