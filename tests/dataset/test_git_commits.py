"""dataset/git_commits.py: usable commits become CommitPack rows; without history, an error."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program

COMMITS = "dataset/git_commits.py"
EXAMPLE_ROWS = ROOT / "examples/commits.jsonl"
SCHEMA = [
    *("commit", "old_file", "new_file", "old_contents", "new_contents"),
    *("subject", "message", "lang", "license", "repos"),
]


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> Path:
    """A history with three usable commits among every kind that is not."""
    repo = tmp_path_factory.mktemp("history") / "project"
    env = {**os.environ, "HOME": str(repo.parent), "GIT_CONFIG_NOSYSTEM": "1"}
    for who in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{who}_NAME": "A", f"GIT_{who}_EMAIL": "a@b.c"}
    clock = iter(range(1_700_000_000, 1_800_000_000, 60))

    def git(*command: str) -> None:
        date = f"{next(clock)} +0000"
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        subprocess.run(["git", "-C", str(repo), *command], check=True, capture_output=True, env={**env, **dates})

    def commit(message: str, **files: str | bytes) -> None:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            (repo / name.replace("__", ".")).write_bytes(data)
        git("add", "-A")
        git("commit", "--allow-empty", "--allow-empty-message", "-qm", message)

    repo.mkdir()
    git("init", "-q", "-b", "main")
    git("remote", "add", "origin", "https://host.example/owner/name.git")
    mit = "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy\n"
    (repo / "LICENSE").write_text(mit)
    commit("First files", a__py="one\n", b__py="b\n", image__bin=b"\x00\x01", latin__txt="é".encode("latin-1"))
    commit("Änder 'a'\n\nWith a body:\n\n- of two lines\n", a__py='two "quoted" \u2028 λ\n')
    commit("Two files at once", a__py="x\n", b__py="y\n")
    commit("A new file", c__py="c\n")
    commit("Binary", image__bin=b"\x00\x02")
    commit("Not UTF-8", latin__txt="ü".encode("latin-1"))
    (repo / "a.py").chmod(0o755)
    commit("Only the mode")
    commit("Nothing")
    git("mv", "b.py", "d.py")
    commit("A move")
    (repo / "link").symlink_to("a.py")
    commit("A link")
    (repo / "link").unlink()
    (repo / "link").symlink_to("c.py")
    commit("Another target of the link")
    git("checkout", "-qb", "side")
    commit("", c__py="side\n")
    git("checkout", "-q", "main")
    commit("Emptied", c__py="")
    git("merge", "-q", "-s", "ours", "-m", "A merge", "side")
    return repo


@pytest.fixture(scope="module")
def rows(repo, tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("rows") / "commits.jsonl"
    run_program(COMMITS, "--repo", repo, "--output", output)
    return rows_of(output.read_text(encoding="utf-8"))


def rows_of(jsonl: str) -> list[dict]:
    return [json.loads(line) for line in jsonl.split("\n")[:-1]]  # U+2028 ends no line


def test_commits_that_modified_exactly_one_text_file_become_rows(rows):
    assert [row["subject"] for row in rows] == ["Änder 'a'", "", "Emptied"]


def test_row_has_the_commit_in_commitpacks_schema(rows, repo):
    log = ["git", "-C", str(repo), "log", "--format=%H", "--grep=nder"]
    commit = subprocess.run(log, capture_output=True, text=True).stdout.strip()
    assert list(rows[0]) == SCHEMA
    assert rows[0] == {
        "commit": commit,
        "old_file": "a.py",
        "new_file": "a.py",
        "old_contents": "one\n",
        "new_contents": 'two "quoted" \u2028 λ\n',
        "subject": "Änder 'a'",
        "message": "Änder 'a'\n\nWith a body:\n\n- of two lines",
        "lang": "Python",
        "license": "mit",
        "repos": "owner/name",
    }


def test_max_rows_and_license_are_obeyed(repo):
    limited = run_program(COMMITS, "--repo", repo, "--output", "-", "--max-rows", 1, "--license", "x").stdout
    assert [row["license"] for row in rows_of(limited)] == ["x"]


def test_modified_only_counts_modified_files_as_commitpack_does(repo, tmp_path):
    copy = copy_of(repo, tmp_path)
    (copy / "a.py").write_text("with an added file\n")
    add_file(copy, "new.py", "new\n", "Modify and add")
    (copy / "a.py").write_text("with a deleted file\n")
    (copy / "new.py").rename(copy / "renamed.py")
    add_file(copy, "other.py", "other\n", "Modify and rename")
    (copy / "a.py").write_text("with a second file\n")
    add_file(copy, "c.py", "second\n", "Modify two")
    add_file(copy, "added.py", "added\n", "Only add")
    command = (COMMITS, "--repo", copy, "--output", "-", "--rev", "HEAD~4..HEAD")
    strict = run_program(*command, ok=False)
    assert "has 0 single-file commits" in one_error_line(strict)
    counted = rows_of(run_program(*command, "--modified-only").stdout)
    assert [(row["subject"], row["new_file"], row["new_contents"]) for row in counted] == [
        ("Modify and add", "a.py", "with an added file\n"),
        ("Modify and rename", "a.py", "with a deleted file\n"),
    ]


NO_HISTORY = {
    "shallow": "is a shallow clone",
    "tarball": "is not a readable git repository",
    "short": "has 3 single-file commits, fewer than --min-rows 100",
    "large": "has 0 single-file commits of at most --max-file-bytes 1, fewer than --min-rows 1",
}


@pytest.fixture
def no_history(request, repo, tmp_path) -> tuple:
    """The command for a source of the given kind, and its environment."""
    source = tmp_path / request.param
    if request.param == "shallow":
        subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{repo}", source], check=True)
    elif request.param == "tarball":
        source.mkdir()
    else:
        source = repo
    command = (COMMITS, "--repo", source, "--output", tmp_path / "c.jsonl")
    flags = {"short": ("--min-rows", 100), "large": ("--max-file-bytes", 1)}.get(request.param, ())
    return (*command, *flags), {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}


@pytest.mark.parametrize("no_history, reason", NO_HISTORY.items(), indirect=["no_history"])
def test_no_history_is_an_error_that_names_the_fallback(no_history, reason, tmp_path):
    command, env = no_history
    line = one_error_line(run_program(*command, env=env, ok=False))
    assert reason in line and "--fallback FILE" in line
    assert not list(tmp_path.glob("c.jsonl*"))


@pytest.mark.parametrize("no_history, reason", NO_HISTORY.items(), indirect=["no_history"])
def test_fallback_rows_are_written_with_the_reason(no_history, reason, tmp_path):
    command, env = no_history
    done = run_program(*command, "--fallback", EXAMPLE_ROWS, env=env)
    assert reason in done.stderr and f"rows of {EXAMPLE_ROWS} instead" in done.stderr
    assert (tmp_path / "c.jsonl").read_bytes() == EXAMPLE_ROWS.read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max-rows", 0], "--max-rows 0: must be at least 1"),
        (["--fallback", "c.jsonl"], "would overwrite the --fallback file"),
        (["--rev", "missing"], "bad revision"),
        (["--repo", "missing"], "--repo missing: directory not found"),
    ],
)
def test_usage_errors_report_one_line_and_write_nothing(repo, tmp_path, flags, message):
    command = (COMMITS, "--repo", repo, "--output", "c.jsonl", *flags)
    assert message in one_error_line(run_program(*command, ok=False, cwd=tmp_path))
    assert not list(tmp_path.iterdir())


def test_git_that_is_not_installed_is_named(repo, tmp_path):
    command = (COMMITS, "--repo", repo, "--output", tmp_path / "c.jsonl")
    line = one_error_line(run_program(*command, ok=False, env={**os.environ, "PATH": str(tmp_path)}))
    assert "git is not installed" in line


def copy_of(repo: Path, tmp_path: Path) -> Path:
    subprocess.run(["git", "clone", "-q", repo, tmp_path / "copy"], check=True)
    return tmp_path / "copy"


def add_file(repo: Path, name: str, content: str, subject: str) -> None:
    (repo / name).write_text(content, encoding="utf-8")
    git = ["git", "-C", str(repo), "-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", subject], check=True)


def test_names_of_license_files_may_hold_newlines_and_spaces(repo, rows, tmp_path):
    copy = copy_of(repo, tmp_path)
    add_file(copy, "COPYING\nHEAD:a.py\nx", "none", "Odd name")
    add_file(copy, "COPYING as missing", "none", "Odd name")
    found = rows_of(run_program(COMMITS, "--repo", copy, "--output", "-").stdout)
    assert [row | {"repos": ""} for row in found] == [row | {"repos": ""} for row in rows]


def test_large_files_are_skipped(repo, tmp_path):
    copy = copy_of(repo, tmp_path)
    for size in (3 << 20, 4 << 20, 2):
        add_file(copy, "a.py", "x" * size, f"Size {size}")
    add_file(copy, "a.py", "small", "Small again")
    found = rows_of(run_program(COMMITS, "--repo", copy, "--output", "-", "--rev", "HEAD~4..HEAD").stdout)
    assert [row["subject"] for row in found] == ["Small again"]


def test_damaged_repository_is_an_error(repo, tmp_path):
    copy = copy_of(repo, tmp_path)
    blob = subprocess.run(
        ["git", "-C", copy, "rev-parse", "HEAD~2:c.py"], capture_output=True, text=True
    ).stdout.strip()
    subprocess.run(["git", "-C", copy, "repack", "-adq"], check=True)
    pack = next((copy / ".git/objects/pack").glob("*.pack"))
    unpacked = tmp_path / "x.pack"
    pack.rename(unpacked)
    with open(unpacked, "rb") as file:
        subprocess.run(["git", "-C", copy, "unpack-objects", "-q"], stdin=file, check=True)
    damaged = copy / ".git/objects" / blob[:2] / blob[2:]
    damaged.chmod(0o644)
    damaged.write_bytes(b"no object")
    line = one_error_line(run_program(COMMITS, "--repo", copy, "--output", tmp_path / "c.jsonl", ok=False))
    assert "git fsck" in line and not (tmp_path / "c.jsonl").exists()


def test_example_rows_are_complete_and_enough_for_the_demonstration():
    rows = rows_of(EXAMPLE_ROWS.read_text(encoding="utf-8"))
    assert 150 <= len(rows) <= 300 and len({row["commit"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == SCHEMA and all(isinstance(value, str) and value for value in row.values())
        assert row["old_contents"] != row["new_contents"] and row["license"] == "apache-2.0"
