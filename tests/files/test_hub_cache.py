"""Directories of the Hub's cache are read at a snapshot; links lead no further than its blobs."""

import os
from pathlib import Path

import pytest

from megatron_ft.errors import UserError
from megatron_ft.files.hub_cache import download_hint, leads_outside, resolve_hub_cache

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path) -> Path:
    """The cache of one model with two snapshots, the first the newer one, and no refs."""
    folder = tmp_path / "models--bigcode--starcoder"
    for commit, time in ((FIRST, 2_000_000_000), (SECOND, 1_000_000_000)):
        (folder / "snapshots" / commit).mkdir(parents=True)
        os.utime(folder / "snapshots" / commit, (time, time))
    return folder


def test_the_newest_snapshot_is_read_without_refs(cache):
    for path in (cache, cache / "snapshots"):
        snapshot, notice = resolve_hub_cache(path)
        assert snapshot.name == FIRST and "the newest of them" in notice and "\n" not in notice


def test_the_snapshot_of_refs_main_is_read(cache):
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(SECOND + "\n")
    snapshot, notice = resolve_hub_cache(cache)
    assert snapshot.name == SECOND and "that of refs/main" in notice


@pytest.mark.parametrize("content", [b"c" * 40, b"../../..", b"\xff\xfe", b"", b"a" * 10_000])
def test_refs_that_name_no_snapshot_are_ignored(cache, content):
    (cache / "refs").mkdir()
    (cache / "refs/main").write_bytes(content)
    assert resolve_hub_cache(cache)[0].name == FIRST


def test_a_cache_is_found_from_inside_of_it(cache, monkeypatch):
    monkeypatch.chdir(cache)
    assert resolve_hub_cache(Path("."))[0].name == FIRST


def test_other_paths_are_returned_as_they_are(cache, tmp_path):
    (tmp_path / "models--only--named--so").mkdir()
    for path in (tmp_path, tmp_path / "missing", cache / "snapshots" / SECOND, tmp_path / "models--only--named--so"):
        assert resolve_hub_cache(path) == (path, None)


def test_a_cache_without_snapshot_names_the_command(tmp_path):
    folder = tmp_path / "models--bigcode--starcoder"
    (folder / "blobs").mkdir(parents=True)
    with pytest.raises(UserError, match="hf download bigcode/starcoder"):
        resolve_hub_cache(folder)


@pytest.mark.parametrize(
    "path", ["data/rows.jsonl", "model/tokenizer.json", "/a/b", "a/b/c", "word", "tests/none", "../x"]
)
def test_only_names_of_models_are_taken_for_models_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    assert download_hint(path) == ""
    assert "hf download Qwen/Qwen2.5-0.5B" in download_hint("Qwen/Qwen2.5-0.5B")


def link(file: Path, target: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target)
    return file


def test_links_inside_a_directory_and_to_the_blobs_of_its_cache_are_followed(cache, tmp_path):
    snapshot = cache / "snapshots" / FIRST
    (cache / "blobs").mkdir()
    (cache / "blobs/0123").write_text("content")
    (snapshot / "here.jinja").write_text("content")
    for file in (
        snapshot / "here.jinja",
        link(snapshot / "there.jinja", Path("here.jinja")),
        link(snapshot / "blob.jinja", Path("../../blobs/0123")),
        link(snapshot / "more/blob.jinja", Path("../../../blobs/0123")),
    ):
        assert not leads_outside(file, snapshot)
    link(tmp_path / "short", snapshot)
    assert not leads_outside(tmp_path / "short/blob.jinja", tmp_path / "short")


def test_links_to_anywhere_else_lead_outside(cache, tmp_path):
    snapshot, secret = cache / "snapshots" / FIRST, tmp_path / "secret"
    secret.write_text("secret")
    link(cache / "blobs/0123", secret)
    (tmp_path / "folder").mkdir()
    for file, directory in (
        (link(snapshot / "a.jinja", secret), snapshot),
        (link(snapshot / "b.jinja", Path("../../blobs/0123")), snapshot),
        (link(tmp_path / "folder/c.jinja", Path("../secret")), tmp_path / "folder"),
        (link(tmp_path / "folder/more", cache) / "snapshots" / FIRST / "a.jinja", tmp_path / "folder"),
    ):
        assert leads_outside(file, directory)
