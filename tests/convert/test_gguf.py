"""What llama.cpp's convert_hf_to_gguf.py reads of a model is in those that this project writes.

Its map of tensor names is the gguf package's. The keys of config.json are listed here as its
classes for GPTBigCodeForCausalLM and Starcoder2ForCausalLM read them; the package lacks these.
"""

import json

import gguf
import pytest
from conftest import ROOT
from safetensors import safe_open

from megatron_ft.model.families import PRESETS, family_of
from megatron_ft.model.hf_names import hf_tensors
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import tensor_names

ARCHITECTURES = {"gpt_bigcode": gguf.MODEL_ARCH.STARCODER, "starcoder2": gguf.MODEL_ARCH.STARCODER2}
KEYS = {
    "gpt_bigcode": {"n_layer", "n_positions", "n_embd", "n_head", "layer_norm_epsilon"},
    "starcoder2": {
        "num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "norm_epsilon", "rope_parameters",
    },
}  # fmt: skip
FIXTURE = ROOT / "tests/fixtures/model"


def check_names(family: str, num_layers: int, names: list[str]) -> None:
    """Every tensor has a name in the GGUF file, and no two have the same."""
    names_in_gguf = gguf.get_tensor_name_map(ARCHITECTURES[family], num_layers)
    found = {name: names_in_gguf.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    assert None not in found.values(), [name for name, known in found.items() if known is None]
    assert len(set(found.values())) == len(names)


def names_of(shape: ModelShape) -> list[str]:
    return [tensor.name for name in tensor_names(shape) for tensor in hf_tensors(shape, name)]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_tensor_and_key_of_a_preset_is_known(preset):
    shape = PRESETS[preset]
    check_names(shape.family, shape.num_layers, names_of(shape))
    config = family_of(shape).write_config(shape)
    assert config.keys() >= KEYS[shape.family]
    if shape.family == "gpt_bigcode":  # what the script takes for granted of the family
        assert shape.num_query_groups == 1 and config["n_inner"] == 4 * config["n_embd"]


def test_every_tensor_of_a_converted_model_is_known():
    config = json.loads((FIXTURE / "config.json").read_text())
    with safe_open(FIXTURE / "model.safetensors", "numpy") as file:
        check_names(config["model_type"], config["n_layer"], list(file.keys()))
    assert config.keys() >= KEYS["gpt_bigcode"]
