"""What files tell is reported before ranks start, and without torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from megatron_ft.weights.manifest import Manifest

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
    length = [] if "--train-epochs" in words else ["--train-iters", "1"]
    command = [sys.executable, "-c", RUN, "--tokenizer-file", FIXTURES / "tokenizer.json", *length, *words]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset tiny --from-scratch --data-prefix nowhere/data", "nowhere/data_inputs_document.bin not found"),
        ("--preset tiny --load nowhere", "nowhere not found"),
        ("--preset tiny --load EMPTY", "neither config.json nor an intact checkpoint"),
        ("--preset santacoder --load MODEL", "but the flags (or --preset) ask for 24; leave the architecture flags"),
        ("--preset tiny --load RUN", "a model with 7 layers, but the flags (or --preset) ask for 4"),
        ("--load OTHER", "; --engine transformers trains other causal models"),
        (
            "--load MODEL --train-epochs 2 --global-batch-size 64",
            "24 packed sequences x 2 epochs do not fill one batch of 64; lower --global-batch-size 64 to 2",
        ),
        ("--load MODEL --tokenizer-file OTHER/tokenizer.json", "made with another tokenizer (tokenizer.json, sha256"),
    ],
)
def test_wrong_file_is_reported_before_ranks_start(flags, message, data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "other/tokenizer.json").write_text((FIXTURES / "tokenizer.json").read_text() + " ")
    shutil.copy(FIXTURES / "data_made_from.json", tmp_path)
    shape = dict(num_layers=7, hidden_size=128, num_attention_heads=4, max_position_embeddings=1024)
    (tmp_path / "run/iter_0000009").mkdir(parents=True)
    Manifest(9, shape, {}, {}, {}).write(tmp_path / "run/iter_0000009")
    (tmp_path / "run/iter_0000009/.metadata").touch()
    named = {
        "EMPTY": tmp_path / "empty",
        "MODEL": FIXTURES / "model",
        "RUN": tmp_path / "run",
        "OTHER": tmp_path / "other",
    }
    for name, place in named.items():
        flags = flags.replace(name, str(place))
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
    out, error = launch("--check", *words)
    assert error == "" and f"; the checkpoints in {tmp_path}/run\n" in out and out.endswith("\n0\n")


def test_check_tells_what_it_found_and_that_the_data_make_few_steps(data):
    words = ["--check", "--load", FIXTURES / "model", "--data-prefix", data, "--train-epochs", "2"]
    out, error = launch(*words, "--global-batch-size", "8", "--save", "my runs/first")
    assert out.splitlines() == [
        f"checked: flags; {data} (64 documents, 6,933 tokens); {FIXTURES}/model (GPTBigCode); 6 steps",
        "status: python launch/status.py 'my runs/first'",
        "0",
    ]
    assert error == (
        "warning: your data make 6 steps (48 packed sequences, 8 per step); lower --global-batch-size 8 to 2\n"
    )
    out, error = launch(*words, "--dry-run")
    assert error == "" and "; 48 steps\ntraining command of each rank: " in out
    assert "-m megatron_ft.finetune --tokenizer-file" in out and "--check" not in out
