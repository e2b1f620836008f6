"""First bytes: a file of another kind is recognized, one of the expected kind is not accused."""

import io
import pickle
import sqlite3
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_ft.files.first_bytes import describe, what_it_is


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"), io.BytesIO())


def sqlite(path):
    with sqlite3.connect(path) as database:
        database.execute("create table t (a)")


MAKERS = {
    "zip": lambda path: torch.save({"a": torch.ones(2)}, path),
    "safetensors": lambda path: save_file({"a": torch.ones(2)}, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps([1, 2, 3])),
    "numpy": lambda path: np.save(path.open("wb"), np.ones(2)),
    "tar": tar,
    "sqlite": sqlite,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_kinds_are_recognized_unless_expected(tmp_path, kind):
    MAKERS[kind](tmp_path / "file")
    assert what_it_is(tmp_path / "file") and what_it_is(tmp_path / "file", expected={kind}) is None


@pytest.mark.parametrize(
    "start", [b"", b"{}", b'{"a": 1}\n', b"[1]", b"\xef\xbb\xbf{}", b"def f():", "é".encode(), b"\xff"]
)
def test_other_files_are_not_accused(start):
    assert describe(start) is None


@pytest.mark.parametrize("start", [b"<!DOCTYPE html>", b"\n<html lang='en'>", b'<?xml version="1.0"?>'])
def test_pages_are_recognized_behind_a_byte_order_mark(start):
    assert describe(b"\xef\xbb\xbf" + start) == describe(start) is not None


def test_unreadable_paths_are_not_described(tmp_path):
    assert what_it_is(tmp_path) is None and what_it_is(tmp_path / "none") is None
