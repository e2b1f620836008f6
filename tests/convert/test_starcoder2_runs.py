"""StarCoder2 through every program: converted, resharded, trained, resumed, adapted, exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_runs import FLAGS, LAYOUTS, steps, tensor_bytes, train, write_inputs
from conversions import convert, refusal
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_ft.errors import UserError
from megatron_ft.weights.open import open_weights

MODEL = "--position-embedding-type rope --num-query-groups 2 --window-size 8 --untie-embeddings-and-output-weights"
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
DIVISIBLE = ("--make-vocab-size-divisible-by", "16")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(layout: str, inputs: str, save: Path, more: str, status: int = 0) -> str:
    """Run the training program; its lines about the start."""
    ranks, flags = LAYOUTS[layout]
    words = FLAGS.replace("--preset tiny", MODEL)
    words = words.replace("--from-scratch", "") if "--load" in more else words
    command = f"{words} {flags} {inputs} {NO_DROPOUT} --save {save} {more}".split()
    results = run_ranks(train, ranks, command)
    assert {ended for ended, _ in results} == {status}, results
    return "\n".join(results[0][1])


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> tuple[Path, Path]:
    """Four steps with TP2 of a model with untied embeddings, stopped after two and not."""
    folder = tmp_path_factory.mktemp("trained")
    run("TP2", inputs, folder / "stopped", "--train-iters 4 --exit-interval 2", 75)
    shutil.copytree(folder / "stopped", folder / "complete")
    run("TP2", inputs, folder / "complete", "--train-iters 4")
    return folder / "stopped", folder / "complete"


def test_a_run_converts_with_its_logits_and_resumes_in_another_layout(trained, inputs, tmp_path):
    stopped, complete = trained
    out, resharded = tmp_path / "hf", tmp_path / "resharded"
    convert("megatron_to_hf", "--load", stopped, "--output", out)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"], config["num_key_value_heads"]) == ("starcoder2", 8, 2)
    assert config["rope_parameters"]["rope_theta"] == 10000 and config["tie_word_embeddings"] is False
    card = (out / "README.md").read_text()
    assert "A StarCoder2 model" in card and "- starcoder2\n" in card and "grouped-query" in card
    printed = convert("verify", stopped, out, "--logits", "--report", tmp_path / "report.json")
    assert "model.layers.*.self_attn.{q,k,v}_proj.weight" in printed and "lm_head.weight" in printed
    assert json.loads((tmp_path / "report.json").read_text())["largest_logit_difference"] < 1e-5
    assert "d e f" in convert("complete", out, "--prompt", "def f():", "--max-new-tokens", "4")

    layout = ("--tensor-parallel", "1", "--pipeline-parallel", "2")
    convert("reshard", "--load", stopped, "--save", resharded, *layout, *DIVISIBLE)
    before, after = (tensor_bytes(path / "iter_0000002") for path in (stopped, resharded))
    assert before.keys() == after.keys()  # weights and optimizer state; only vocabularies are padded differently
    padded = {key for key in before if "word_embeddings" in key or "output_layer" in key}
    assert len(padded) == 8 and {key for key in before if before[key] != after[key]} == padded
    shutil.copyfile(stopped / "metrics.jsonl", resharded / "metrics.jsonl")
    assert "resume" in run("PP2", inputs, resharded, "--train-iters 4")
    losses = [[step["loss"] for step in steps(save)] for save in (complete, resharded)]
    assert len(losses[0]) == 4 and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5


def test_hugging_face_to_torch_dist_to_another_layout_and_back_is_bitwise_equal(trained, tmp_path):
    hf, core, resharded, back = (tmp_path / name for name in ("hf", "core", "resharded", "back"))
    convert("megatron_to_hf", "--load", trained[0], "--output", hf, "--dtype", "bf16")
    layout = ("--tensor-parallel", "2", "--pipeline-parallel", "2")
    convert("hf_to_megatron", "--load", hf, "--save", core, "--format", "torch_dist", *layout)
    convert("reshard", "--load", core, "--save", resharded, "--tensor-parallel", "4")  # within key/value heads
    convert("megatron_to_hf", "--load", resharded, "--output", back, "--max-shard-size", "20KB")
    shards = [load_file(file) for file in sorted(back.glob("*.safetensors"))]
    found = {name: tensor for shard in shards for name, tensor in shard.items()}
    expected = load_file(hf / "model.safetensors")
    assert len(shards) > 2 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((back / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
    legacy = ("hf_to_megatron", "--load", hf, "--save", tmp_path / "legacy", "--format", "legacy")
    assert "a StarCoder2, which the mtf branch does not have; use --format torch_dist" in refusal(*legacy)


def test_a_lora_run_becomes_a_peft_adapter_and_a_merged_model(trained, inputs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapters = tmp_path / "base", tmp_path / "adapters"
    convert("megatron_to_hf", "--load", trained[1], "--output", base)
    lora = f"--load {base} --lora-rank 4 --lora-dropout 0 --lr 0.1"
    run("TP2", inputs, adapters, f"{lora} --train-iters 2")
    convert("megatron_to_hf", "--load", adapters, "--output", tmp_path / "peft")
    convert("megatron_to_hf", "--load", adapters, "--merge-lora", "--output", tmp_path / "merged")
    convert("megatron_to_hf", "--load", tmp_path / "peft", "--merge-lora", "--output", tmp_path / "again")
    tokens = torch.arange(5, 30)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        without = plain(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()(tokens).logits
    assert (adapted - merged).abs().max() < 1e-5 < (adapted - without).abs().max()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "again")]
    assert weights[0] == weights[1]

    # Training continues from the PEFT directory; its first checkpoint has the adapters it loaded.
    still = lora.replace(str(base), str(tmp_path / "peft")).replace("--lr 0.1", "--lr 1e-30")
    assert "adapters of rank 4" in run("PP2", inputs, tmp_path / "still", f"{still} --min-lr 0 --train-iters 1")
    kept = [tensor_bytes(max(save.glob("iter_*"))) for save in (adapters, tmp_path / "still")]
    names = [name for name in kept[0] if not name.startswith("optimizer")]
    assert len(names) == 8 and all(kept[0][name] == kept[1][name] for name in names)

    file = tmp_path / "peft/adapter_model.safetensors"
    named = load_file(file)
    key = next(name for name in named if "k_proj.lora_A" in name)
    save_file({**named, key: named[key] + 1}, file)
    merge = ("megatron_to_hf", "--load", tmp_path / "peft", "--merge-lora", "--output", tmp_path / "x")
    assert "are not parts of one, with the same lora_A" in refusal(*merge)


def test_an_untied_head_where_tied_is_expected_is_refused(trained, tmp_path):
    convert("megatron_to_hf", "--load", trained[0], "--output", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight, expected the same"):
        open_weights(tmp_path / "hf")
