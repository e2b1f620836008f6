"""verify.py detects every difference; converters lose no rows of tokens, values or precision."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conversions import convert, refusal, tiny_hf
from safetensors.torch import load_file, save_file

from megatron_ft.weights.open import open_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """fp32 models of 300 and 200 tokens; the first also in Megatron's formats, with 384 rows."""
    folder = tmp_path_factory.mktemp("model")
    tiny_hf(folder / "hf", vocab=300)
    tiny_hf(folder / "small", vocab=200)
    for form in ("torch_dist", "legacy"):
        convert("hf_to_megatron", "--load", folder / "hf", "--save", folder / form, "--format", form)
    return folder


def changed(model: Path, to: Path, change) -> Path:
    """A copy of the Hugging Face model with `change` made to its dictionary of tensors."""
    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def with_rows(model: Path, to: Path, rows: int) -> Path:
    """A copy whose embedding has only the first rows."""

    def cut(tensors):
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:rows].clone()

    changed(model, to, cut)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return to


def test_a_smaller_tokenizer_never_cuts_rows_of_tokens(model, tmp_path):
    core = ("megatron_to_hf", "--load", model / "torch_dist", "--output", tmp_path / "out", "--tokenizer-from")
    line = refusal(*core, model / "small")
    assert "200 tokens, but 300 of the 384 embedding rows" in line and "100 trained rows would be dropped" in line
    line = refusal(
        "reshard", "--load", model / "torch_dist", "--save", tmp_path / "out", "--tensor-parallel", "1", "--vocab-size", "200"
    )  # fmt: skip
    assert "--vocab-size 200: 200 tokens, but 300 of the 384" in line
    assert not (tmp_path / "out").exists()
    convert(*core, model / "small", "--keep-padding")
    assert open_weights(tmp_path / "out").shape.vocab_size == 384
    shutil.rmtree(tmp_path / "out")

    larger = tiny_hf(tmp_path / "larger", vocab=310)
    assert "warning: " in (printed := convert(*core, larger)) and "10 rows of untrained padding" in printed
    shutil.rmtree(tmp_path / "out")
    # A legacy checkpoint does not record how many rows are tokens, but padding has a limit.
    legacy = (
        "megatron_to_hf",
        "--load",
        model / "legacy",
        "--output",
        tmp_path / "out",
        "--overwrite",
        "--tokenizer-from",
    )
    assert "184 are cut off, more than the 127 that padding to a multiple of 128 can add" in convert(
        *legacy, model / "small"
    )
    assert "warning" not in convert(*legacy, model / "hf")


def test_verify_reports_rows_of_tokens_that_one_side_lacks(model, tmp_path):
    cut = with_rows(model / "hf", tmp_path / "cut", 200)
    for pair in ((model / "torch_dist", cut), (cut, model / "torch_dist")):
        letter = "B" if pair[1] == cut else "A"
        printed = convert("verify", *pair, status=1)
        assert f"{letter} has 200 embedding rows for 300 tokens, 100 are missing" in printed
        assert printed.rstrip().endswith("DIFFERENT")
    assert "84 rows of vocabulary padding" in convert("verify", model / "torch_dist", model / "hf")
    printed = convert("verify", model / "legacy", model / "hf")
    assert "84 embedding rows are on one side only" in printed and "rows of vocabulary padding" not in printed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_on_one_side_is_a_difference(model, tmp_path, value):
    name = "transformer.h.1.ln_1.weight"
    broken = changed(model / "hf", tmp_path / "broken", lambda tensors: tensors[name].__setitem__(5, value))
    for pair in ((model / "hf", broken), (broken, model / "hf")):
        assert f"inf at {name}" in convert("verify", *pair, "--tolerance", "1e30", status=1)

    # The same value on both sides does not count as a difference, whatever else differs.
    def also(tensors):
        tensors[name][6] += 0.25

    other = changed(broken, tmp_path / "other", also)
    assert f"0.25 at {name} (tolerated)" in convert("verify", broken, other, "--tolerance", "0.5")


def test_tensors_of_several_precisions_keep_every_value(model, tmp_path):
    norm = "transformer.ln_f.weight"

    def mix(tensors):
        for name in tensors:
            if name != norm:
                tensors[name] = tensors[name].bfloat16()
        tensors[norm][0] = 1 + 2**-20  # not a bf16 value

    mixed = changed(model / "hf", tmp_path / "mixed", mix)
    assert open_weights(mixed).dtype == torch.float32
    printed = convert("hf_to_megatron", "--load", mixed, "--save", tmp_path / "core", "--format", "torch_dist")
    assert "51 in bfloat16, 1 in float32); all are written in float32, none is rounded" in printed
    assert open_weights(tmp_path / "core").read("decoder.final_layernorm.weight")[0] == 1 + 2**-20
    convert("hf_to_megatron", "--load", mixed, "--save", tmp_path / "legacy", "--format", "legacy")
    assert "several precisions" not in convert(
        "megatron_to_hf", "--load", tmp_path / "legacy", "--output", tmp_path / "back", "--tokenizer-from", mixed
    )
    report = tmp_path / "report.json"
    printed = convert("verify", mixed, tmp_path / "back", "--report", report)
    assert "51 of 52 tensors are in different precisions and have the same values" in printed
    found = json.loads(report.read_text())
    assert found["tensors_rounded"] == 0 and found["equal"]


def test_logits_after_rounding_are_those_of_the_rounded_weights(model, tmp_path):
    half = tmp_path / "half"
    convert("megatron_to_hf", "--load", model / "torch_dist", "--output", half, "--dtype", "bf16", "--tokenizer-from", model / "hf")  # fmt: skip
    for pair in ((model / "torch_dist", half), (half, model / "hf")):
        printed = convert("verify", *pair, "--logits", status=3)
        # All but the norms, which are 1, and the biases, which are 0.
        assert "18 of 52 tensors were compared after rounding to bfloat16" in printed
        assert "both with the rounded weights" in printed and "equal after rounding of" in printed.splitlines()[-1]
    printed = convert("verify", model / "torch_dist", model / "hf", "--logits")
    assert "rounded" not in printed and "rounding" not in printed


def test_rounding_is_a_status_of_its_own(model, tmp_path):
    half, report = tmp_path / "half", tmp_path / "report.json"
    convert("megatron_to_hf", "--load", model / "torch_dist", "--output", half, "--dtype", "bf16", "--tokenizer-from", model / "hf")  # fmt: skip
    convert("verify", model / "hf", half, "--report", report, status=3)
    found = json.loads(report.read_text())
    assert (found["equal"], found["equal_after_rounding"]) == (False, True)
    convert("verify", model / "hf", half, "--allow-rounding")
    wide = tmp_path / "wide"
    convert("hf_to_megatron", "--load", half, "--save", wide, "--format", "legacy", "--dtype", "fp32")
    assert convert("verify", half, wide).rstrip().endswith("equal")  # all values survive
    other = changed(half, tmp_path / "other", lambda tensors: tensors["transformer.ln_f.bias"].__setitem__(3, 0.5))
    convert("verify", model / "hf", other, "--allow-rounding", status=1)


@pytest.mark.parametrize("change", ["the sign of a zero", "the payload of a NaN"])
def test_a_changed_bit_is_a_difference_even_if_the_numbers_are_equal(model, tmp_path, change):
    name, nan = "transformer.h.2.ln_2.bias", change == "the payload of a NaN"

    def edit(value):
        return lambda tensors: tensors[name].view(torch.int32).__setitem__(5, value)

    one, two = (0x7FC00000, 0x7FC00001) if nan else (0, -(2**31))
    a, b = (changed(model / "hf", tmp_path / str(value), edit(value)) for value in (one, two))
    printed = convert("verify", a, b, status=1)
    assert f"signs of zeros, or NaNs, at {name}" in printed and printed.rstrip().endswith("DIFFERENT")
    convert("verify", a, b, "--tolerance", "1e-30")
    convert("verify", a, a)


def test_a_tokenizer_with_ids_beyond_the_rows_makes_a_model_different(model, tmp_path):
    cut = with_rows(model / "hf", tmp_path / "cut", 200)
    printed = convert("verify", cut, cut, status=1)
    assert "tokenizer: " in printed and "the largest id is 299" in printed and "has 200 embedding rows" in printed
    assert "the largest id is 299" in convert(
        "hf_to_megatron", "--load", cut, "--save", tmp_path / "m", "--format", "legacy"
    )


def test_usage_errors_are_reported_before_any_work(model, tmp_path):
    missing = tmp_path / "none/report.json"
    printed = convert("verify", model / "hf", model / "hf", "--report", missing, status=2)
    assert "none/report.json: cannot be written" in printed and "A  " not in printed
    assert "omit the flag" in refusal("verify", model / "hf", model / "hf", "--base", model / "hf")
    for flag, value in (("--max-new-tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan"), ("--top-p", "2"), ("--top-p", "0")):  # fmt: skip
        assert f"{flag} {value}: must be" in refusal("complete", model / "hf", flag, value)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "has no base_model_name_or_path" in refusal("verify", adapter, model / "hf")
