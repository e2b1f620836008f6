"""Checkpoints of training runs, converted: same logits, resumed after resharding, LoRA to PEFT."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_runs import FLAGS, LAYOUTS, steps, tensor_bytes, train, write_inputs
from conversions import convert, refusal
from ranks import run_ranks
from safetensors.torch import load_file

NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0 --train-iters 6"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return write_inputs(folder), folder / "tokenizer.json"


def run(layout: str, inputs: str, save: Path, more: str, status: int = 0) -> str:
    """Run the training program; its lines about the start."""
    ranks, flags = LAYOUTS[layout]
    results = run_ranks(train, ranks, f"{FLAGS} {flags} {inputs} {NO_DROPOUT} --save {save} {more}".split())
    assert {ended for ended, _ in results} == {status}, results
    return "\n".join(results[0][1])


def test_a_run_converts_with_its_logits_and_resumes_resharded(inputs, tmp_path):
    words, tokenizer = inputs
    save, complete, out = tmp_path / "save", tmp_path / "complete", tmp_path / "hf"
    run("TP2", words, save, "--exit-interval 4", 75)
    shutil.copytree(save, complete)
    convert("megatron_to_hf", "--load", save, "--output", out)  # the run's own tokenizer
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["dtype"], config["n_layer"]) == (257, "float32", 2)
    card = (out / "README.md").read_text()
    assert "| `--lr` | 0.001 |" in card and str(tmp_path) not in card and str(tokenizer) not in card
    assert "257 of 288" in card
    printed = convert("verify", save, out, "--logits", "--report", tmp_path / "report.json")
    assert "torch_dist, float32, 288 embedding rows" in printed and "31 rows of vocabulary padding" in printed
    assert json.loads((tmp_path / "report.json").read_text())["largest_logit_difference"] < 1e-4

    run("TP2", words, complete, "")
    uninterrupted = [step["loss"] for step in steps(complete)]
    resharded = tmp_path / "resharded"
    divisible = ("--make-vocab-size-divisible-by", "16")
    convert(
        "reshard", "--load", save, "--save", resharded, "--tensor-parallel", "1", "--pipeline-parallel", "2", *divisible
    )
    before = tensor_bytes(save / "iter_0000004")
    after = tensor_bytes(resharded / "iter_0000004")
    assert before.keys() == after.keys()
    padded = {key for key in before if "word_embeddings" in key}  # 272 rows instead of 288
    assert len(padded) == 4 and {key for key in before if before[key] != after[key]} == padded
    again = tmp_path / "again"
    for overwrite in ([], ["--overwrite"]):  # with the tokenizer next to it, it is still a converter's output
        convert(
            "reshard", "--load", resharded, "--save", again, "--tensor-parallel", "4", "--vocab-size", "257", *divisible, *overwrite
        )  # fmt: skip
    convert("verify", again, out)
    shutil.copyfile(save / "metrics.jsonl", resharded / "metrics.jsonl")
    assert "resume" in run("PP2", words, resharded, "")
    continued = [step["loss"] for step in steps(resharded)]
    assert len(continued) == 6 and max(abs(a - b) for a, b in zip(continued, uninterrupted, strict=True)) < 1e-5


def test_a_lora_run_becomes_a_peft_adapter_and_a_merged_model(inputs, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words, tokenizer = inputs
    base, adapters = tmp_path / "base", tmp_path / "adapters"
    run("1", words, base, "--exit-interval 2", 75)
    lora = "--lora-rank 4 --lora-dropout 0"
    ranks, flags = LAYOUTS["TP2"]
    start = FLAGS.replace("--from-scratch", f"--load {base}")
    command = f"{start} {flags} {words} {NO_DROPOUT} --lr 0.1 --save {adapters} {lora}".split()
    assert {ended for ended, _ in run_ranks(train, ranks, command)} == {0}

    run("1", words, base, "--exit-interval 4", 75)  # the base continues; its adapters stay on what they were trained on
    convert(
        "megatron_to_hf", "--load", base, "--iteration", "2", "--output", tmp_path / "hf", "--tokenizer-file", tokenizer
    )
    convert("megatron_to_hf", "--load", adapters, "--output", tmp_path / "peft")
    merge = ("megatron_to_hf", "--load", adapters, "--merge-lora", "--tokenizer-file", tokenizer)
    convert(*merge, "--output", tmp_path / "merged")
    convert("verify", adapters, tmp_path / "merged", "--logits")
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        without = plain(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "peft").eval()(tokens).logits
    assert (adapted - merged).abs().max() < 1e-4 < (adapted - without).abs().max()
    changed = load_file(tmp_path / "merged/model.safetensors")
    unchanged = load_file(tmp_path / "hf/model.safetensors")
    assert {name.split(".", 3)[-1] for name in changed if not torch.equal(changed[name], unchanged[name])} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    }  # fmt: skip

    base.rename(tmp_path / "moved")
    assert "or give --base DIR" in refusal(*merge, "--output", tmp_path / "out")
    moved = ("--base", tmp_path / "moved")
    convert(*merge, "--output", tmp_path / "out", *moved)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "merged/model.safetensors").read_bytes()
    assert "or give --base DIR" in refusal("verify", adapters, tmp_path / "merged")
    convert("verify", adapters, tmp_path / "merged", *moved)
    assert "adapters of a LoRA run" in refusal(
        "reshard", "--load", adapters, "--save", tmp_path / "x", "--tensor-parallel", "1"
    )

    damaged = next((adapters / "iter_0000006").glob("__0_0.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    for command in (
        ("megatron_to_hf", "--load", adapters, "--output", tmp_path / "x"),
        (*merge, "--output", tmp_path / "x", *moved),
    ):
        assert "does not have the checksum it was saved with" in refusal(*command)
