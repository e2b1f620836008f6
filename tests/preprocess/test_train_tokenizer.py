"""preprocess/train_tokenizer.py: a tokenizer like StarCoder's, the same whatever the threads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program
from tokenizers import Tokenizer

from megatron_ft.tokenizer.tokenizer import load_tokenizer

TRAIN = "preprocess/train_tokenizer.py"
VOCAB_SIZE = 2048


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Training rows of the example commits."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    run_program("dataset/commits_to_jsonl.py", "--input", ROOT / "examples/commits.jsonl", "--output", rows)
    return rows


def train(rows: Path, output: Path, threads: int) -> Path:
    env = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
    run_program(TRAIN, "--input", rows, "--output", output, "--vocab-size", VOCAB_SIZE, env=env)
    return output


@pytest.fixture(scope="module")
def trained(rows, tmp_path_factory) -> Path:
    return train(rows, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", threads=1)


def test_threads_do_not_change_a_byte(rows, trained, tmp_path):
    assert train(rows, tmp_path / "tokenizer.json", threads=2).read_bytes() == trained.read_bytes()


def test_pre_tokenization_is_starcoders(golden, trained):
    ours, theirs = (json.loads(path.read_text()) for path in (trained, golden / "data/tokenizer.json"))
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    assert ours["added_tokens"][:5] == theirs["added_tokens"]


def test_text_survives_a_round_trip(trained):
    tokenizer = load_tokenizer(trained)
    text = "<commit_before>x = 1234  # λ 🙂\n<commit_msg>Änder<commit_after>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.notices == []  # the fast encoder was used


def test_vocabulary_has_the_size_requested_and_special_ids(trained):
    tokenizer = load_tokenizer(trained)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.special_ids["<commit_after>"]) == (VOCAB_SIZE, 0, 17)


def test_special_tokens_are_not_trained_on(trained):
    assert "<com" not in Tokenizer.from_file(str(trained)).get_vocab()


def test_special_tokens_have_starcoders_ids(shared_data, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"inputs": "a b a b", "outputs": "c"}\n')
    done = run_program(TRAIN, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "t.json")
    assert "fewer than the requested 49152" in done.stderr
    ours, theirs = tmp_path / "t.json", shared_data / "starcoder-tokenizer.json"
    assert json.loads(ours.read_text())["added_tokens"] == json.loads(theirs.read_text())["added_tokens"]


@pytest.mark.parametrize(
    "line, flags, message",
    [
        ('{"inputs": "a", "outputs": "b"}', ["--vocab-size", 274], "--vocab-size 274: must be at least 275"),
        ('{"inputs": "a", "outputs": "b"}', ["--vocab-size", 1 << 31], "and below 2^31"),
        ('{"old_contents": "a", "subject": "b"}', [], "line 1: no key 'inputs'"),
        ("", [], "rows.jsonl: no rows"),
    ],
)
def test_usage_errors_report_one_line_and_write_nothing(tmp_path, line, flags, message):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    done = run_program(TRAIN, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "t.json", *flags, ok=False)
    assert message in one_error_line(done)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_training_at_once(tmp_path, stop):
    """The library does not return to the interpreter for seconds; the signal arrives meanwhile."""
    words = [f"w{n * 7919 % 10**6:x}" for n in range(600_000)]
    row = json.dumps({"inputs": " ".join(words), "outputs": "x"})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 4)
    command = [sys.executable, ROOT / TRAIN, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "t.json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not training_has_begun(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)
    assert process.poll() is None, "the training ended before it could be stopped"
    process.send_signal(stop)
    sent = time.monotonic()
    assert process.wait(timeout=60) == -stop and time.monotonic() - sent < 8
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def training_has_begun(pid: int) -> bool:
    """Whether the library is loaded and Python's own handler of SIGINT is removed."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    return b"tokenizers" in Path(f"/proc/{pid}/maps").read_bytes() and not caught & 2
