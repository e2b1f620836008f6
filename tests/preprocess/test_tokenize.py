"""preprocess/tokenize.py and merge.py: the branch's bytes, whatever the workers and shards; bad rows named; nothing half-written."""

import contextlib
import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program

from megatron_ft.data.indexed import IndexedReader, field_paths

TOKENIZE, MERGE = "preprocess/tokenize.py", "preprocess/merge.py"
PROGRAMS = [*sorted((ROOT / "preprocess").glob("*.py")), ROOT / "bench/tokenize.py"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A directory with 400 rows of several lengths and scripts, and a tokenizer trained on them."""
    directory = tmp_path_factory.mktemp("data")
    rng = random.Random(5)
    words = ["def", "return", "x", "12", "λ", "我想", "\n    ", "🙂", "it's", "==", "<|endoftext|>", "value"]
    with open(directory / "rows.jsonl", "w") as file:
        for _ in range(400):
            inputs, outputs = (" ".join(rng.choices(words, k=rng.randint(1, 80))) for _ in range(2))
            file.write(json.dumps({"id": 1, "inputs": inputs, "outputs": outputs}, ensure_ascii=False) + "\n")
    run_program(
        "preprocess/train_tokenizer.py",
        "--input",
        directory / "rows.jsonl",
        "--output",
        directory / "t.json",
        "--vocab-size",
        400,
    )
    return directory


def files_of(prefix: Path) -> list[bytes]:
    return [Path(field + suffix).read_bytes() for field in field_paths(prefix) for suffix in (".bin", ".idx")]


def tokenize(data: Path, prefix: Path, *flags, rows: Path | None = None, **kwargs):
    return run_program(
        TOKENIZE,
        rows or data / "rows.jsonl",
        "--tokenizer-file",
        data / "t.json",
        "--output-prefix",
        prefix,
        *flags,
        **kwargs,
    )


def test_the_golden_rows_give_the_branchs_bytes(golden, tmp_path):
    for name, flags in {"commits": [], "commits_outputs": ["--workers", "1"]}.items():
        rows = golden / f"data/{name}.jsonl"
        done = run_program(
            TOKENIZE,
            rows,
            "--tokenizer-file",
            golden / "data/tokenizer.json",
            "--output-prefix",
            tmp_path / name,
            *flags,
        )
        assert files_of(tmp_path / name) == files_of(golden / "data/eod")
        assert "<|endoftext|> 2" in done.stdout and "200 rows" in done.stdout and not done.stderr
    run_program(
        TOKENIZE,
        "--input",
        golden / "data/short.jsonl",
        "--tokenizer-file",
        golden / "data/tokenizer.json",
        "--output-prefix",
        tmp_path / "short",
    )
    assert files_of(tmp_path / "short") == files_of(golden / "data/short")


def test_workers_shards_and_compression_do_not_change_a_byte(data, tmp_path):
    tokenize(data, tmp_path / "one", "--workers", 1)
    whole = files_of(tmp_path / "one")
    text = (data / "rows.jsonl").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(text[: text.index(b"\n", len(text) // 3) + 1])
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(text[text.index(b"\n", len(text) // 3) + 1 :]))
    tokenize(data, tmp_path / "three", "--workers", 3, rows=tmp_path / "in")
    assert files_of(tmp_path / "three") == whole
    with open(data / "rows.jsonl", "rb") as rows:
        tokenize(data, tmp_path / "stdin", rows=Path("-"), stdin=rows)
    assert files_of(tmp_path / "stdin") == whole
    parts = [tmp_path / f"part-{i}" for i in (1, 2, 10)]
    for i, part in enumerate(parts, 1):
        tokenize(data, part, "--shard", f"{i}/3")
    run_program(
        MERGE, *sorted(parts, key=str), "--output-prefix", tmp_path / "merged"
    )  # a shell's order: part-1 part-10 part-2
    assert files_of(tmp_path / "merged") == whole


def test_end_of_text_and_literal_special_tokens(data, tmp_path):
    tokenize(data, tmp_path / "with")
    bare = tokenize(data, tmp_path / "bare", "--no-append-eod", "--literal-special-tokens", "<|endoftext|>")
    assert "spelled out" not in bare.stdout
    (inputs, outputs), (_, bare_outputs) = (
        [IndexedReader(f) for f in field_paths(tmp_path / name)] for name in ("with", "bare")
    )
    assert all(outputs[i][-1] == 0 for i in range(len(outputs)))
    assert any(0 in inputs[i] for i in range(len(inputs)))
    assert not any(0 in bare_outputs[i] for i in range(len(bare_outputs)))


def test_a_bad_row_stops_with_its_file_and_line_or_is_set_aside_with_its_reason(data, tmp_path):
    good = b'{"inputs": "a b", "targets": "c"}'
    bad = {
        "not JSON": b'{"inputs": ',
        "not a JSON object": b'"text"',
        "no key 'inputs'; the row has 'outputs'": b'{"outputs": "x"}',
        "'targets' is not a string": b'{"inputs": "x", "targets": 5}',
        "'inputs' is empty": b'{"inputs": "", "targets": "x"}',
        "invalid UTF-8": b'{"inputs": "\xff", "targets": "x"}',
        "lone surrogate": b'{"inputs": "\\udead", "targets": "x"}',
    }
    rows = tmp_path / "bad.jsonl"
    rows.write_bytes(b"\n".join([good, *bad.values(), good]) + b"\n")
    line = one_error_line(tokenize(data, tmp_path / "out", rows=rows, ok=False))
    assert "bad.jsonl, line 2: not JSON" in line and "--skip-bad-rows" in line
    assert not list(tmp_path.glob("out*"))

    done = tokenize(data, tmp_path / "out", "--skip-bad-rows", rows=rows)
    rejected = [json.loads(line) for line in (tmp_path / "out_rejected.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == list(enumerate(bad, 2))
    assert rejected[0]["row"] == '{"inputs": ' and rejected[0]["file"] == str(rows)
    assert (
        "2 rows" in done.stdout
        and "7 bad rows skipped" in done.stdout
        and all(f"1 {reason}" in done.stdout for reason in bad)
    )
    assert [len(IndexedReader(field)) for field in field_paths(tmp_path / "out")] == [2, 2]

    for i in (1, 2):
        tokenize(data, tmp_path / f"p{i}", "--skip-bad-rows", "--shard", f"{i}/2", rows=rows)
    run_program(MERGE, tmp_path / "p1", tmp_path / "p2", "--output-prefix", tmp_path / "all")
    assert files_of(tmp_path / "all") == files_of(tmp_path / "out")
    assert (tmp_path / "all_rejected.jsonl").read_bytes() == (tmp_path / "out_rejected.jsonl").read_bytes()

    rows.write_bytes(bad["not JSON"] + b"\n")
    assert "all 1 rows are bad" in one_error_line(
        tokenize(data, tmp_path / "none", "--skip-bad-rows", rows=rows, ok=False)
    )


def test_a_blank_end_and_outputs_that_end_in_end_of_text(data, tmp_path):
    rows = tmp_path / "r.jsonl"
    rows.write_text('\ufeff{"inputs": "a", "outputs": "x<|endoftext|>"}\n\n{"inputs": "a", "outputs": "x"}\n\n \n')
    done = tokenize(data, tmp_path / "out", rows=rows)
    assert "2 rows" in done.stdout and "1 outputs already ended with an end-of-text token and now have two" in done.stdout
    assert "--no-append-eod" not in done.stdout
    assert [IndexedReader(f"{tmp_path}/out_targets_document")[i][-2:].tolist()[0] == 0 for i in (0, 1)] == [True, False]
    assert "two" not in tokenize(data, tmp_path / "out", "--no-append-eod", rows=rows).stdout


def test_rejected_rows_named_as_input_are_not_lost(data, tmp_path):
    rows = tmp_path / "out_rejected.jsonl"
    rows.write_text('{"inputs": "a", "outputs": "x"}\n')
    line = one_error_line(tokenize(data, tmp_path / "out", rows=rows, ok=False))
    assert "is both input and output" in line and rows.read_text().startswith('{"inputs"')


def test_parts_are_merged_by_their_files_and_a_job_array_must_be_whole_and_alike(data, tmp_path):
    tokenize(data, tmp_path / "whole")
    for i in (1, 2, 3):
        tokenize(data, tmp_path / f"part-{i}", "--shard", f"{i}/3")
    (tmp_path / "part-2_packing").mkdir()
    (tmp_path / "part-2_rejected.jsonl").write_text("{}\n")
    files = sorted(tmp_path.glob("part-*"))
    assert len(files) == 17
    run_program(MERGE, *files, "--output-prefix", tmp_path / "merged")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "whole")
    made, whole = (json.loads((tmp_path / f"{name}_made_from.json").read_text()) for name in ("merged", "whole"))
    assert made == whole and made["shard"] == [1, 1] and made["append_eod"] is True
    assert made["inputs"] == [["rows.jsonl", (data / "rows.jsonl").stat().st_size]]

    def refusal(*parts) -> str:
        out = ["--output-prefix", tmp_path / "never"]
        line = one_error_line(run_program(MERGE, *(tmp_path / part for part in parts), *out, ok=False))
        assert not list(tmp_path.glob("never*"))
        return line

    assert "shard 2 of 3 of rows.jsonl is missing" in refusal("part-1", "part-3")
    assert "named twice" in refusal("part-1", "part-1", "part-2", "part-3")
    tokenize(data, tmp_path / "again", "--shard", "2/3")
    assert "are both shard 2/3 of rows.jsonl" in refusal("part-1", "part-2", "part-3", "again")
    tokenize(data, tmp_path / "bare", "--shard", "2/3", "--no-append-eod")
    assert "different --append-eod" in refusal("part-1", "bare", "part-3")
    spec = json.loads((data / "t.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:-1]  # one merge less: other ids, the same vocabulary
    (tmp_path / "u.json").write_text(json.dumps(spec))
    tokenize(data, tmp_path / "other", "--tokenizer-file", tmp_path / "u.json", "--shard", "2/3")
    assert "made with different tokenizers (t.json, sha256 " in refusal("part-1", "other", "part-3")
    (tmp_path / "other_made_from.json").write_text("{")
    assert "other_made_from.json: damaged" in refusal("part-1", "other", "part-3")

    (tmp_path / "other_made_from.json").unlink()  # nobody knows: as it is
    run_program(MERGE, *(tmp_path / part for part in ("part-1", "other")), "--output-prefix", tmp_path / "merged")
    assert not (tmp_path / "merged_made_from.json").exists()
    for i in (1, 2):  # standard input may be anything each time
        with open(data / "rows.jsonl", "rb") as rows:
            tokenize(data, tmp_path / f"in-{i}", rows=Path("-"), stdin=rows)
    run_program(MERGE, tmp_path / "in-1", tmp_path / "in-2", "--output-prefix", tmp_path / "merged")
    assert (tmp_path / "merged_made_from.json").exists()


def test_training_and_view_say_when_the_tokenizer_is_another(data, tmp_path):
    from token_files import training_flags

    from megatron_ft.data.packed_dataset import build_datasets

    tokenize(data, tmp_path / "set")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/tokenizer.json").write_bytes((data / "t.json").read_bytes())
    (tmp_path / "u.json").write_bytes((data / "t.json").read_bytes() + b"\n")
    for tokenizer, said in ((data / "t.json", False), (tmp_path / "hf", False), (tmp_path / "u.json", True)):
        flags = training_flags("--data-prefix", tmp_path / "set", "--tokenizer-file", tokenizer, seq_length=512)
        notices = build_datasets(flags, train_samples=1, pad=0).notices
        shown = run_program(
            "preprocess/view.py", tmp_path / "set_inputs_document.bin", "--tokenizer-file", tokenizer, "--rows", 0
        )
        assert [n for n in notices if "another tokenizer" in n] == ([shown.stderr.strip()] if said else [])
        assert ("made with another tokenizer (t.json, sha256 " in shown.stderr) == said


def test_what_a_user_can_get_wrong_ends_in_one_line_and_writes_nothing(data, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl.gz").write_bytes(gzip.compress(b""))
    before = sorted(tmp_path.iterdir())
    for flags, words in {
        ("missing.jsonl",): "missing.jsonl",
        (tmp_path / "empty.jsonl",): "empty.jsonl: empty",
        (tmp_path / "blank.jsonl.gz",): "blank.jsonl.gz: no row",
        (data / "rows.jsonl", "--input-key", "prompt"): "line 1: no key 'prompt'",
        (data / "rows.jsonl", "--workers", "0"): "--workers 0",
        (data / "rows.jsonl", "--shard", "5/4"): "--shard 5/4",
        (data / "rows.jsonl", "--literal-special-tokens", "<no>"): "<no>",
        (data / "rows.jsonl", "--output-prefix", "/proc/nowhere/x"): "/proc/nowhere/x: cannot be written",
        (data / "rows.jsonl", "--tokenizer-file", data / "rows.jsonl"): "rows.jsonl: not a tokenizer.json",
        (data / "rows.jsonl", "--tokenizer", "x"): "unrecognized arguments: --tokenizer",
    }.items():
        flags = [flags[0], "--tokenizer-file", data / "t.json", "--output-prefix", tmp_path / "out", *flags[1:]]
        assert words in one_error_line(run_program(TOKENIZE, *flags, ok=False, cwd=tmp_path))
    assert sorted(tmp_path.iterdir()) == before
    line = one_error_line(
        run_program(MERGE, tmp_path / "no", tmp_path / "no2", "--output-prefix", tmp_path / "m", ok=False)
    )
    assert "no_inputs_document.idx" in line


@pytest.mark.parametrize("how", ["interrupt", "terminate", "kill", "full disk"])
def test_stopped_in_the_middle_nothing_looks_whole(data, tmp_path, how):
    prefix = tmp_path / "out"
    tokenize(data, prefix, rows=data / "rows.jsonl")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    rows = (data / "rows.jsonl").read_bytes()
    command = [
        sys.executable,
        ROOT / TOKENIZE,
        "-",
        "--tokenizer-file",
        data / "t.json",
        "--output-prefix",
        prefix,
        "--workers",
        "1",
    ]

    def limit():
        if how == "full disk":  # stands for it: files may not grow beyond 300 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=False, preexec_fn=limit
    )

    def feed():
        try:
            while True:
                process.stdin.write(rows)
        except OSError:
            pass

    feeder = threading.Thread(target=feed)
    feeder.start()
    partial = Path(f"{prefix}_inputs_document.bin.partial")
    deadline = time.monotonic() + 120
    while how != "full disk" and not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    if how != "full disk":
        process.send_signal({"interrupt": signal.SIGINT, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}[how])
    said = process.stderr.read().decode()
    status = process.wait()
    feeder.join()
    with contextlib.suppress(OSError):
        process.stdin.close()
    assert status == {"interrupt": 130, "terminate": 143, "kill": -9, "full disk": 2}[how] and "Traceback" not in said
    assert how != "full disk" or "cannot be written (File too large)" in said
    after = {
        file.name: file.read_bytes()
        for file in tmp_path.iterdir()
        if how != "kill" or not file.name.endswith(".partial")
    }
    assert after == before
    tokenize(data, prefix)  # what was left behind does not disturb the next run
    assert {file.name for file in tmp_path.iterdir()} == set(before)


def test_log_of_a_long_run_has_a_line_with_rates(capsys, monkeypatch):
    from megatron_ft import progress

    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    with progress.Progress("tokenize", 4_000_000, "B") as bar:
        bar.update(1_000_000, "5,000 tokens/s")
    line = capsys.readouterr().err
    assert line.startswith("tokenize: 1.00M/4.00MB, ") and "B/s, 5,000 tokens/s" in line and line.endswith(" left\n")


def test_no_program_hides_the_standard_librarys_tokenize(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit\n"
        "@atexit.register\n"
        "def show():\n"
        "    import tokenize, inspect, linecache, traceback\n"
        "    print('STDLIB', tokenize.__file__)\n"
        "    raise RuntimeError('shown on purpose')\n"
    )
    for program in PROGRAMS:
        done = run_program(
            program.relative_to(ROOT), "--help", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}
        )
        where = done.stdout.split("STDLIB ")[1].strip()
        assert Path(where).parent == Path(os.__file__).parent, program
        assert (
            "RuntimeError: shown on purpose" in done.stderr and "raise RuntimeError('shown on purpose')" in done.stderr
        ), program
        assert "usage: " in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["code", "one word", "digits", "emoji"])
def test_lines_of_64_MiB_take_less_than_1_GiB(shared_data, tmp_path, kind):
    text = {"code": "def f(x):\n    return x  # 1\n", "one word": "x", "digits": "7", "emoji": "🙂 a "}[kind]
    size = (63 << 20) // 2
    with open(tmp_path / "rows.jsonl", "wb") as file:
        for _ in range(2):
            side = json.dumps(
                text * (size // len(json.dumps(text, ensure_ascii=False).encode())), ensure_ascii=False
            ).encode()
            file.write(b'{"inputs": ' + side + b', "outputs": ' + side + b"}\n")
    peak = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    peak += "finally: print('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    command = [
        ROOT / TOKENIZE,
        tmp_path / "rows.jsonl",
        "--tokenizer-file",
        shared_data / "starcoder-tokenizer.json",
        "--output-prefix",
        tmp_path / "o",
    ]
    done = subprocess.run([sys.executable, "-c", peak, *map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("PEAK ")[1]) < 1 << 20  # KiB
    assert len(IndexedReader(field_paths(tmp_path / "o")[0])) == 2
