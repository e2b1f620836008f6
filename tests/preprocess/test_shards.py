"""slurm/preprocess.sh without SLURM: which shards it makes again, and what its merge refuses.

A stand-in for sbatch runs each job at once; tests/slurm has the real one.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line
from tokenize_runs import token_bytes, tokenize, write_rows_and_tokenizer

from megatron_ft.data.provenance import Provenance, difference

# Runs the tasks of an array one by one; a job with a dependency only if all tasks succeeded.
SBATCH = """#!/bin/bash
array=0
for word in "$@"; do
  case $word in
  --array=*) array=${word#*=} ;;
  --dependency=*) [ ! -e failed ] || { echo 9; exit; } ;;
  -*) ;;
  *) break ;;
  esac
  shift
done
while [[ $1 == -* ]]; do shift; done
for SLURM_ARRAY_TASK_ID in ${array//,/ }; do
  echo "task $SLURM_ARRAY_TASK_ID of $2" >>jobs
  export SLURM_ARRAY_TASK_ID SLURM_JOB_ID=7 SLURM_CPUS_PER_TASK=1
  bash "$@" >>log 2>&1 || touch failed
done
echo 7
"""
SCONTROL = '#!/bin/bash\necho "   Command=$SCRIPT"\n'
SHARDS = 2


class Site:
    """A directory with rows and a tokenizer, a checkout, and the programs of SLURM."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.script = directory / "checkout" / "slurm" / "preprocess.sh"
        shutil.copytree(ROOT / "slurm", self.script.parent, ignore=shutil.ignore_patterns("cluster.env"))
        (self.script.parent / "cluster.env").write_text(f"VENV={shlex.quote(sys.prefix)}\n")
        for room in ("launch", "preprocess"):
            (directory / "checkout" / room).symlink_to(ROOT / room)
        for name, code in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
            (directory / "bin").mkdir(exist_ok=True)
            (directory / "bin" / name).write_text(code)
            (directory / "bin" / name).chmod(0o755)

    def run(self, *words: str, ok: bool = True, **variables: str) -> subprocess.CompletedProcess:
        """Run preprocess.sh with these words; `ok`: it and all its jobs end with status 0."""
        env = os.environ | {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "SCRIPT": str(self.script),
            "SHARDS": str(SHARDS),
            "TOKENIZER_FILE": "t.json",
            "OUTPUT_PREFIX": "out/set",
        }
        env.pop("SLURM_JOB_ID", None)
        for name in ("jobs", "log", "failed"):
            (self.directory / name).unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", self.script, *words], cwd=self.directory, env=env | variables, capture_output=True, text=True
        )
        if ok:
            assert done.returncode == 0 and not (self.directory / "failed").exists(), done.stderr + self.read("log")
        return done

    def read(self, name: str) -> str:
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    def tokenized(self) -> list[int]:
        """The shards that the last run made."""
        return [int(line.split()[1]) for line in self.read("jobs").splitlines() if line.endswith("shard")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Site:
    """A site where all shards are made and merged."""
    site = Site(write_rows_and_tokenizer(tmp_path_factory.mktemp("site")))
    spec = json.loads(site.read("t.json"))
    spec["model"]["merges"] = spec["model"]["merges"][:-1]  # other ids, the same vocabulary
    (site.directory / "u.json").write_text(json.dumps(spec))
    lines = site.read("rows.jsonl").splitlines(keepends=True)
    (site.directory / "other").mkdir()
    (site.directory / "other" / "rows.jsonl").write_text("".join(lines[5:]))
    done = site.run("rows.jsonl")
    assert site.tokenized() == [1, 2] and done.stdout.split()[-1] == "7"
    tokenize(site.directory, site.directory / "single")
    assert token_bytes(site.directory / "out/set") == token_bytes(site.directory / "single")
    return site


@pytest.fixture
def site(prepared, tmp_path) -> Site:
    """A copy of the prepared site."""
    shutil.copytree(prepared.directory, tmp_path / "copy", symlinks=True)
    copy = Site.__new__(Site)
    copy.directory, copy.script = tmp_path / "copy", tmp_path / "copy" / "checkout" / "slurm" / "preprocess.sh"
    return copy


def test_the_same_command_makes_no_shard_again(site):
    site.run("rows.jsonl")
    assert site.tokenized() == [] and site.read("jobs") == "task 0 of merge\n"


@pytest.mark.parametrize(
    ("words", "tokenizer", "reason"),
    [
        (["other/rows.jsonl"], "t.json", "made from rows.jsonl of "),
        (["rows.jsonl", "--no-append-eod"], "u.json", "made with the tokenizer t.json, sha256 "),
    ],
    ids=["other rows", "another tokenizer"],
)
def test_shards_of_another_command_are_made_again(site, words, tokenizer, reason):
    done = site.run(*words, TOKENIZER_FILE=tokenizer)
    assert site.tokenized() == [1, 2]
    assert done.stderr.count("is tokenized again") == 2 and f"out/set-shard-2-of-2: {reason}" in done.stderr
    rows, *flags = words
    single, t = site.directory / "expected", site.directory / tokenizer
    tokenize(site.directory, single, "--tokenizer-file", t, *flags, rows=site.directory / rows)
    assert token_bytes(site.directory / "out/set") == token_bytes(single)
    assert Provenance.read(site.directory / "out/set") == Provenance.read(single)


EXPECTED = Provenance(
    "t.json",
    "0" * 64,
    True,
    (),
    (2, 3),
    (("a.jsonl", 100), ("b.jsonl", 5)),
    (("inputs",), ("outputs",)),
    {"--fim-rate": "0.5", "--seed": "1"},
)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"tokenizer": "copy.json"}, None),
        ({"keys": None}, None),
        (
            {"sha256": "1" * 64},
            "made with the tokenizer t.json, sha256 111111111111, expected t.json, sha256 000000000000",
        ),
        ({"sha256": None}, "made with the tokenizer t.json, sha256 unknown, expected t.json, sha256 000000000000"),
        ({"append_eod": False}, "made with another --append-eod (false), expected true"),
        ({"literal_special_tokens": ("<x>",)}, 'made with another --literal-special-tokens (["<x>"]), expected []'),
        ({"flags": {"--fim-rate": "0.5", "--seed": "7"}}, 'made with another --seed ("7"), expected "1"'),
        ({"flags": {}}, 'made with another --fim-rate (null), expected "0.5"'),
        (
            {"keys": (("q",), ("a",))},
            'made from the keys [["q"], ["a"]] of each row, expected [["inputs"], ["outputs"]]',
        ),
        ({"inputs": (("a.jsonl", 100),)}, "made from 1 files (a.jsonl), expected 2"),
        ({"inputs": (("a.jsonl", 99), ("b.jsonl", 5))}, "made from a.jsonl of 99 bytes, expected a.jsonl of 100 bytes"),
        ({"inputs": (("b.jsonl", 5), ("a.jsonl", 100))}, "made from b.jsonl of 5 bytes, expected a.jsonl of 100 bytes"),
        ({"shard": (1, 3)}, "shard 1 of 3, expected shard 2 of 3"),
        ({"shard": (2, 4)}, "shard 2 of 4, expected shard 2 of 3"),
    ],
    ids=str,
)
def test_the_first_difference_is_named(change, text):
    assert difference(EXPECTED, replace(EXPECTED, **change)) == text


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda shard: Path(f"{shard}_made_from.json").unlink(),
            "not found, so what the shard was made from is unknown",
        ),
        (
            lambda shard: Path(f"{shard}_made_from.json").write_text("{", encoding="utf-8"),
            "damaged (JSON that ends too early",
        ),
        (lambda shard: truncate(Path(f"{shard}_targets_document.bin")), "bytes, expected"),
    ],
    ids=["no provenance", "damaged provenance", "truncated tokens"],
)
def test_only_a_damaged_shard_is_made_again(site, damage, reason):
    damage(site.directory / "out" / "set-shard-2-of-2")
    done = site.run("rows.jsonl")
    assert site.tokenized() == [2] and reason in done.stderr
    assert token_bytes(site.directory / "out/set") == token_bytes(site.directory / "single")


def test_the_merge_refuses_shards_of_another_command(site):
    """Such as rows that were replaced between the shards and the merge."""
    before = token_bytes(site.directory / "out/set")
    settings = ("merge", str(SHARDS), "t.json", "out/set")
    done = site.run(*settings, "other/rows.jsonl", ok=False, SLURM_JOB_ID="7")
    assert done.returncode == 2
    line = one_error_line(done)
    assert line.startswith("error: shard 1 of 2 cannot be merged: out/set-shard-1-of-2: made from rows.jsonl of ")
    Path(site.directory / "out/set-shard-2-of-2_made_from.json").unlink()
    line = one_error_line(site.run(*settings, "rows.jsonl", ok=False, SLURM_JOB_ID="7"))
    assert "shard 2 of 2 cannot be merged: out/set-shard-2-of-2_made_from.json: not found" in line
    assert token_bytes(site.directory / "out/set") == before


def test_a_wrong_flag_is_reported_before_anything_is_submitted(site):
    done = site.run("rows.jsonl", "--bogus", ok=False)
    assert done.returncode == 2 and "--bogus" in one_error_line(done) and site.read("jobs") == ""
