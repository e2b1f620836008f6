"""Adapters are only used with the base weights they were trained on, wherever these are."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_runs import run, tensor_bytes, write_inputs
from conversions import convert, refusal
from safetensors.torch import load_file, save_file

LORA = "--lora-rank 2 --lora-dropout 0 --train-iters 4"
NOT_THOSE = "the base weights are not those the adapters were trained on"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def base_of(save: Path, iteration: int) -> dict:
    return json.loads((save / f"iter_{iteration:07d}/manifest.json").read_text())["base"]


@pytest.fixture(scope="module")
def models(inputs, tmp_path_factory) -> Path:
    """`base` and `other` of one architecture, and a LoRA run on `base`.

    The run is `uninterrupted`, and as `lora` stopped after two steps.
    """
    folder = tmp_path_factory.mktemp("models")
    assert run(inputs, folder / "base", "--train-iters 2")[0] == 0
    assert run(inputs, folder / "other", "--train-iters 2 --seed 7")[0] == 0
    start = f"--load {folder / 'base'} {LORA}"
    assert run(inputs, folder / "uninterrupted", start)[0] == 0
    assert run(inputs, folder / "lora", f"{start} --exit-interval 2")[0] == 75
    return folder


@pytest.fixture
def copies(models, tmp_path, monkeypatch):
    """A copy of the models; the recorded path of the base does not exist meanwhile."""
    for name in ("base", "other", "lora"):
        shutil.copytree(models / name, tmp_path / name)
    models.joinpath("base").rename(models / "away")
    yield tmp_path
    shutil.rmtree(models / "base", ignore_errors=True)
    models.joinpath("away").rename(models / "base")


def test_load_finds_a_moved_base_but_accepts_no_other_model(inputs, models, copies):
    refused, _ = run(inputs, copies / "lora", f"--load {copies / 'other'} {LORA}")
    assert NOT_THOSE in str(refused) and f"{copies / 'other'}" in refused and "--load" in refused
    merge = ("megatron_to_hf", "--load", copies / "lora", "--merge-lora", "--output", copies / "merged")
    assert NOT_THOSE in refusal(*merge, "--base", copies / "other")

    assert run(inputs, copies / "base", "--train-iters 4")[0] == 0  # it continues; the recorded iteration is used
    status, log = run(inputs, copies / "lora", f"--load {copies / 'base'} {LORA}", "TP2")
    assert status == 0 and f"{copies / 'base/iter_0000002'}" in log
    base = base_of(copies / "lora", 4)
    assert (base["path"], base["iteration"]) == (str(copies / "base"), 2)
    assert base["fingerprint"] == base_of(models / "uninterrupted", 4)["fingerprint"]
    losses = [
        [json.loads(line)["loss"] for line in (save / "metrics.jsonl").open()]
        for save in (copies / "lora", models / "uninterrupted")
    ]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    convert(*merge)  # without --base: the run has recorded where the base is now


def test_a_base_replaced_in_place_is_refused(inputs, models, copies):
    shutil.copytree(copies / "other", models / "base")
    refused, _ = run(inputs, copies / "lora", f"--load {models / 'base'} {LORA}")
    assert NOT_THOSE in str(refused) and str(models / "base/iter_0000002") in refused
    merge = ("megatron_to_hf", "--load", copies / "lora", "--merge-lora", "--output", copies / "merged")
    assert NOT_THOSE in refusal(*merge)
    assert NOT_THOSE in refusal("verify", copies / "lora", copies / "other")
    convert(*merge, "--base", copies / "base")
    # With the right weights in --load, the wrong ones at the recorded path are skipped.
    assert run(inputs, copies / "lora", f"--load {copies / 'base'} {LORA}")[0] == 0
    assert tensor_bytes(copies / "lora/iter_0000004") == tensor_bytes(models / "uninterrupted/iter_0000004")


def test_load_is_used_when_the_recorded_iteration_is_gone(inputs, models, copies):
    shutil.copytree(copies / "base", models / "base")
    (models / "base/iter_0000002").rename(models / "base/iter_0000009")
    status, log = run(inputs, copies / "lora", f"--load {copies / 'base'} {LORA}")
    assert status == 0, status
    assert str(copies / "base/iter_0000002") in log
    shutil.rmtree(copies / "base")
    shutil.rmtree(models / "base")
    refused, _ = run(inputs, copies / "lora", LORA)
    assert "base weights" in refused and "no such directory" in refused and "--load" in refused


def test_a_fingerprint_is_the_same_in_every_format_and_differs_for_other_weights(inputs, models, tmp_path):
    hf = tmp_path / "hf"
    convert("megatron_to_hf", "--load", models / "base", "--output", hf)
    resharded = tmp_path / "resharded"
    convert("reshard", "--load", models / "base", "--save", resharded, "--tensor-parallel", "2")
    legacy = tmp_path / "legacy"
    convert("hf_to_megatron", "--load", hf, "--save", legacy, "--format", "legacy", "--tensor-parallel", "2")
    from megatron_ft.weights.fingerprint import fingerprint
    from megatron_ft.weights.open import open_weights

    same = {fingerprint(open_weights(path)) for path in (models / "base", hf, resharded, legacy)}
    assert same == {base_of(models / "uninterrupted", 4)["fingerprint"]}

    assert run(inputs, tmp_path / "lora", f"--load {hf} {LORA} --exit-interval 2")[0] == 75
    weights = load_file(hf / "model.safetensors")
    for name in ("transformer.wte.weight", "transformer.h.1.attn.c_attn.weight", "transformer.ln_f.bias"):
        changed = {key: tensor + 1e-3 if key == name else tensor for key, tensor in weights.items()}
        save_file(changed, hf / "model.safetensors", metadata={"format": "pt"})
        refused, _ = run(inputs, tmp_path / "lora", f"--load {hf} {LORA}")
        assert NOT_THOSE in str(refused), name
    export = ("megatron_to_hf", "--load", tmp_path / "lora", "--output", tmp_path / "peft")
    assert NOT_THOSE in refusal(*export)
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    assert f"to be loaded on {hf}" in convert(*export)
