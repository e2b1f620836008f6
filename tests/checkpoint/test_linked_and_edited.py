"""Checkpoints that are links to elsewhere, and training data that is edited between two starts."""

import os
import shutil
from pathlib import Path

import pytest
from checkpoint_runs import run, write_inputs

from megatron_ft.checkpoint.resume import CONTENT, MODIFIED
from megatron_ft.weights import directory
from megatron_ft.weights.manifest import read_manifest

MORE = "--train-iters {} --save-interval 1 --keep-last 1"


@pytest.fixture
def inputs(tmp_path) -> str:
    (tmp_path / "inputs").mkdir()
    return write_inputs(tmp_path / "inputs")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_linked_checkpoint_is_resumed_and_never_deleted_through_its_link(inputs, tmp_path):
    save, elsewhere = tmp_path / "save", tmp_path / "elsewhere"
    assert run(inputs, save, MORE.format(1))[0] == 0
    shutil.move(save / "iter_0000001", elsewhere)
    (save / "iter_0000001").symlink_to(elsewhere)
    before = contents(elsewhere)
    status, log = run(inputs, save, MORE.format(3))
    assert status == 0 and "resume: " in log and "iteration 1," in log
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000003"]
    assert contents(elsewhere) == before


@pytest.mark.parametrize(
    "change", ["discard", "commit", "commit over a link to nowhere", "unfinished deletion", "damaged twice"]
)
def test_links_are_removed_without_what_they_lead_to(tmp_path, change):
    save, elsewhere = tmp_path / "save", tmp_path / "elsewhere"
    save.mkdir()
    elsewhere.mkdir()
    (elsewhere / "manifest.json").write_text("{}")
    final = save / "iter_0000100"
    final.symlink_to(tmp_path / "nowhere" if "nowhere" in change else elsewhere)
    if change == "discard":
        directory.discard(final)
    elif change.startswith("commit"):
        staging = directory.staging_directory(save, 100, "0123456789ab")
        staging.mkdir()
        directory.commit(save, 100, staging)
        assert final.is_dir() and not final.is_symlink()
    elif change == "unfinished deletion":
        final.rename(save / "deleting-iter_0000100-7")
        assert directory.remove_leftovers(save) == ["deleting-iter_0000100-7"]
        assert list(save.iterdir()) == []
    else:
        (save / "damaged-iter_0000100").symlink_to(elsewhere)
        directory.move_damaged(save, 100)
        assert not os.path.lexists(final)
    assert contents(elsewhere) == {"manifest.json": b"{}"}


def edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_training_data_edited_in_place_is_refused_and_a_copy_is_not(inputs, tmp_path):
    save = tmp_path / "save"
    assert run(inputs, save, MORE.format(1))[0] == 0
    (data,) = tmp_path.glob("inputs/first_targets_document.bin")
    os.utime(data, (0, 0))
    os.utime(tmp_path / "inputs/second_inputs_document.idx", (2_000_000_000, 2_000_000_000))
    status, log = run(inputs, save, MORE.format(2))
    assert status == 0 and "changed on resume: last modification of the training data was 20" in log
    edit(data)
    status, _ = run(inputs, save, MORE.format(3))
    assert "content of the training data was sampled digest " in str(status)


def test_a_checkpoint_of_before_data_was_sampled_is_resumed(inputs, tmp_path):
    save = tmp_path / "save"
    assert run(inputs, save, MORE.format(1))[0] == 0
    where = save / "iter_0000001"
    manifest = read_manifest(where)
    for name in (CONTENT, MODIFIED):
        del manifest.data[name]
    manifest.write(where)
    assert run(inputs, save, MORE.format(2))[0] == 0
