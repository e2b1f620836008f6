"""dataset/commitpack/commits_table.py: local repositories to github_repos' tables, and on to the
selection."""

import functools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program
from github_repos import EXECUTABLE, REGULAR, SYMLINK, read_parquet

from megatron_ft.commits.git import name_of
from megatron_ft.commits.selection.history import full_name

TABLES = "dataset/commitpack/commits_table.py"
SELECT = "dataset/commitpack/select_commits.py"
MIT = "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy\n"
APACHE = "Apache License\n Version 2.0\n"
TEXT, LINK = "100644", "120000"
Files = dict[str, tuple[str, str] | None]  # path to mode and content; None deletes it


def add_commits(repo: Path, *commits: tuple[str, Files]) -> list[str]:
    """Append commits (message, files) to the branch main by git fast-import; returns their ids."""
    git = ["git", "-C", str(repo)]
    if not (repo / "HEAD").exists():
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", repo], check=True)
    head = subprocess.run([*git, "rev-parse", "-q", "--verify", "main"], capture_output=True, text=True).stdout.strip()
    stream = ""
    for number, (message, files) in enumerate(commits, 1):
        who = f"Änne <a@b.c> {1_700_000_000 + 60 * number + len(head)} +0130"
        stream += f"commit refs/heads/main\nmark :{number}\nauthor {who}\ncommitter {who}\n"
        stream += f"data {len(message.encode())}\n{message}\n"
        stream += f"from {head}\n" if head and number == 1 else ""
        for path, file in files.items():
            name = json.dumps(path)  # quotes as fast-import does
            stream += f"M {file[0]} inline {name}\ndata {len(file[1].encode())}\n{file[1]}\n" if file else f"D {name}\n"
    marks = repo / "marks"
    subprocess.run([*git, "fast-import", "--quiet", f"--export-marks={marks}"], input=stream.encode(), check=True)
    ids = dict(line.split() for line in marks.read_text(encoding="ascii").splitlines())
    return [ids[f":{number}"] for number in range(1, len(commits) + 1)]


def blob(repo: Path, where: str) -> str:
    return subprocess.run(
        ["git", "-C", repo, "rev-parse", where], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Three mirrors: one, its fork under another license, and one in Perl; and ids of commits."""
    root = tmp_path_factory.mktemp("mirrors")
    one, fork, perl = root / "owner/one.git", root / "forker/one.git", root / "owner/perl.git"
    names = ("first", "modify", "both", "link", "relink", "move", "noise", "mode", "two")
    commits: list[tuple[str, Files]] = [
        ("First files\n", {"LICENSE": (TEXT, MIT), "a.py": (TEXT, "1\n"), "docs/x.js": (TEXT, "//\n" * 9)}),
        ("Änder a\n\nWith a body\n", {"a.py": (TEXT, "2\n")}),
        ("Modify and add\n", {"a.py": (TEXT, "3\n"), 'new "b".py': (TEXT, "b\n")}),
        ("Add a link\n", {"link": (LINK, "a.py")}),
        ("Modify the link\n", {"link": (LINK, "new")}),
        ("Move a file\n", {"a.py": None, "c.py": (TEXT, "3\n")}),
        ("Update README.md\n\n", {"c.py": (TEXT, "4\n")}),
        ("Only the mode\n", {"c.py": ("100755", "4\n")}),
        ("Modify two files\n", {"c.py": ("100755", "5\n"), 'new "b".py': (TEXT, "5\n")}),
    ]
    ids = dict(zip(names, add_commits(one, *commits), strict=True))
    fork.parent.mkdir()
    subprocess.run(["git", "clone", "-q", "--bare", one, fork], check=True)
    subprocess.run(["git", "-C", fork, "remote", "remove", "origin"], check=True)
    changes: list[tuple[str, Files]] = [("Change the license\n", {"LICENSE": (TEXT, APACHE)})]
    ids["license"], ids["fork"] = add_commits(fork, *changes, ("Modify c in the fork\n", {"c.py": (TEXT, "6\n")}))
    perl_files: Files = {"COPYING": (TEXT, APACHE), "x.p6": (TEXT, "1\n")}
    ids["perl"] = add_commits(perl, ("Begin\n", perl_files), ("Modify Perl\n", {"x.p6": (TEXT, "2\n")}))[1]
    return root, ids


def paths(mirrors: Path) -> list[Path]:
    return sorted(mirrors.glob("*/*.git"))


def table_files(output: Path, suffix: str = "parquet") -> dict[str, list[Path]]:
    return {table: sorted(output.glob(f"{table}*.{suffix}")) for table in ("commits", "licenses", "languages")}


def select(tables: dict[str, list[Path]], output: Path) -> list[dict]:
    flags = [part for table, files in tables.items() for part in (f"--{table}", *files)]
    run_program(SELECT, *flags, "--output", output)
    return read_parquet(output / "commits_table_final.parquet")


def test_tables_have_github_repos_columns_and_the_repositories_of_forks(mirrors, tmp_path):
    root, ids = mirrors
    run_program(TABLES, "--repos", *paths(root), "--output", tmp_path)
    commits = {row["commit"]: row for row in read_parquet(tmp_path / "commits.parquet")}
    assert len(commits) == 9 + 2 + 2
    row = commits[ids["modify"]]
    assert row["repo_name"] == ["forker/one", "owner/one"]
    assert commits[ids["fork"]]["repo_name"] == ["forker/one"]
    assert row["subject"] == "Änder a" and row["message"] == "Änder a\n\nWith a body\n"
    assert row["parent"] == [ids["first"]] and commits[ids["first"]]["parent"] == []
    assert row["tree"] == blob(root / "owner/one.git", f"{ids['modify']}^{{tree}}")
    author = row["author"]
    assert author["name"] == "Änne" and author["tz_offset"] == 90 and "email" not in author
    assert author["date"].timestamp() - author["date"].astimezone().utcoffset().total_seconds() >= 0
    assert row["difference_truncated"] is False
    assert row["difference"] == [
        {
            **{"old_mode": REGULAR, "new_mode": REGULAR, "old_path": "a.py", "new_path": "a.py"},
            "old_sha1": blob(root / "owner/one.git", f"{ids['first']}:a.py"),
            "new_sha1": blob(root / "owner/one.git", f"{ids['modify']}:a.py"),
        }
    ]
    (_, new) = commits[ids["both"]]["difference"]
    assert (new["old_path"], new["old_mode"], new["old_sha1"], new["new_path"]) == (None, None, None, 'new "b".py')
    assert commits[ids["relink"]]["difference"][0]["old_mode"] == SYMLINK
    assert commits[ids["mode"]]["difference"][0]["new_mode"] == EXECUTABLE
    licenses = {row["repo_name"]: row["license"] for row in read_parquet(tmp_path / "licenses.parquet")}
    assert licenses == {"owner/one": "mit", "forker/one": "apache-2.0", "owner/perl": "apache-2.0"}
    languages = {row["repo_name"]: row["language"] for row in read_parquet(tmp_path / "languages.parquet")}
    assert languages["owner/one"] == [{"name": "Python", "bytes": 4}]  # no documentation, no link
    assert languages["owner/perl"] == [{"name": "Perl6", "bytes": 2}]


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_mirrors_give_the_golden_rows(mirrors, tmp_path, format):
    root, ids = mirrors
    run_program(TABLES, "--repos", *paths(root), "--output", tmp_path / "tables", "--format", format)
    rows = select(table_files(tmp_path / "tables", format), tmp_path / "out")
    both = ("forker/one,owner/one", "apache-2.0,mit")
    expected = [
        (ids["modify"], *both, "Änder a", "a.py"),
        (ids["both"], *both, "Modify and add", "a.py"),
        (ids["license"], "forker/one", "apache-2.0", "Change the license", "LICENSE"),
        (ids["fork"], "forker/one", "apache-2.0", "Modify c in the fork", "c.py"),
        (ids["perl"], "owner/perl", "apache-2.0", "Modify Perl", "x.p6"),
    ]
    columns = ("commit", "repos", "licenses", "subject", "old_file")
    assert sorted(tuple(row[name] for name in columns) for row in rows) == sorted(expected)
    for row in rows:
        repo = root / f"{row['repos'].split(',')[0]}.git"
        assert row["old_sha1"] == blob(repo, f"{row['commit']}^:{row['old_file']}")
        assert row["new_sha1"] == blob(repo, f"{row['commit']}:{row['new_file']}")


def test_shards_together_give_the_rows_of_one_run(mirrors, tmp_path):
    root, _ = mirrors
    run_program(TABLES, "--repos", *paths(root), "--output", tmp_path / "one")
    for shard in ("1/2", "2/2"):
        run_program(TABLES, "--repos", *paths(root), "--output", tmp_path / "two", "--shard", shard)
    one, two = (select(table_files(tmp_path / name), tmp_path / f"{name} out") for name in ("one", "two"))
    assert len(one) == 5 and one == two


def test_own_history_equals_a_walk_by_git_log(tmp_path):
    """The selection from this checkout's history, and the same computed from git's own output."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "someone/project"
    subprocess.run(["git", "clone", "-q", "--no-checkout", ROOT, clone], check=True)
    git = ["git", "-C", str(clone)]
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True).stdout
    if shallow.strip() == "true":
        pytest.skip("a shallow clone has no history")
    run_program(TABLES, "--repos", clone, "--output", tmp_path / "tables")
    rows = select(table_files(tmp_path / "tables"), tmp_path / "out")
    noise = (ROOT / "dataset/commitpack/sql/noise_subjects.txt").read_text(encoding="utf-8").splitlines()
    expected = {}
    for id in subprocess.run([*git, "rev-list", "--no-merges", "HEAD"], capture_output=True, text=True).stdout.split():
        raw = subprocess.run([*git, "cat-file", "commit", id], capture_output=True).stdout.decode()
        message = raw.partition("\n\n")[2]
        subject = message.splitlines()[0]
        tree = [*git, "diff-tree", "--root", "-r", "--no-commit-id", "--no-renames", "--full-index", "-M0", id]
        lines = subprocess.run([part for part in tree if part != "-M0"], capture_output=True, text=True).stdout
        changed = [line.split(maxsplit=5) for line in lines.splitlines() if line.split()[4] in "MT"]
        if len(changed) != 1 or not 5 < len(message) < 10000 or subject.lower() in noise:
            continue
        (old_mode, new_mode, old_sha1, new_sha1, _, path) = changed[0]
        regular = {old_mode.strip(":"), new_mode} <= {"100644", "100755"}
        if regular and old_sha1 != new_sha1 and not subject.lower().startswith("merge"):
            expected[id] = (subject, message, path, old_sha1, new_sha1)
    names = ("subject", "message", "new_file", "old_sha1", "new_sha1")
    assert len(expected) > 20
    assert {row["commit"]: tuple(row[name] for name in names) for row in rows} == expected
    assert {(row["repos"], row["license"]) for row in rows} == {("someone/project", "apache-2.0")}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[Path]:
    """Fifteen repositories of 400 commits each, the last five forks of the first."""
    root = tmp_path_factory.mktemp("many")
    for i in range(10):
        commits: list[tuple[str, Files]] = [
            (f"Set {i} {j}\n", {"a.py": (TEXT, f"{i} {j}\n"), "LICENSE": (TEXT, MIT)}) for j in range(400)
        ]
        add_commits(root / f"owner/{i}.git", *commits)
    (root / "forker").mkdir()
    for i in range(5):
        subprocess.run(["git", "clone", "-q", "--bare", root / f"owner/{i}.git", root / f"forker/{i}.git"], check=True)
        subprocess.run(["git", "-C", root / f"forker/{i}.git", "remote", "remove", "origin"], check=True)
    return sorted(root.glob("*/*.git"))


def test_killed_runs_continue_without_losing_or_repeating_a_repository(many, tmp_path):
    command = list(map(str, [sys.executable, ROOT / TABLES, "--repos", *many, "--output"]))
    subprocess.run([*command, tmp_path / "expected"], check=True, capture_output=True)
    manifest, rng, killed = tmp_path / "out/manifest.jsonl", random.Random(3), 0
    for attempt, done in enumerate([0, 0, 1, 3, 4, 4, 7, 10, 11, 14, 15, 15, 15, 15]):
        process = subprocess.Popen([*command, tmp_path / "out"], stderr=subprocess.PIPE)
        while process.poll() is None and (not manifest.exists() or manifest.read_bytes().count(b"\n") < done):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3 if done in (0, 15) else 0.02))
        process.send_signal(signal.SIGTERM if attempt % 4 == 3 else signal.SIGKILL)
        stderr = process.communicate()[1].decode()
        assert "Traceback" not in stderr, stderr
        killed += process.returncode != 0
    assert killed >= 8
    subprocess.run([*command, tmp_path / "out"], check=True, capture_output=True)
    # A kill during the clean-up leaves an empty directory, which the next run that writes removes.
    expected, found = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        for name in ("expected", "out")
    )
    assert set(found) == set(expected)
    for name in expected:
        assert found[name] == expected[name], name
    entries = [json.loads(line) for line in found["manifest.jsonl"].splitlines()]
    assert [entry["path"] for entry in entries] == list(map(str, many))
    assert json.loads(found["commits_report.json"]) == {
        "repositories": {"ok": 15, "empty": 0, "shallow": 0, "unreadable": 0, "same_name": 0},
        "commits_in": 6000,
        "commits_out": 4000,
    }


def test_what_a_killed_run_had_not_finished_is_cut_off(mirrors, tmp_path):
    root, _ = mirrors
    flags = ("--repos", *paths(root), "--output", tmp_path)
    run_program(TABLES, *flags)
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    manifest = tmp_path / "manifest.jsonl"
    first, second, third = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(first + second[:-9])
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    run_program(TABLES, *flags)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected
    (tmp_path / ".commits.jsonl.zst").write_bytes(b"")
    error = one_error_line(run_program(TABLES, *flags, ok=False))
    assert "shorter than" in error and "delete both" in error


def test_a_full_disk_is_one_line_and_loses_nothing(mirrors, tmp_path):
    root, _ = mirrors
    flags = ("--repos", *paths(root), "--output", tmp_path / "out")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (900, 900))
    error = one_error_line(run_program(TABLES, *flags, ok=False, preexec_fn=limit))
    assert str(tmp_path / "out") in error and "ulimit -f" in error
    assert list((tmp_path / "out").glob("*.parquet")) == []
    run_program(TABLES, *flags)
    assert len(read_parquet(tmp_path / "out/commits.parquet")) == 13


def test_a_comma_in_a_name_does_not_make_two_repositories(mirrors, tmp_path):
    mirror = tmp_path / "a, b/c,d.git"
    mirror.parent.mkdir()
    subprocess.run(["git", "clone", "-q", "--bare", mirrors[0] / "owner/one.git", mirror], check=True)
    subprocess.run(["git", "-C", mirror, "remote", "remove", "origin"], check=True)
    assert (name_of(mirror), full_name(mirror)) == ("c_d.git", "a_ b/c_d")
    subprocess.run(["git", "-C", mirror, "remote", "add", "origin", "https://git.example/a,b/c.git"], check=True)
    assert name_of(mirror) == full_name(mirror) == "a_b/c"


def test_statuses_say_why_and_a_later_run_tries_again(mirrors, tmp_path):
    root, _ = mirrors
    one = root / "owner/one.git"
    repos = {name: tmp_path / f"repos/{name}.git" for name in ("shallow", "empty", "damaged", "partial", "same")}
    (tmp_path / "repos").mkdir()
    subprocess.run(["git", "clone", "-q", "--bare", "--depth=1", f"file://{one}", repos["shallow"]], check=True)
    subprocess.run(["git", "init", "-q", "--bare", repos["empty"]], check=True)
    for name in ("damaged", "same", "partial"):
        subprocess.run(["git", "clone", "-q", "--bare", one, repos[name]], check=True)
    subprocess.run(
        ["git", "-C", repos["partial"], "config", "remote.origin.partialclonefilter", "blob:none"], check=True
    )
    url = "https://git.example/owner/one.git"
    subprocess.run(["git", "-C", repos["same"], "config", "remote.origin.url", url], check=True)
    lost = blob(repos["damaged"], "HEAD~4")
    subprocess.run(["git", "-C", repos["damaged"], "unpack-objects", "-q"], input=b"", capture_output=True)
    pack_to_loose(repos["damaged"])
    (repos["damaged"] / "objects" / lost[:2] / lost[2:]).unlink()
    (tmp_path / "list").write_text("\n".join(map(str, [one, *repos.values(), tmp_path / "gone"])) + "\n")
    flags = ("--repos-file", tmp_path / "list", "--output", tmp_path / "out")
    done = run_program(TABLES, *flags)
    entries = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    statuses = [entry["status"] for entry in entries]
    assert statuses == ["ok", "shallow", "empty", "unreadable", "unreadable", "same_name", "unreadable"]
    assert "git log failed" in entries[3]["reason"] and "partial clone" in entries[4]["reason"]
    assert f"{repos['shallow']}: shallow (a shallow clone; git fetch --unshallow" in done.stderr
    assert {row["repo_name"][0] for row in read_parquet(tmp_path / "out/commits.parquet")} == {"owner/one"}
    subprocess.run(["git", "-C", repos["shallow"], "remote", "remove", "origin"], check=True)
    subprocess.run(["git", "-C", repos["shallow"], "fetch", "-q", "--unshallow", f"file://{one}"], check=True)
    run_program(TABLES, *flags)
    names = {tuple(row["repo_name"]) for row in read_parquet(tmp_path / "out/commits.parquet")}
    assert names == {("owner/one", "repos/shallow")}
    entries = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert len(entries) == 7 and len({entry["path"] for entry in entries}) == 7


def pack_to_loose(repo: Path) -> None:
    """Unpack a repository's objects, so that one can be taken away."""
    for pack in (repo / "objects/pack").glob("*.pack"):
        content = pack.read_bytes()
        for file in (repo / "objects/pack").glob(f"{pack.stem}.*"):
            file.unlink()
        subprocess.run(["git", "-C", repo, "unpack-objects", "-q"], input=content, check=True)


def test_a_complete_output_is_left_as_it_is(mirrors, tmp_path):
    root, _ = mirrors
    flags = ("--repos", *paths(root), "--output", tmp_path)
    run_program(TABLES, *flags)
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in tmp_path.glob("*.parquet")}
    assert "nothing to do" in run_program(TABLES, *flags).stderr
    assert before == {path.name: (path.stat().st_ino, path.read_bytes()) for path in tmp_path.glob("*.parquet")}
    error = one_error_line(run_program(TABLES, "--repos", paths(root)[0], "--output", tmp_path, ok=False))
    assert f"also has {paths(root)[1]}" in error


def test_a_run_killed_before_its_report_writes_it_next_time(mirrors, tmp_path):
    flags = ("--repos", *paths(mirrors[0]), "--output", tmp_path)
    run_program(TABLES, *flags)
    report = (tmp_path / "commits_report.json").read_bytes()
    (tmp_path / "commits_report.json").unlink()
    run_program(TABLES, *flags)
    assert (tmp_path / "commits_report.json").read_bytes() == report


def test_a_head_without_its_branch_is_named(mirrors, tmp_path):
    add_commits(tmp_path / "one.git", ("first", {"a.py": (TEXT, "x")}))
    subprocess.run(["git", "-C", tmp_path / "one.git", "symbolic-ref", "HEAD", "refs/heads/gone"], check=True)
    done = run_program(TABLES, "--repos", tmp_path / "one.git", "--output", tmp_path / "out", ok=False)
    assert "HEAD is refs/heads/gone, which does not exist; git symbolic-ref" in one_error_line(done)


def test_bad_inputs_are_one_line(mirrors, tmp_path):
    (tmp_path / "none").write_text("\n", encoding="utf-8")
    (tmp_path / "plain/inside").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path / "plain"], check=True)
    cases = {
        ("--repos", tmp_path / "gone"): "No such file or directory",
        ("--repos", tmp_path / "plain/inside"): "not its root",
        ("--repos", tmp_path / "plain"): "no commits yet",
        ("--repos-file", tmp_path / "none"): "expected one path of a repository per line",
        ("--repos-file", tmp_path / "gone"): "gone",
        ("--repos", tmp_path, "--shard", "3/2"): "--shard: 3/2",
        ("--repos", tmp_path, "--memory", "1"): "--memory 1",
    }
    for number, (flags, expected) in enumerate(cases.items()):
        output = tmp_path / f"out{number}"
        assert expected in one_error_line(run_program(TABLES, *flags, "--output", output, ok=False))
        assert list(output.glob("*.parquet")) == []
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.jsonl").write_text('{"x": 1}\n', encoding="utf-8")
    root, _ = mirrors
    flags = ("--repos", *paths(root), "--output", damaged)
    assert "manifest.jsonl, line 1: not an entry" in one_error_line(run_program(TABLES, *flags, ok=False))
    file = tmp_path / "none"
    error = one_error_line(run_program(TABLES, "--repos", *paths(root), "--output", file, ok=False))
    assert "none: cannot be written" in error
    no_git = {**os.environ, "PATH": str(tmp_path)}
    error = one_error_line(run_program(TABLES, "--repos", *paths(root), "--output", damaged, ok=False, env=no_git))
    assert "git is not installed" in error
