"""generate.py with the --save directory of a run: its newest checkpoint is converted once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, one_error_line, run_program
from fixtures.make import TRAINING_FLAGS
from generate_program import GENERATE, texts, write_data
from safetensors.torch import load_file

FIXTURES = ROOT / "tests/fixtures"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What a run saves: a checkpoint, and the copy of its tokenizer."""
    run = tmp_path_factory.mktemp("run") / "first"
    run_program("convert/hf_to_megatron.py", "--load", FIXTURES / "model", "--save", run, "--format", "torch_dist")
    (run / "tokenizer").mkdir()
    shutil.copy(FIXTURES / "tokenizer.json", run / "tokenizer")
    return run


def flags_of(tmp_path: Path) -> list[str]:
    flags = ["--data", str(write_data(tmp_path / "data")), "--languages", "js", "--style", "octocoder"]
    return [*flags, "--tasks", "synthesize", "--samples", "1", "--max-length", "160", "--output", str(tmp_path / "out")]


@pytest.mark.slow
def test_shards_that_start_at_once_convert_the_run_once(run, tmp_path):
    flags = flags_of(tmp_path)
    commands = [[sys.executable, str(ROOT / GENERATE), str(run), *flags, "--shard", f"{i}/2"] for i in (1, 2)]
    shards = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    messages = "".join(shard.communicate(timeout=300)[1] for shard in shards)
    assert [shard.returncode for shard in shards] == [0, 0], messages
    assert messages.count("converting its newest checkpoint") == 1
    assert len(texts(tmp_path / "out")) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["generations", "manifest.json", "model"]
    assert json.loads((tmp_path / "out/manifest.json").read_bytes())["converted_from"] == str(run)
    other = shutil.copytree(run, tmp_path / "second")
    done = run_program(GENERATE, other, *flags, ok=False)
    assert "its 'converted_from' is" in one_error_line(done)


def test_a_run_that_cannot_be_used_is_one_line_and_leaves_no_model(run, tmp_path):
    bare = shutil.copytree(run, tmp_path / "bare")
    shutil.rmtree(bare / "tokenizer")
    done = run_program(GENERATE, bare, *flags_of(tmp_path), ok=False)
    assert "has no tokenizer; convert it with convert/megatron_to_hf.py --tokenizer-file" in one_error_line(done)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_lora_run_is_merged_into_its_base(tmp_path):
    """Adapters that change the weights, and the base's weights in all that they do not touch."""
    save = tmp_path / "adapters"
    flags = [*TRAINING_FLAGS.split(), "--train-iters", "3", "--lr", "0.1", "--lora-rank", "2", "--lora-dropout", "0"]
    run_program("launch/finetune.py", *flags, "--data-cache-path", tmp_path / "cache", "--save", save)
    done = run_program(GENERATE, save, *flags_of(tmp_path))
    assert "converting its newest checkpoint" in done.stderr
    merged, base = (load_file(model / "model.safetensors") for model in (tmp_path / "out/model", FIXTURES / "model"))
    changed = {name for name, tensor in base.items() if not torch.equal(tensor.float(), merged[name].float())}
    assert len(texts(tmp_path / "out")) == 3 and merged.keys() == base.keys()
    assert changed == {name for name in base if name.endswith(("attn.weight", "proj.weight", "fc.weight"))}
