"""From a git history to training rows and a tokenizer: the right commits, the right texts, an error where there is no history."""

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

COMMITS, ROWS, TRAIN = "dataset/git_commits.py", "dataset/commits_to_jsonl.py", "preprocess/train_tokenizer.py"
SCHEMA = [
    "commit",
    "old_file",
    "new_file",
    "old_contents",
    "new_contents",
    "subject",
    "message",
    "lang",
    "license",
    "repos",
]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    """A history with two fitting commits among every kind that does not fit."""
    repo = tmp_path_factory.mktemp("history") / "project"
    env = {**os.environ, "HOME": str(repo.parent), "GIT_CONFIG_NOSYSTEM": "1"}
    for who in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{who}_NAME": "A", f"GIT_{who}_EMAIL": "a@b.c"}
    clock = iter(range(1_700_000_000, 1_800_000_000, 60))

    def git(*command):
        date = f"{next(clock)} +0000"
        subprocess.run(
            ["git", "-C", str(repo), *command],
            check=True,
            capture_output=True,
            env={**env, "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date},
        )

    def commit(message, **files):
        for name, content in files.items():
            path = repo / name.replace("__", ".")
            path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")
        git("add", "-A")
        git("commit", "--allow-empty", "--allow-empty-message", "-qm", message)

    repo.mkdir()
    git("init", "-q", "-b", "main")
    git("remote", "add", "origin", "https://host.example/owner/name.git")
    (repo / "LICENSE").write_text(
        "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy\n"
    )
    commit("First files", a__py="one\n", b__py="b\n", image__bin=b"\x00\x01", latin__txt="é".encode("latin-1"))
    commit("Änder 'a'\n\nWith a body:\n\n- of two lines\n", a__py='two "quoted" \u2028 λ\n')
    commit("Two files at once", a__py="x\n", b__py="y\n")
    commit("A new file", c__py="c\n")
    commit("Binary", image__bin=b"\x00\x02")
    commit("Not UTF-8", latin__txt="ü".encode("latin-1"))
    (repo / "a.py").chmod(0o755)
    commit("Mode alone")
    commit("Nothing")
    git("mv", "b.py", "d.py")
    commit("A move")
    (repo / "link").symlink_to("a.py")
    commit("A link")
    (repo / "link").unlink()
    (repo / "link").symlink_to("c.py")
    commit("The link turns")
    git("checkout", "-qb", "side")
    commit("", c__py="side\n")
    git("checkout", "-q", "main")
    (repo / "c.py").write_bytes(b"")
    commit("Emptied")
    git("merge", "-q", "-s", "ours", "-m", "A merge", "side")
    return repo


def test_commits_that_modified_exactly_one_text_file_become_rows(repo, tmp_path):
    run_program(COMMITS, "--repo", repo, "--output", tmp_path / "c.jsonl")
    rows = rows_of(tmp_path / "c.jsonl")
    assert [list(row) for row in rows] == [SCHEMA] * 3
    assert [row["subject"] for row in rows] == ["Änder 'a'", "", "Emptied"]
    first = rows[0]
    assert (first["old_contents"], first["new_contents"]) == ("one\n", 'two "quoted" \u2028 λ\n')
    assert first["message"] == "Änder 'a'\n\nWith a body:\n\n- of two lines"
    assert (first["old_file"], first["new_file"], first["lang"], first["license"], first["repos"]) == (
        "a.py",
        "a.py",
        "Python",
        "mit",
        "owner/name",
    )
    log = subprocess.run(
        ["git", "-C", repo, "log", "--format=%H", "--grep=nder"], capture_output=True, text=True
    ).stdout.strip()
    assert first["commit"] == log

    done = run_program(ROWS, "--input", tmp_path / "c.jsonl", "--output", tmp_path / "r.jsonl")
    (row,) = rows_of(tmp_path / "r.jsonl")
    assert "1 rows" in done.stderr and "2 commits without a subject or new contents skipped" in done.stderr
    assert row["inputs"] == "<commit_before>one\n<commit_msg>Änder 'a'<commit_after>"
    assert row["outputs"] == first["new_contents"] and row["license"] == "mit"
    asked = run_program(ROWS, "--input", tmp_path / "c.jsonl", "--output", "-", "--format", "octocoder").stdout
    assert json.loads(asked)["inputs"] == "Question: Änder 'a'\n\none\n\n\nAnswer:" and json.loads(asked)[
        "outputs"
    ].startswith(" two")
    assert len(rows_of(tmp_path / "c.jsonl")) == 3
    limited = run_program(COMMITS, "--repo", repo, "--output", "-", "--max-rows", 1, "--license", "x").stdout
    assert [json.loads(line)["license"] for line in limited.split("\n")[:-1]] == ["x"]


def test_without_history_there_is_an_error_or_the_fallback_and_a_line_says_so(repo, tmp_path):
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{repo}", tmp_path / "shallow"], check=True)
    (tmp_path / "tarball").mkdir()
    shipped = ROOT / "examples/commits.jsonl"
    out = tmp_path / "c.jsonl"
    for where, flags, reason in [
        (tmp_path / "shallow", [], "is a shallow clone"),
        (tmp_path / "tarball", [], "is not a readable git repository"),
        (repo, ["--min-rows", 100], "has 3 single-file commits, fewer than --min-rows 100"),
    ]:
        env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
        command = (COMMITS, "--repo", where, "--output", out, *flags)
        line = one_error_line(run_program(*command, env=env, ok=False))
        assert reason in line and "--fallback FILE" in line
        assert not list(tmp_path.glob("c.jsonl*"))
        done = run_program(*command, "--fallback", shipped, env=env)
        assert reason in done.stderr and f"rows of {shipped} instead" in done.stderr
        assert out.read_bytes() == shipped.read_bytes()
        out.unlink()
    for flags, words in (
        (["--max-rows", 0], "--max-rows 0: must be at least 1"),
        (["--fallback", out], "would overwrite the --fallback file"),
    ):
        assert words in one_error_line(run_program(COMMITS, "--repo", repo, "--output", out, *flags, ok=False))
    assert "bad revision" in one_error_line(
        run_program(COMMITS, "--repo", repo, "--rev", "nope", "--output", tmp_path / "c.jsonl", ok=False)
    )
    assert not list(tmp_path.glob("c.jsonl*"))


def test_the_example_rows_are_in_commitpacks_schema_and_enough():
    rows = rows_of(ROOT / "examples/commits.jsonl")
    assert 150 <= len(rows) <= 300 and len({row["commit"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == SCHEMA and all(isinstance(value, str) and value for value in row.values())
        assert row["old_contents"] != row["new_contents"] and row["license"] == "apache-2.0"


def test_a_tokenizer_of_starcoders_kind_is_trained(golden, tmp_path):
    run_program(ROWS, "--input", ROOT / "examples/commits.jsonl", "--output", tmp_path / "r.jsonl")
    for name, threads in {"a.json": "1", "b.json": "2"}.items():
        env = {**os.environ, "RAYON_NUM_THREADS": threads}
        run_program(TRAIN, "--input", tmp_path / "r.jsonl", "--output", tmp_path / name, "--vocab-size", 2048, env=env)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    spec, starcoders = (json.loads(path.read_text()) for path in (tmp_path / "a.json", golden / "data/tokenizer.json"))
    assert (
        spec["pre_tokenizer"] == starcoders["pre_tokenizer"] and spec["added_tokens"][:5] == starcoders["added_tokens"]
    )
    tokenizer = load_tokenizer(tmp_path / "a.json")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.special_ids["<commit_after>"]) == (2048, 0, 17)
    text = "<commit_before>x = 1234  # λ 🙂\n<commit_msg>Änder<commit_after>"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.notice is None
    assert "<com" not in Tokenizer.from_file(str(tmp_path / "a.json")).get_vocab()  # special tokens are not trained on
    done = run_program(
        TRAIN, "--input", tmp_path / "r.jsonl", "--output", tmp_path / "c.json", "--vocab-size", 274, ok=False
    )
    assert "--vocab-size 274: must be at least 275" in one_error_line(done)


def test_starcoders_special_tokens_stand_in_starcoders_order(shared_data, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"inputs": "a b a b", "outputs": "c"}\n')
    done = run_program(TRAIN, "--input", tmp_path / "r.jsonl", "--output", tmp_path / "t.json")
    assert "fewer than the requested 49152" in done.stderr
    ours, theirs = (
        json.loads(path.read_text())["added_tokens"]
        for path in (tmp_path / "t.json", shared_data / "starcoder-tokenizer.json")
    )
    assert ours == theirs


def test_an_output_that_is_an_input_is_refused_and_the_data_stay(tmp_path):
    rows, link = tmp_path / "r.jsonl", tmp_path / "link.jsonl"
    rows.write_text('{"inputs": "a", "outputs": "b"}\n')
    link.symlink_to(rows)
    for program in (ROWS, TRAIN, "dataset/dedup_shuffle.py"):
        for output in (rows, link):
            given = ["--input", rows] if program != "dataset/dedup_shuffle.py" else [rows]
            done = run_program(program, *given, "--output", output, ok=False)
            assert "is input and output at once" in one_error_line(done)
    assert rows.read_text() == '{"inputs": "a", "outputs": "b"}\n' and link.is_symlink()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_training_a_tokenizer_stops_at_once(tmp_path, stop):
    """The library holds the interpreter for seconds; the signal comes in the middle of that."""
    words = [f"w{n * 7919 % 10**6:x}" for n in range(200_000)]
    row = json.dumps({"inputs": " ".join(words), "outputs": "x"})
    (tmp_path / "r.jsonl").write_text(f"{row}\n" * 4)
    process = subprocess.Popen(
        [sys.executable, ROOT / TRAIN, "--input", tmp_path / "r.jsonl", "--output", tmp_path / "t.json"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until Python's own handler of SIGINT is gone
        caught = next(
            line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt")
        )
        if b"tokenizers" in Path(f"/proc/{process.pid}/maps").read_bytes() and not int(caught.split()[1], 16) & 2:
            break
        time.sleep(0.02)
    time.sleep(1)
    assert process.poll() is None, "the training was over too soon to be stopped"
    process.send_signal(stop)
    began = time.monotonic()
    assert process.wait(timeout=60) == -stop and time.monotonic() - began < 2
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_rows_that_are_no_commits_end_in_one_line(tmp_path):
    rows = tmp_path / "r.jsonl"
    for text, words in {
        '{"old_contents": "a", "new_contents": "b"}': "r.jsonl, line 1: no key 'subject'",
        '{"old_contents": "a", "new_contents": 1, "subject": "s"}': "line 1: 'new_contents' is not a string",
        "[1": "line 1: not JSON",
        '{"old_contents": "a", "new_contents": "", "subject": "s"}': "no commit with a subject",
    }.items():
        rows.write_text(text + "\n")
        assert words in one_error_line(run_program(ROWS, "--input", rows, "--output", tmp_path / "o.jsonl", ok=False))
    assert "line 1: no key 'inputs'" in one_error_line(
        run_program(TRAIN, "--input", rows, "--output", tmp_path / "t.json", ok=False)
    )
    assert {file.name for file in tmp_path.iterdir()} == {"r.jsonl"}
