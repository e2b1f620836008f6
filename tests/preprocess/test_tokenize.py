"""preprocess/tokenize.py: the mtf branch's bytes, whatever the workers; no partial output."""

import contextlib
import gzip
import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program
from token_files import training_flags
from tokenize_runs import TOKENIZE, token_bytes, tokenize, write_rows_and_tokenizer

from megatron_ft import progress
from megatron_ft.data.indexed import IndexedReader, field_paths
from megatron_ft.data.packed_dataset import build_datasets
from megatron_ft.data.provenance import tokenizer_warning
from megatron_ft.tokenizer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows_and_tokenizer(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def single(data, tmp_path_factory) -> Path:
    """Prefix of the rows tokenized by one worker."""
    prefix = tmp_path_factory.mktemp("single") / "set"
    tokenize(data, prefix, "--workers", 1)
    return prefix


@pytest.mark.parametrize(
    "rows, flags, reference",
    [("commits", [], "eod"), ("commits_outputs", ["--workers", "1"], "eod"), ("short", [], "short")],
)
def test_bytes_are_those_of_the_mtf_branch(golden, tmp_path, rows, flags, reference):
    tokenizer = ("--tokenizer-file", golden / "data/tokenizer.json")
    files = ("--input", golden / f"data/{rows}.jsonl", "--output-prefix", tmp_path / "set")
    done = run_program(TOKENIZE, *files, *tokenizer, *flags)
    assert token_bytes(tmp_path / "set") == token_bytes(golden / "data" / reference)
    if reference == "eod":
        assert "200 rows" in done.stdout and "<|endoftext|> 2" in done.stdout and not done.stderr


def test_workers_files_and_compression_do_not_change_a_byte(data, single, tmp_path):
    text = (data / "rows.jsonl").read_bytes()
    cut = text.index(b"\n", len(text) // 3) + 1
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(text[:cut])
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(text[cut:]))
    tokenize(data, tmp_path / "set", "--workers", 3, rows=tmp_path / "in")
    assert token_bytes(tmp_path / "set") == token_bytes(single)


def test_standard_input_gives_the_bytes_of_a_file(data, single, tmp_path):
    with open(data / "rows.jsonl", "rb") as rows:
        tokenize(data, tmp_path / "set", rows=Path("-"), stdin=rows)
    assert token_bytes(tmp_path / "set") == token_bytes(single)


def test_end_of_text_is_appended_to_outputs_only(single):
    inputs, outputs = (IndexedReader(field) for field in field_paths(single))
    assert all(outputs[i][-1] == 0 for i in range(len(outputs)))
    assert not all(inputs[i][-1] == 0 for i in range(len(inputs)))


def test_special_tokens_are_parsed_unless_they_are_literal(data, single, tmp_path):
    literal = ("--no-append-eod", "--literal-special-tokens", "<|endoftext|>")
    done = tokenize(data, tmp_path / "set", *literal)
    assert "spelled out" not in done.stdout
    (parsed, _), (_, plain) = ([IndexedReader(f) for f in field_paths(p)] for p in (single, tmp_path / "set"))
    assert any(0 in parsed[i] for i in range(len(parsed)))
    assert not any(0 in plain[i] for i in range(len(plain)))


def test_outputs_that_end_with_end_of_text_are_reported(data, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"inputs": "a", "outputs": "x<|endoftext|>"}\n{"inputs": "a", "outputs": "x"}\n')
    done = tokenize(data, tmp_path / "set", rows=rows)
    assert "1 outputs already ended with an end-of-text token and now have two" in done.stdout
    assert "--no-append-eod" not in done.stdout  # it would be wrong for the other row
    outputs = IndexedReader(field_paths(tmp_path / "set")[1])
    assert [outputs[i][-2] == 0 for i in (0, 1)] == [True, False]
    assert "two" not in tokenize(data, tmp_path / "set", "--no-append-eod", rows=rows).stdout


def test_byte_order_mark_and_blank_lines_are_skipped(data, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('\ufeff{"inputs": "a", "outputs": "x"}\n\n{"inputs": "a", "outputs": "x"}\n\n \n')
    assert "2 rows: " in tokenize(data, tmp_path / "set", rows=rows).stdout


BAD_ROWS = {
    "incomplete JSON, cut off or continued on the next line": b'{"inputs": ',
    "a string, not a JSON object": b'"text"',
    "no key 'inputs'; the row has 'outputs'": b'{"outputs": "x"}',
    "'targets' is an integer, not a string": b'{"inputs": "x", "targets": 5}',
    "'inputs' is empty": b'{"inputs": "", "targets": "x"}',
    "invalid UTF-8": b'{"inputs": "\xff", "targets": "x"}',
    "lone surrogate": b'{"inputs": "\\udead", "targets": "x"}',
}


@pytest.fixture
def bad_rows(tmp_path) -> Path:
    """A file of all BAD_ROWS from line 2 on, between two good rows."""
    good = b'{"inputs": "a b", "targets": "c"}'
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join([good, *BAD_ROWS.values(), good]) + b"\n")
    return tmp_path / "bad.jsonl"


def test_bad_row_stops_with_its_file_and_line(data, bad_rows, tmp_path):
    line = one_error_line(tokenize(data, tmp_path / "set", rows=bad_rows, ok=False))
    assert "bad.jsonl, line 2: incomplete JSON" in line and "--skip-bad-rows" in line
    assert not list(tmp_path.glob("set*"))


def test_skip_bad_rows_rejects_them_with_their_lines_and_reasons(data, bad_rows, tmp_path):
    done = tokenize(data, tmp_path / "set", "--skip-bad-rows", rows=bad_rows)
    rejected = [json.loads(line) for line in (tmp_path / "set_rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == list(enumerate(BAD_ROWS, 2))
    assert rejected[0]["row"] == '{"inputs": ' and rejected[0]["file"] == str(bad_rows)
    assert "2 rows" in done.stdout and "7 bad rows skipped" in done.stdout
    assert all(f"1 {reason}" in done.stdout for reason in BAD_ROWS)
    assert [len(IndexedReader(field)) for field in field_paths(tmp_path / "set")] == [2, 2]


def test_file_of_bad_rows_only_is_an_error(data, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{\n")
    done = tokenize(data, tmp_path / "set", "--skip-bad-rows", rows=tmp_path / "rows.jsonl", ok=False)
    assert "all 1 rows are bad" in one_error_line(done)


def test_rejected_rows_as_input_are_not_overwritten(data, tmp_path):
    rows = tmp_path / "set_rejected.jsonl"
    rows.write_text('{"inputs": "a", "outputs": "x"}\n')
    line = one_error_line(tokenize(data, tmp_path / "set", rows=rows, ok=False))
    assert "input and output" in line and rows.read_text().startswith('{"inputs"')


@pytest.mark.parametrize("form, other", [("file", False), ("directory", False), ("file", True)])
def test_training_and_view_warn_of_another_tokenizer(data, single, tmp_path, form, other):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes((data / "t.json").read_bytes() + b"\n" * other)
    given = tmp_path if form == "directory" else tokenizer
    flags = ("--data-prefix", single, "--data-cache-path", tmp_path / "cache", "--tokenizer-file", given)
    notices = build_datasets(training_flags(*flags, seq_length=512), train_samples=1, pad=0).notices
    field = f"{single}_inputs_document.bin"
    warning = run_program("preprocess/view.py", field, "--tokenizer-file", given, "--sequences", 0).stderr.strip()
    assert ("made with another tokenizer (t.json, sha256 " in warning) == other
    assert ["another tokenizer" in notice for notice in notices] == [True] * other


@pytest.mark.parametrize(
    "flags, message",
    [
        (["missing.jsonl"], "missing.jsonl"),
        (["empty.jsonl"], "empty.jsonl: empty"),
        (["blank.jsonl.gz"], "blank.jsonl.gz: no row"),
        (["ROWS", "--input-key", "prompt"], "line 1: no key 'prompt'"),
        (["ROWS", "--workers", "0"], "--workers 0"),
        (["ROWS", "--shard", "5/4"], "--shard 5/4"),
        (["ROWS", "--literal-special-tokens", "<no>"], "<no>"),
        (["ROWS", "--output-prefix", "/proc/nowhere/x"], "/proc/nowhere/x: cannot be written"),
        (["ROWS", "--tokenizer-file", "ROWS"], "give the tokenizer.json that comes with the model"),
        (["ROWS", "--tokenizer", "x"], "unrecognized arguments: --tokenizer"),
    ],
)
def test_usage_errors_report_one_line_and_write_nothing(data, tmp_path, flags, message):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl.gz").write_bytes(gzip.compress(b""))
    before = sorted(tmp_path.iterdir())
    rows, *others = [str(data / "rows.jsonl") if flag == "ROWS" else flag for flag in flags]
    assert message in one_error_line(tokenize(data, tmp_path / "set", *others, rows=Path(rows), ok=False, cwd=tmp_path))
    assert sorted(tmp_path.iterdir()) == before


STOPS = {
    "interrupt": (signal.SIGINT, 130),
    "terminate": (signal.SIGTERM, 143),
    "kill": (signal.SIGKILL, -9),
    "full disk": (None, 2),
}


@pytest.mark.parametrize("how", STOPS)
def test_stopped_run_leaves_the_previous_output_intact(data, tmp_path, how):
    prefix = tmp_path / "set"
    tokenize(data, prefix)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    number, expected_status = STOPS[how]
    with endless_run(data, prefix, file_limit=None if number else 300_000) as process:
        if number:
            wait_for_tokens(prefix)
            process.send_signal(number)
        stderr = process.stderr.read().decode()
        status = process.wait()
    assert status == expected_status and "Traceback" not in stderr
    assert number or "cannot be written (File too large)" in stderr
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    if how == "kill":  # it had no chance to remove its partial files
        after = {name: content for name, content in after.items() if not name.endswith(".partial")}
    assert after == before
    tokenize(data, prefix)  # removes what a killed run left behind
    assert {file.name for file in tmp_path.iterdir()} == set(before)


@contextlib.contextmanager
def endless_run(data: Path, prefix: Path, file_limit: int | None):
    """A run of tokenize.py whose input does not end.

    With `file_limit`, files cannot grow beyond that many bytes, as on a full disk.
    """

    def limit() -> None:
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    flags = ["--tokenizer-file", data / "t.json", "--output-prefix", prefix, "--workers", "1"]
    command = [str(word) for word in (sys.executable, ROOT / TOKENIZE, "-", *flags)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=limit)
    rows = (data / "rows.jsonl").read_bytes()

    def feed() -> None:
        with contextlib.suppress(OSError):
            while True:
                process.stdin.write(rows)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        yield process
    finally:
        process.kill()
        feeder.join()
        with contextlib.suppress(OSError):
            process.stdin.close()


def wait_for_tokens(prefix: Path) -> None:
    partial = Path(f"{prefix}_inputs_document.bin.partial")
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_log_of_a_long_run_has_a_line_with_rates(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    with progress.Progress("tokenize", 4_000_000, "B") as bar:
        bar.update(1_000_000, "5,000 tokens/s")
    line = capsys.readouterr().err
    assert line.startswith("tokenize: 1.00M/4.00MB, ") and "B/s, 5,000 tokens/s" in line and line.endswith(" left\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["code", "one word", "digits", "emoji"])
def test_lines_of_64_MiB_take_less_than_1_GiB(shared_data, tmp_path, kind):
    text = {"code": "def f(x):\n    return x  # 1\n", "one word": "x", "digits": "7", "emoji": "🙂 a "}[kind]
    repeats = ((63 << 20) // 2) // len(json.dumps(text, ensure_ascii=False).encode())
    side = json.dumps(text * repeats, ensure_ascii=False).encode()
    with open(tmp_path / "rows.jsonl", "wb") as file:
        for _ in range(2):
            file.write(b'{"inputs": ' + side + b', "outputs": ' + side + b"}\n")
    probe = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    flags = ["--tokenizer-file", shared_data / "starcoder-tokenizer.json", "--output-prefix", tmp_path / "set"]
    command = [str(word) for word in (sys.executable, "-c", probe, ROOT / TOKENIZE, tmp_path / "rows.jsonl", *flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("PEAK ")[1]) < 1 << 20  # KiB
    assert len(IndexedReader(field_paths(tmp_path / "set")[0])) == 2


def hf_directory(data: Path, directory: Path, **config: object) -> Path:
    """A Hugging Face directory with the tokenizer of `data`."""
    directory.mkdir(parents=True)
    shutil.copy(data / "t.json", directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_two_ends_are_named_before_rows_are_written(data, tmp_path):
    directory = hf_directory(data, tmp_path / "hf", tokenizer_class="PreTrainedTokenizerFast", eos_token="<fim_pad>")
    done = tokenize(data, tmp_path / "set", "--tokenizer-file", directory)
    [line] = done.stderr.splitlines()
    assert line.startswith(
        "outputs will end in <|endoftext|> (id 0); the tokenizer's own end-of-sequence token is <fim_pad>"
    )
    assert not tokenize(data, tmp_path / "set", "--tokenizer-file", directory, "--no-append-eod").stderr


def test_a_directory_that_transformers_encodes_otherwise_gets_a_warning(data, single, tmp_path):
    directory = hf_directory(data, tmp_path / "hf", tokenizer_class="GPT2TokenizerFast")
    done = tokenize(data, tmp_path / "set", "--tokenizer-file", directory)
    [line] = done.stderr.splitlines()
    assert line.startswith("warning: transformers 5") and "as GPT2Tokenizer, which gives 'a  1' the ids" in line
    assert token_bytes(tmp_path / "set") == token_bytes(single)


def test_a_directory_of_another_size_in_transformers_is_refused(data, tmp_path):
    directory = hf_directory(data, tmp_path / "hf", tokenizer_class="GPT2TokenizerFast", added_tokens_decoder={})
    spec = json.loads((directory / "tokenizer.json").read_text())
    size = len(spec["model"]["vocab"])
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": size, "content": "<|user|>"})
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    error = one_error_line(tokenize(data, tmp_path / "set", "--tokenizer-file", directory, ok=False))
    assert f"{directory}: {size + 1} tokens as Megatron-FT reads it, but {size} as transformers" in error
    assert not list(tmp_path.glob("set*"))


def test_tokens_of_other_files_are_encoded_and_recognized_in_the_provenance(data, tmp_path):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|user|>"]}
    directory = hf_directory(data, tmp_path / "hf", **config)
    (tmp_path / "rows.jsonl").write_text('{"inputs": "<|user|>hi", "outputs": "x"}\n')
    done = tokenize(data, tmp_path / "set", "--tokenizer-file", directory, rows=tmp_path / "rows.jsonl")
    new = load_tokenizer(directory).vocab_size - 1
    assert f"added as transformers does: <|user|> (id {new})" in done.stderr and "<|user|> 1" in done.stdout
    assert IndexedReader(field_paths(tmp_path / "set")[0])[0][0] == new
    assert tokenizer_warning(tmp_path / "set", directory) is None
    assert "another tokenizer" in tokenizer_warning(tmp_path / "set", directory / "tokenizer.json")


def test_a_model_in_the_hub_cache_is_read_with_a_notice(data, single, tmp_path):
    cache = tmp_path / "models--bigcode--starcoder"
    hf_directory(data, cache / "snapshots" / ("a" * 40), tokenizer_class="PreTrainedTokenizerFast")
    done = tokenize(data, tmp_path / "set", "--tokenizer-file", cache)
    assert done.stderr == f"{cache}: a Hub cache; reading snapshot aaaaaaaaaaaa, the only one\n"
    assert token_bytes(tmp_path / "set") == token_bytes(single)
    assert tokenizer_warning(tmp_path / "set", cache) is None


def test_control_characters_of_a_tokenizer_reach_no_terminal(data, tmp_path):
    forged = "\x1b]0;owned\x07\nerror: forged"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": forged}
    done = tokenize(data, tmp_path / "set", "--tokenizer-file", hf_directory(data, tmp_path / "hf", **config))
    assert "\\x1b]0;owned" in done.stderr and not any(line.startswith("error") for line in done.stderr.splitlines())
    assert "\x1b" not in done.stderr + done.stdout
