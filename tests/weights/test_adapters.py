"""PEFT adapters merge to what PEFT computes; any that are not plain LoRA are refused by name."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conversions import tiny_hf
from safetensors.torch import load_file, save_file

from megatron_ft.errors import UserError
from megatron_ft.model.hf_names import hf_name
from megatron_ft.model.peft_fields import ANY_VALUE, PLAIN, check_plain
from megatron_ft.weights.adapters import MergedSource, open_adapters

PREFIX = "base_model.model.transformer.h.{layer}.attn.c_attn.lora_{part}.weight"
SAFETENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_hf(tmp_path_factory.mktemp("base") / "hf")


def save_adapter(base: Path, to: Path, **config) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter that PEFT saved, with random A and B, and the weights that PEFT merges it to."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPTBigCodeForCausalLM

    model = get_peft_model(
        GPTBigCodeForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"], **config),
    )
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(to)
    return to, dict(model.merge_and_unload().named_parameters())


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("plain") / "adapter")[0]


@pytest.fixture
def adapter(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def edit_config(adapter: Path, **changes) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"fan_in_fan_out": True}]
)
def test_an_adapter_merges_to_the_weights_that_peft_computes(base, tmp_path, config):
    adapter, expected = save_adapter(base, tmp_path / "adapter", **config)
    source = MergedSource(open_adapters(adapter))
    unchanged = load_file(base / "model.safetensors")
    for name in source.names():
        assert torch.allclose(source.read(name), expected[hf_name(source.shape, name)], atol=2e-6, rtol=1e-6), name
    assert not torch.allclose(
        source.read("decoder.layers.1.mlp.linear_fc1.weight"), unchanged["transformer.h.1.mlp.c_fc.weight"]
    )


def test_adapter_model_bin_is_read_where_there_is_no_safetensors_file(adapter):
    expected = open_adapters(adapter).tensors
    tensors = load_file(adapter / SAFETENSORS)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, adapter / "adapter_model.bin")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in open_adapters(adapter).tensors.items())
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, adapter / "adapter_model.bin")
    (adapter / SAFETENSORS).unlink()
    found = open_adapters(adapter).tensors
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        open_adapters(adapter)


def test_every_field_of_pefts_lora_config_is_known_and_plain_at_its_default():
    from peft import LoraConfig

    names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert names <= ANY_VALUE | PLAIN.keys() and not ANY_VALUE & PLAIN.keys()
    saved = json.dumps(LoraConfig(task_type="CAUSAL_LM").to_dict())
    check_plain(json.loads(saved), CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("init_lora_weights", how)
            for how in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "new", 1)
        ),
        ("alora_invocation_tokens", [1, 2]),
        ("alpha_pattern", {"c_attn": 32}),
        ("rank_pattern", {"h.0.attn.c_attn": 2}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("use_dora", True),
        ("use_dora", "true"),
        ("layer_replication", [[0, 2], [1, 4]]),
        ("lora_bias", True),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [5]),
        ("target_parameters", ["mlp.c_fc.weight"]),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {}),
        ("megatron_config", {"hidden_size": 64}),
        ("enable_lora", [True, False, True]),
        ("arrow_config", {}),
        ("kasa_config", {"beta": 1}),
        ("velora_config", {}),
        ("monteclora_config", {}),
        ("task_type", "SEQ_CLS"),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("a_field_of_next_year", False),
        ("a_field_of_next_year", {"x": 1}),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_refused_by_field_and_value(adapter, field, value):
    edit_config(adapter, **{field: value})
    with pytest.raises(UserError) as refused:
        open_adapters(adapter)
    assert str(refused.value).startswith(f"{adapter / CONFIG}: {field} is {value!r}")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("r", 0, '"r" is 0, expected an integer, 1'),
        ("r", 4.0, '"r" is 4.0, expected an integer'),
        ("r", True, '"r" is true'),
        ("r", None, '"r" is null'),
        ("r", 2**40, '"r" is 1099511627776'),
        ("lora_alpha", float("nan"), '"lora_alpha" is NaN, expected a finite number'),
        ("lora_alpha", float("inf"), '"lora_alpha" is Infinity'),
        ("lora_alpha", "8", '"lora_alpha" is "8"'),
        ("lora_dropout", "a", '"lora_dropout" is "a"'),
        ("base_model_name_or_path", None, "has no base_model_name_or_path"),
        ("base_model_name_or_path", 5, '"base_model_name_or_path" is 5, expected a string'),
    ],
)
def test_a_malformed_number_of_an_adapter_is_refused(adapter, field, value, reason):
    edit_config(adapter, **{field: value})
    with pytest.raises(UserError, match=reason):
        open_adapters(adapter)


def change(named: dict[str, torch.Tensor], what: str) -> None:
    a, b = (PREFIX.format(layer=2, part=part) for part in "AB")
    match what:
        case "no B":
            del named[b]
        case "no A in any layer":
            for layer in range(4):
                del named[PREFIX.format(layer=layer, part="A")]
        case "NaN":
            named[a][1, 1] = float("nan")
        case "Inf":
            named[b][0, 0] = float("inf")
        case "integers":
            named[a] = named[a].to(torch.int8)
        case "a vector":
            named[a] = named[a][0].clone()
        case "a layer less":
            del named[a], named[b]
        case "magnitudes":
            named[a.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(4)
        case "another module":
            named["base_model.model.transformer.wte.lora_embedding_A"] = torch.ones(4, 4)
        case "a layer twice":
            named[a.replace("h.2.", "h.02.")] = named[a].clone()
        case "nothing":
            named.clear()
            named["base_model.model.lm_head.weight"] = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("no B", "layer 2 has no attn.c_attn.lora_B"),
        ("no A in any layer", "layer 0 has no attn.c_attn.lora_A"),
        ("NaN", "h.2.attn.c_attn.lora_A.weight has values that are NaN or Inf"),
        ("Inf", "h.2.attn.c_attn.lora_B.weight has values that are NaN or Inf"),
        ("integers", "in torch.int8, expected a matrix"),
        ("a vector", r"has shape \[64\]"),
        ("a layer less", "does not have one rank in all 4 layers"),
        ("magnitudes", "lora_magnitude_vector is not supported"),
        ("another module", "lora_embedding_A is not supported"),
        ("a layer twice", "h.02.attn.c_attn.lora_A.weight is not supported"),
        ("nothing", "lm_head.weight is not supported"),
    ],
)
def test_incomplete_or_odd_adapter_tensors_are_refused(adapter, what, reason):
    named = load_file(adapter / SAFETENSORS)
    change(named, what)
    save_file(named, adapter / SAFETENSORS)
    with pytest.raises(UserError, match=reason):
        open_adapters(adapter)


def test_a_rank_that_is_not_that_of_the_tensors_is_refused(adapter):
    edit_config(adapter, r=8)
    with pytest.raises(UserError, match="for rank 8"):
        MergedSource(open_adapters(adapter))


def test_an_adapter_that_links_to_another_directory_is_refused(adapter, tmp_path):
    (adapter / SAFETENSORS).rename(tmp_path / "elsewhere.safetensors")
    (adapter / SAFETENSORS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="adapter_model.safetensors: a link to .*elsewhere"):
        open_adapters(adapter)
