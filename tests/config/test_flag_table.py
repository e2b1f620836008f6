"""The table of flags: one edit adds a flag to everything that derives from it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from megatron_ft.config.command_line import build_parser, former_spellings, option_strings, words_of
from megatron_ft.config.config import ENTRIES, Config
from megatron_ft.config.flag import Mtf, Resume

# A field for flags.py: bounds, a resume rule, the branch's spelling, a place in plans.
MADE_UP = """
    spin: int = flag(
        "--spin", 3, "made-up number", bounds=Bound(1, 8), resume=FIXED, mtf="--branch-spin", planned=True,
        aliases=("--former-spin",),
    )
"""
USE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from megatron_ft.checkpoint.resume import compare
from megatron_ft.config.arguments import parse_args
from megatron_ft.config.table import flags_table
from megatron_ft.errors import UserError
from megatron_ft.launcher.mtf import mtf_flags
from megatron_ft.weights.manifest import Manifest

words = sys.argv[1].split()
run = parse_args([*words, "--former-spin", "5"])
assert run.training.spin == 5 and run.values()["spin"] == 5
try:
    parse_args([*words, "--spin", "9"])
except UserError as error:
    print("bounds:", error)
manifest = Manifest(0, run.shape.as_dict(), run.values(), {}, {})
print("resume:", *compare(manifest, run.with_flags(spin=6), run.shape, {}).refused)
composed = mtf_flags(run.with_flags(save=sys.argv[2], from_scratch=True))
print("mtf:", *composed[composed.index("--branch-spin"):][:2])
print("table:", next(line for line in flags_table().splitlines() if "--spin" in line))
"""


@pytest.fixture
def with_made_up_flag(tmp_path) -> Path:
    """A copy of the sources in which flags.py has one more field, and nothing else is changed."""
    for folder in ("megatron_ft", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "megatron_ft/config/flags.py"
    text = table.read_text()
    group = text.index('"""Training."""') + len('"""Training."""\n')
    table.write_text(text[:group] + MADE_UP + text[group:])
    return tmp_path


def test_a_flag_is_added_by_one_edit(with_made_up_flag, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    words = f"--preset tiny --data-prefix data --tokenizer-file {tokenizer} --train-iters 2"
    env = {**os.environ, "PYTHONPATH": str(with_made_up_flag)}

    def python(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = dict(line.split(": ", 1) for line in python("-c", USE, words, str(tmp_path / "run")).splitlines())
    assert printed == {
        "bounds": "--spin 9: must be at least 1 and below 8",
        "resume": "--spin was 5, is 6",
        "mtf": "--branch-spin 5",
        "table": "| `--spin` | 3 | made-up number | at least 1 and below 8 | fixed | `--branch-spin` |  |",
    }
    plan = python("launch/plan.py", "--preset", "tiny", "--nodes", "1", "--gpu", "h100-80gb", "--spin", "4")
    assert "--spin 4" in plan
    assert "made-up number (default: 3)" in python("-m", "megatron_ft.finetune", "--help")


def test_names_in_manifests_follow_the_flags_names():
    for dest, entry in ENTRIES.items():
        assert entry.flag.name == f"--{dest.replace('_', '-')}"


def test_option_strings_are_those_of_the_parser():
    assert set(option_strings()) | {"-h", "--help"} == set(build_parser(reads_config=False).actions)


def test_no_spelling_has_two_meanings():
    assert not set(former_spellings()) & set(option_strings())


@pytest.mark.parametrize(
    "dest, value, words",
    [
        ("train_iters", 5, ["--train-iters", "5"]),
        ("rampup_batch_size", [2, 2, 8], ["--rampup-batch-size", "2", "2", "8"]),
        ("bf16", True, ["--bf16"]),
        ("bf16", False, []),
        ("reset_position_ids", False, ["--no-reset-position-ids"]),
    ],
)
def test_a_flag_is_written_as_it_is_typed(dest, value, words):
    assert words_of(ENTRIES[dest], value) == words


def test_a_config_is_changed_only_by_a_copy():
    config = Config()
    changed = config.with_flags(seq_length=8, tensor_model_parallel_size=2, world_size=4)
    assert (changed.data.seq_length, changed.parallel.tensor, changed.parallel.data) == (8, 2, 2)
    assert config == Config()
    with pytest.raises(AttributeError):
        changed.data.seq_length = 9


def test_every_rule_is_used():
    flags = [entry.flag for entry in ENTRIES.values()]
    assert {flag.resume for flag in flags} == set(Resume)
    assert {flag.mtf for flag in flags} >= set(Mtf)
