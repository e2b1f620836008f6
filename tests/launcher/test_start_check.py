"""What files tell is reported before ranks start, and without torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FIXTURES = ROOT / "tests/fixtures"
RUN = """
import runpy, sys
sys.path[0], sys.argv = "", ["launch/finetune.py", *sys.argv[1:]]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code, *sorted({"torch", "megatron.core"} & set(sys.modules)))
"""
COPIED = ("data_inputs_document", "data_targets_document")


@pytest.fixture
def data(tmp_path) -> Path:
    for name in COPIED:
        for suffix in ("idx", "bin"):
            shutil.copy(FIXTURES / f"{name}.{suffix}", tmp_path)
    return tmp_path / "data"


def launch(*words: str | Path) -> tuple[str, str]:
    command = [sys.executable, "-c", RUN, "--tokenizer-file", FIXTURES / "tokenizer.json", "--train-iters", "1", *words]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset tiny --from-scratch --data-prefix nowhere/data", "nowhere/data_inputs_document.bin not found"),
        ("--preset tiny --load nowhere", "nowhere not found"),
        ("--preset tiny --load EMPTY", "neither config.json nor an intact checkpoint"),
        ("--preset santacoder --load MODEL", "but the flags (or --preset) ask for 24; leave the architecture flags"),
    ],
)
def test_wrong_file_is_reported_before_ranks_start(flags, message, data, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = flags.replace("EMPTY", str(tmp_path / "empty")).replace("MODEL", str(FIXTURES / "model"))
    given = [] if "--data-prefix" in flags else ["--data-prefix", data]
    out, error = launch(*flags.split(), *given)
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert out == "2\n"  # the exit status, and no module


def test_file_that_is_no_index_is_named(data):
    index = data.with_name("data_targets_document.idx")
    index.write_text("{}")
    _, error = launch("--preset", "tiny", "--from-scratch", "--data-prefix", data)
    assert f"{index}: " in error and "make it with preprocess/tokenize.py" in error


def test_resumed_run_does_not_need_the_weights_it_started_from(data, tmp_path):
    (tmp_path / "run/iter_0000005").mkdir(parents=True)
    words = ["--preset", "santacoder", "--load", FIXTURES / "model", "--save", tmp_path / "run", "--data-prefix", data]
    assert launch("--check", *words) == ("0\n", "")
