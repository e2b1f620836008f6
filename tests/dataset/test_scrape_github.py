"""dataset/commitpack/scrape_github.py against a real git server: what is asked for, and what is
recorded whatever the server answers."""

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import one_error_line, run_program
from git_server import GitServer, serve
from served_history import (
    EXECUTABLE,
    REGULAR,
    SUBMODULE,
    SYMLINK,
    Change,
    blob_ids,
    contents,
    make_repository,
    metadata,
    numbered,
    read_rows,
    text,
    write_rows,
)

SCRAPE = "dataset/commitpack/scrape_github.py"
EXIT_RESUME = 75
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
ODD_NAMES = [
    "with blank.py",
    "line\nbreak.py",
    'it\'s "quoted".py',
    "a;touch x;.py",
    "-rf.py",
    "ünï.py",
    ":0.py",
    "$(id).py",
]


@pytest.fixture
def root(tmp_path) -> Path:
    """The directory of the repositories that are served."""
    return tmp_path / "served"


@pytest.fixture
def server(root):
    with serve(root) as server:
        yield server


def scrape(server: GitServer | str, tmp_path: Path, rows: list[dict] | Path, *flags, output="out", **kwargs):
    """Run the scraper at full speed; the output directory and the finished process."""
    source = rows if isinstance(rows, Path) else write_rows(tmp_path / "metadata.jsonl", rows)
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    url = server if isinstance(server, str) else server.url
    command = [SCRAPE, "--input", source, "--output", tmp_path / output, "--base-url", url, "--rate", 1000]
    done = run_program(*command, "--temporary-directory", scratch, *flags, **kwargs)
    assert not list(scratch.iterdir()), "a scratch repository is left"
    return tmp_path / output, done


def statuses(output: Path) -> list[str]:
    return [row["status"] for path in sorted((output / "status").iterdir()) for row in read_rows(path)]


def files_of(output: Path) -> dict[str, bytes]:
    """Everything that a user reads of an output."""
    found = [path for path in output.rglob("*") if path.is_file() and ".scrape" not in path.parts]
    return {str(path.relative_to(output)): path.read_bytes() for path in [*found]}


@pytest.mark.parametrize("blobs_known, requests", [(False, 4), (True, 2)])
def test_a_repository_takes_four_requests_or_two_with_blob_ids(root, server, tmp_path, blobs_known, requests):
    repo = root / "o/n"
    ids = make_repository(repo, numbered(220))[1:]
    blobs = blob_ids(repo, ids) if blobs_known else [{}] * len(ids)
    rows = [metadata(id, "o/n", **known) for id, known in zip(ids, blobs, strict=True)]
    output, _ = scrape(server, tmp_path, rows)
    assert len(server.log) == requests
    scraped = read_rows(output / "part-00000.jsonl")
    assert [row["commit"] for row in scraped] == ids
    assert [row["old_contents"].encode() for row in scraped] == contents(repo, [f"{id}^:a.py" for id in ids])
    assert [row["new_contents"].encode() for row in scraped] == contents(repo, [f"{id}:a.py" for id in ids])


def test_rows_have_commitpacks_schema(root, server, tmp_path):
    id = make_repository(root / "o/n", numbered(1))[1]
    row = metadata(id, "o/n,o/n")
    output, done = scrape(server, tmp_path, [row])
    assert read_rows(output / "part-00000.jsonl") == [
        {
            "commit": id,
            "old_file": "a.py",
            "new_file": "a.py",
            "old_contents": "0\n" * 20,
            "new_contents": "1\n" * 20,
            "subject": row["subject"],
            "message": row["message"],
            "lang": "Python",
            "license": "mit",
            "repos": "o/n,o/n",
        }
    ]
    assert read_rows(output / "status/part-00000.jsonl") == [
        {"commit": id, "new_file": "a.py", "status": "ok", "repo": "o/n"}
    ]
    assert "1 row of metadata, 1 scraped" in done.stderr


KINDS = [
    ("no_parent", {"a.py": text("first\n"), "s.py": text("a.py", SYMLINK), "x.py": text("x\n")}),
    ("ok", {"a.py": text("second\n")}),
    ("ok", {"a.py": text("third\n", EXECUTABLE), "new.py": text("added\n")}),
    ("not_modified", {"a.py": text("third\n", REGULAR)}),
    ("not_modified", {"b.py": text("another file\n")}),
    ("symlink_or_submodule", {"a.py": text("x.py", SYMLINK)}),
    ("symlink_or_submodule", {"a.py": (SUBMODULE, b"1" * 40)}),
    ("symlink_or_submodule", {"a.py": text("a file again\n")}),
    ("binary", {"a.py": (REGULAR, b"a\0b")}),
    ("binary", {"a.py": text("text again\n")}),
    ("not_utf8", {"a.py": (REGULAR, "é".encode("latin-1"))}),
    ("not_utf8", {"a.py": text("utf-8 again\n")}),
    ("lfs_pointer", {"a.py": text(LFS)}),
    ("lfs_pointer", {"a.py": text("in the repository again\n")}),
    ("too_large", {"a.py": text("x" * 2000)}),
    ("too_large", {"a.py": text("small again\n")}),
    ("ok", {"a.py": text("")}),
    ("not_modified", {"a.py": None}),
    ("not_modified", {"a.py": text("added again\n")}),
]


def test_every_kind_of_change_gets_its_status(root, server, tmp_path):
    ids = make_repository(root / "o/n", [Change(f"{i}", files) for i, (_, files) in enumerate(KINDS)])
    output, _ = scrape(server, tmp_path, [metadata(id, "o/n") for id in ids], "--max-file-bytes", 1000)
    assert statuses(output) == [status for status, _ in KINDS]
    assert len(server.log) == 4


def test_a_merge_is_compared_with_its_first_parent(root, server, tmp_path):
    changes = [*numbered(1), Change("Side", {"s.py": text("s\n")}, root=True)]
    changes.append(Change("Merge", {"a.py": text("merged\n"), "s.py": text("s\n")}, merge=3))
    id = make_repository(root / "o/n", changes)[-1]
    output, _ = scrape(server, tmp_path, [metadata(id, "o/n"), metadata(id, "o/n", "s.py")])
    assert statuses(output) == ["ok", "not_modified"]
    assert read_rows(output / "part-00000.jsonl")[0]["old_contents"] == "1\n" * 20


def test_file_names_may_hold_anything(root, server, tmp_path):
    changes = [Change("All", {name: text("old\n") for name in ODD_NAMES})]
    changes += [Change("One", {name: text(f"new {name}")}) for name in ODD_NAMES]
    ids = make_repository(root / "o/n", changes)[1:]
    rows = [metadata(id, "o/n", name) for id, name in zip(ids, ODD_NAMES, strict=True)]
    output, _ = scrape(server, tmp_path, rows)
    scraped = read_rows(output / "part-00000.jsonl")
    assert [(row["new_file"], row["new_contents"]) for row in scraped] == [(name, f"new {name}") for name in ODD_NAMES]


def test_a_renamed_file_is_read_under_both_names(root, server, tmp_path):
    changes = [*numbered(1), Change("Rename", {"a.py": None, "b.py": text("1\n" * 19)})]
    id = make_repository(root / "o/n", changes)[-1]
    output, _ = scrape(server, tmp_path, [metadata(id, "o/n") | {"new_file": "b.py"}])
    (row,) = read_rows(output / "part-00000.jsonl")
    assert (row["old_contents"], row["new_contents"]) == ("1\n" * 20, "1\n" * 19)


def test_unknown_commits_cost_one_fetch_each_and_not_the_others(root, server, tmp_path):
    unknown = 12
    ids = make_repository(root / "o/n", numbered(60))[1:]
    gone = [f"{i:040x}" for i in range(1, unknown + 1)]
    mixed = [id for pair in zip(gone, ids, strict=False) for id in pair] + ids[unknown:]
    output, _ = scrape(server, tmp_path, [metadata(id, "o/n") for id in mixed])
    assert statuses(output) == ["commit_gone" if id in gone else "ok" for id in mixed]
    assert [row["commit"] for row in read_rows(output / "part-00000.jsonl")] == ids
    assert len(server.log) <= 4 + 2 * unknown  # a fetch is a list of references and a pack, which fails here


@pytest.mark.parametrize("unknown", [1, 30])
def test_unknown_blobs_do_not_cost_the_others(root, server, tmp_path, unknown):
    repo = root / "o/n"
    ids = make_repository(repo, numbered(40))[1:]
    rows = [metadata(id, "o/n", **blobs) for id, blobs in zip(ids, blob_ids(repo, ids), strict=True)]
    rows[:unknown] = [row | {"old_sha1": f"{i:040x}"} for i, row in enumerate(rows[:unknown], 1)]
    output, _ = scrape(server, tmp_path, rows)
    assert statuses(output) == ["missing_blob"] * unknown + ["ok"] * (40 - unknown)


def test_ids_of_zeros_are_never_asked_for(root, server, tmp_path):
    repo, zeros = root / "o/n", "0" * 40
    (id,) = make_repository(repo, numbered(1))[1:]
    (blobs,) = blob_ids(repo, [id])
    output, _ = scrape(server, tmp_path, [metadata(id, "o/n"), metadata(zeros, "o/n")])
    assert statuses(output) == ["ok", "commit_gone"]
    rows = [metadata(id, "o/n", **blobs), metadata(id, "o/n", **blobs | {"old_sha1": zeros})]
    output, _ = scrape(server, tmp_path, rows, output="blobs")
    assert statuses(output) == ["ok", "missing_blob"]
    assert len(server.log) == 4 + 2


def test_forks_are_tried_in_order_for_what_is_missing(root, server, tmp_path):
    ids = make_repository(root / "up/n", numbered(5))[1:]
    make_repository(root / "old/n", numbered(2))  # the same commits, fewer of them
    repos = ["gone/n,old/n,up/n", "old/n,up/n", "up/n,old/n", "old/n", "gone/n,missing/n"]
    output, _ = scrape(server, tmp_path, [metadata(id, list) for id, list in zip(ids, repos, strict=True)])
    found = [(row["status"], row["repo"]) for row in read_rows(output / "status/part-00000.jsonl")]
    assert found == [
        ("ok", "old/n"),
        ("ok", "old/n"),
        ("ok", "up/n"),
        ("commit_gone", "old/n"),
        ("repo_gone", "gone/n"),
    ]
    assert [row["repos"] for row in read_rows(output / "part-00000.jsonl")] == repos[:3]
    assert server.requests_for("gone/n") == server.requests_for("missing/n") == 1


def test_a_shallow_mirror_lacks_the_parent_of_its_last_commit(root, server, tmp_path):
    ids = make_repository(root / "full/n", numbered(4))[1:]
    clone = ["git", "clone", "-q", "--bare", "--depth", "2", f"file://{root}/full/n", root / "shallow/n"]
    subprocess.run(clone, check=True)
    output, _ = scrape(server, tmp_path, [metadata(id, "shallow/n") for id in ids])
    assert statuses(output) == ["commit_gone", "commit_gone", "commit_gone", "ok"]
    other, _ = scrape(server, tmp_path, [metadata(id, "shallow/n,full/n") for id in ids], output="other")
    assert [row["repo"] for row in read_rows(other / "status/part-00000.jsonl")] == ["full/n"] * 3 + ["shallow/n"]


def test_output_has_the_order_of_the_input_however_it_is_divided(root, server, tmp_path):
    ids = {name: make_repository(root / name, numbered(9, salt=name))[1:] for name in ("a/a", "b/b", "c/c")}
    rows = [
        metadata(id, name)
        for triple in zip(*([(i, n) for i in ids[n]] for n in ids), strict=True)
        for id, name in triple
    ]
    source = write_rows(tmp_path / "in.jsonl", rows)
    one, _ = scrape(server, tmp_path, source)
    many, _ = scrape(server, tmp_path, source, "--part-rows", 4, output="many")
    assert [row["commit"] for row in read_rows(one / "part-00000.jsonl")] == [row["commit"] for row in rows]
    parts = sorted(many.glob("part-*.jsonl"))
    assert len(parts) == 7
    assert b"".join(part.read_bytes() for part in parts) == (one / "part-00000.jsonl").read_bytes()
    report = (tmp_path / "many_report.json").read_text(encoding="utf-8")
    assert report == (tmp_path / "out_report.json").read_text(encoding="utf-8")


def test_published_filters_drop_rows_before_anything_is_fetched(root, server, tmp_path):
    ids = make_repository(root / "o/n", numbered(1, "a.py") + numbered(1, "a.unlisted"))
    rows = [
        metadata(ids[3], "o/n", "a.unlisted"),
        metadata(ids[1], "o/n", message="Update a.py"),
        metadata(ids[1], "o/n", message="please\n"),
        metadata(ids[1], "o/n", message="Please\n"),
    ]
    output, done = scrape(server, tmp_path, rows)
    assert statuses(output) == ["ok"]
    assert "noise_message 1" in done.stderr and "suffix 1" in done.stderr and "update_message 1" in done.stderr
    every, _ = scrape(server, tmp_path, rows, "--no-suffix-filter", "--no-message-filter", output="every")
    assert statuses(every) == ["ok"] * 4


def test_parquet_and_jsonl_have_the_same_rows(root, server, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    repo = root / "o/n"
    ids = make_repository(repo, numbered(5))[1:]
    rows = [metadata(id, "o/n") | blobs for id, blobs in zip(ids, blob_ids(repo, ids), strict=True)]
    rows[0]["old_sha1"] = None  # unknown, so the repository takes four requests
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    as_jsonl, _ = scrape(server, tmp_path, tmp_path / "in.parquet")
    assert len(server.log) == 4
    as_parquet, _ = scrape(server, tmp_path, rows, "--format", "parquet", output="parquet")
    assert parquet.read_table(as_parquet / "part-00000.parquet").to_pylist() == read_rows(as_jsonl / "part-00000.jsonl")


@pytest.mark.parametrize("url, move", [("file://{root}", ""), ("{server}/{{repo}}.git", ".git"), ("{server}/", "")])
def test_mirrors_are_read_by_http_and_from_directories(root, server, tmp_path, url, move):
    ids = make_repository(root / "o" / f"n{move}", numbered(3))[1:]
    output, _ = scrape(url.format(root=root, server=server.url), tmp_path, [metadata(id, "o/n") for id in ids])
    assert statuses(output) == ["ok"] * 3
    gone, _ = scrape(url.format(root=root, server=server.url), tmp_path, [metadata(ids[0], "o/x")], output="gone")
    assert statuses(gone) == ["repo_gone"]


def test_a_repository_that_is_too_large_is_fetched_in_smaller_pieces(root, server, tmp_path):
    changes = numbered(2)
    changes[2:2] = [Change("Large", {"large.py": (REGULAR, os.urandom(3 << 20))})]
    changes += [Change("Larger", {"large.py": (REGULAR, os.urandom(3 << 20))})]
    ids = make_repository(root / "o/n", changes)
    rows = [metadata(ids[1], "o/n"), metadata(ids[4], "o/n", "large.py"), metadata(ids[3], "o/n")]
    output, _ = scrape(server, tmp_path, rows, "--max-repository-bytes", 1 << 20)
    assert statuses(output) == ["ok", "too_large", "ok"]


@pytest.mark.parametrize("repos", ["", "../etc", "o/..", "-x/n", "o n/m", "o/n?x", "http://evil/n"])
def test_names_that_cannot_be_part_of_a_url_are_never_asked_for(root, server, tmp_path, repos):
    output, _ = scrape(server, tmp_path, [metadata("1" * 40, repos)])
    assert statuses(output) == ["repo_gone"]
    assert Counter(request.repo for request in server.log) == {}


GOOD = metadata("1" * 40, "o/n")
BAD_INPUT = [
    (
        [{key: value for key, value in GOOD.items() if key != "repos"}],
        [],
        "line 1: no key 'repos'; the row has 'commit'",
    ),
    ([GOOD | {"commit": "main"}], [], "'commit' is not a commit id of 40 lower-case hexadecimal digits"),
    ([GOOD | {"message": 1}], [], "'message' is an integer, not a string"),
    ([GOOD | {"new_sha1": "x"}], [], "is not a blob id"),
    ([GOOD], ["--rate", 0], "--rate 0.0: must be above 0"),
    ([GOOD], ["--base-url", "github.com"], "expected https://HOST, http://HOST or file:///DIRECTORY"),
    ([GOOD], ["--base-url", "ext::sh -c id"], "expected https://HOST, http://HOST or file:///DIRECTORY"),
    ([GOOD], ["--base-url", "file:///no/such"], "file:///no/such: directory not found"),
    ([GOOD], ["--base-url", "https://me:secret@host"], "holds a name or password"),
    ([GOOD], ["--token-variable", "NO_SUCH_TOKEN"], "--token-variable NO_SUCH_TOKEN: not set"),
    ([GOOD], ["--base-url", "http://host", "--token-variable", "PATH_TOKEN"], "would send the token unencrypted"),
    ([GOOD], ["--base-url", "https://host", "--token-variable", "BROKEN_TOKEN"], "holds a blank, a line break"),
]


@pytest.mark.parametrize("rows, flags, message", BAD_INPUT)
def test_bad_input_is_one_line(tmp_path, rows, flags, message):
    env = {**os.environ, "PATH_TOKEN": "abc", "BROKEN_TOKEN": "abc\nHost: x"}
    output, done = scrape("http://127.0.0.1:9", tmp_path, rows, *flags, ok=False, env=env)
    line = one_error_line(done)
    assert message in line and done.returncode == 2 and "secret" not in done.stderr
    assert not list(output.glob("part-*"))


def test_bad_rows_are_skipped_and_counted_on_request(root, server, tmp_path):
    id = make_repository(root / "o/n", numbered(1))[1]
    source = write_rows(tmp_path / "in.jsonl", [GOOD | {"commit": "x"}, metadata(id, "o/n")])
    with open(source, "a", encoding="utf-8") as file:
        file.write("no JSON\n")
    output, done = scrape(server, tmp_path, source, "--skip-bad-rows")
    assert statuses(output) == ["ok"] and "3 rows of metadata, 1 scraped" in done.stderr and "bad_row 2" in done.stderr


def test_an_old_git_is_named(tmp_path):
    (tmp_path / "git").write_text("#!/bin/sh\necho git version 1.8.3.1\n", encoding="utf-8")
    (tmp_path / "git").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    _, done = scrape("http://127.0.0.1:9", tmp_path, [GOOD], ok=False, env=env)
    assert "git version 1.8.3.1: expected git 2.31 or later" in one_error_line(done)


def test_the_users_git_configuration_has_no_effect(root, server, tmp_path):
    ids = make_repository(root / "o/n", numbered(3))[1:]
    config = tmp_path / ".gitconfig"
    rewrite = ["git", "config", "--file", config, "url.http://127.0.0.1:9/.insteadOf", server.url + "/"]
    subprocess.run(rewrite, check=True)
    env = {**os.environ, "HOME": str(tmp_path), "GIT_DIR": "/no/such", "GIT_TRACE": "1"}
    output, _ = scrape(server, tmp_path, [metadata(id, "o/n") for id in ids], env=env)
    assert statuses(output) == ["ok"] * 3
