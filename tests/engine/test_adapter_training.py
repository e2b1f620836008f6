"""Starting from adapters of a LoRA run or a PEFT directory, in any layout."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_runs import FLAGS, LAYOUTS, tensor_bytes, train, write_inputs
from conversions import convert, refusal
from ranks import run_ranks
from safetensors.torch import load_file, save_file

LORA = "--lora-rank 4 --lora-alpha 8 --lora-dropout 0 --lora-targets linear_qkv,linear_fc2"
STILL = "--lr 1e-30 --min-lr 0 --train-iters 1"  # the first checkpoint has the weights of the start


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(layout: str, inputs: str, save: Path, more: str) -> tuple[int | str, str]:
    """One run with the shape of the flags: its status or error line, and how it started."""
    ranks, flags = LAYOUTS[layout]
    words = FLAGS.replace("--from-scratch", "") if "--load" in more else FLAGS
    results = run_ranks(train, ranks, f"{words} {flags} {inputs} --save {save} {more}".split())
    return results[0][0], "\n".join(results[0][1])


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> tuple[Path, Path]:
    """A base model in Megatron's format and adapters trained on it, TP2."""
    folder = tmp_path_factory.mktemp("trained")
    base, adapters = folder / "base", folder / "adapters"
    assert run("1", inputs, base, "--train-iters 2")[0] == 0
    assert run("TP2", inputs, adapters, f"--load {base} --lr 0.05 --train-iters 4 {LORA}")[0] == 0
    return base, adapters


def adapters_in(save: Path) -> dict[str, str]:
    digests = tensor_bytes(max(save.glob("iter_*")))
    return {name: digest for name, digest in digests.items() if not name.startswith("optimizer")}


@pytest.mark.parametrize("layout", ["1", "TP2 PP2"])
def test_training_continues_from_adapters_in_any_layout(trained, inputs, tmp_path, layout):
    base, adapters = trained
    ended, printed = run(layout, inputs, tmp_path / "still", f"--load {adapters} {LORA} {STILL}")
    assert ended == 0 and "adapters of rank 4, training continues with a fresh optimizer" in printed
    assert adapters_in(tmp_path / "still") == adapters_in(adapters) and len(adapters_in(adapters)) == 4
    manifest = json.loads((tmp_path / "still/iter_0000001/manifest.json").read_text())
    assert (manifest["base"]["path"], manifest["base"]["iteration"]) == (str(base), 2)
    assert manifest["state"]["optimizer_step"] == 1

    more = f"--load {adapters} {LORA} --lr 0.05 --train-iters 4"
    assert run(layout, inputs, tmp_path / "uninterrupted", more)[0] == 0
    assert run(layout, inputs, tmp_path / "parts", f"{more} --exit-interval 2")[0] == 75
    assert run(layout, inputs, tmp_path / "parts", more)[0] == 0
    assert adapters_in(tmp_path / "parts") == adapters_in(tmp_path / "uninterrupted") != adapters_in(adapters)


def test_training_continues_from_a_peft_directory_which_merges(trained, inputs, tmp_path):
    base, adapters = trained
    hf, peft = tmp_path / "hf", tmp_path / "peft"
    convert("megatron_to_hf", "--load", base, "--output", hf)
    convert("megatron_to_hf", "--load", adapters, "--output", peft, "--base", hf)
    ended, printed = run("TP2", inputs, tmp_path / "still", f"--load {peft} {LORA} {STILL}")
    assert (
        ended == 0
        and f"{hf} (Hugging Face): " in printed
        and f"{peft}: adapters of rank 4, training continues" in printed
    )
    assert adapters_in(tmp_path / "still") == adapters_in(adapters)
    for load, name in ((peft, "from-peft"), (adapters, "from-run")):
        convert("megatron_to_hf", "--load", load, "--merge-lora", "--output", tmp_path / name)
    convert("verify", tmp_path / "from-peft", tmp_path / "from-run")
    assert "a PEFT adapter already" in refusal("megatron_to_hf", "--load", peft, "--output", tmp_path / "x")

    def broken(config: dict, more: dict) -> str:
        directory = tmp_path / "broken"
        directory.mkdir(exist_ok=True)
        save_file({**load_file(peft / "adapter_model.safetensors"), **more}, directory / "adapter_model.safetensors")
        content = json.loads((peft / "adapter_config.json").read_text()) | config
        (directory / "adapter_config.json").write_text(json.dumps(content))
        return refusal("megatron_to_hf", "--load", directory, "--merge-lora", "--output", tmp_path / "x")

    assert "use_dora is true" in broken({"use_dora": True}, {}).lower()
    assert "has no base_model_name_or_path" in broken({"base_model_name_or_path": None}, {})
    head = {"base_model.model.lm_head.weight": torch.zeros(1)}
    assert "base_model.model.lm_head.weight is not supported" in broken({}, head)
    wide = {"base_model.model.transformer.h.1.attn.c_attn.lora_A.weight": torch.zeros(2, 32)}
    assert "does not have one rank in all 2 layers" in broken({}, wide)
    assert "has shape [2, 4, 32]" in broken({"r": 8}, {})


def test_adapters_that_differ_from_the_flags_are_refused(trained, inputs, tmp_path):
    _, adapters = trained
    other = "--lora-rank 8 --lora-alpha 8 --lora-targets linear_fc2"
    refused, _ = run("1", inputs, tmp_path / "x", f"--load {adapters} {other} {STILL}")
    assert "--lora-rank was 4, is 8" in refused and "--lora-alpha" not in refused
    assert "--lora-targets was linear_qkv,linear_fc2, is linear_fc2" in refused and "--merge-lora" in refused
    refused, _ = run("1", inputs, tmp_path / "x", f"--load {adapters} {STILL}")
    assert "not a complete model" in refused and "--merge-lora" in refused and "--lora-rank" in refused


def test_model_shape_comes_from_the_base_of_the_adapters(trained, inputs, tmp_path):
    _, adapters = trained
    words = f"--load {adapters} {LORA} {STILL} --seq-length 32 --global-batch-size 4 --eval-interval 0 --num-workers 1 --make-vocab-size-divisible-by 16"
    [(ended, _)] = run_ranks(train, 1, f"{words} {inputs} --save {tmp_path / 'x'}".split())
    assert ended == 0 and adapters_in(tmp_path / "x") == adapters_in(adapters)


def test_exported_adapter_names_its_base_or_reports_how_to_set_it(trained, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, adapters = trained
    hf, peft, merged = tmp_path / "hf", tmp_path / "peft", tmp_path / "merged"
    printed = convert("megatron_to_hf", "--load", adapters, "--output", tmp_path / "nameless")
    assert f"the base {base} is not a Hugging Face model" in printed and "--base BASE_HF" in printed
    assert PeftConfig.from_pretrained(tmp_path / "nameless").base_model_name_or_path is None
    export = ("megatron_to_hf", "--load", adapters, "--output", peft)
    assert "has no config.json" in refusal(*export, "--base", base)
    convert("megatron_to_hf", "--load", base, "--output", hf)
    assert f"to be loaded on {hf}" in convert(*export, "--base", hf)
    convert("megatron_to_hf", "--load", adapters, "--merge-lora", "--output", merged)

    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(merged).eval()(tokens).logits
        adapted = AutoPeftModelForCausalLM.from_pretrained(peft).eval()(tokens).logits
    assert (adapted - whole).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(peft).eos_token == "<|endoftext|>"
    completion = convert("complete", peft, "--prompt", "a", "--max-new-tokens", "4")
    assert completion.startswith("a")

    named = tmp_path / "named"
    convert("megatron_to_hf", "--load", adapters, "--output", named, "--base", "bigcode/starcoderbase-1b")
    assert PeftConfig.from_pretrained(named).base_model_name_or_path == "bigcode/starcoderbase-1b"
