"""The table of models holds the published numbers, and a shape survives the way to a Hugging Face configuration and back."""

import pytest
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from megatron_ft.errors import UserError
from megatron_ft.model.shape import PRESETS, ModelShape, padded_vocab_size


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("multi_query", [True, False])
def test_parameters_are_those_of_transformers_model(name, multi_query):
    shape = ModelShape(**{**PRESETS[name].as_dict(), "multi_query": multi_query})
    with torch.device("meta"):
        model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**shape.to_hf_config()))
    assert shape.num_parameters() == sum(p.numel() for p in model.parameters())


def test_starcoderbase_has_its_published_size():
    assert PRESETS["starcoderbase"].num_parameters() == 15_517_456_384


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_shape_survives_hugging_face_configuration(name):
    assert (
        ModelShape.from_hf_config(GPTBigCodeConfig(**PRESETS[name].to_hf_config()).to_dict(), "config.json")
        == PRESETS[name]
    )


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"activation_function": "gelu"}, "tanh"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"embd_pdrop": 0.3}, "embd_pdrop"),
        ({"n_layer": "40"}, "n_layer is '40', expected a positive integer"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_inner": 2.5}, "n_inner is 2.5"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None, expected a number"),
        ({"multi_query": "yes"}, "multi_query is 'yes', expected true or false"),
    ],
)
def test_a_configuration_megatron_cannot_express_is_refused(change, word):
    with pytest.raises(UserError, match=word):
        ModelShape.from_hf_config({**PRESETS["tiny"].to_hf_config(), **change}, "config.json")


def test_a_configuration_that_lacks_a_number_is_refused():
    config = PRESETS["tiny"].to_hf_config()
    del config["n_positions"]
    with pytest.raises(UserError, match="config.json: n_positions is missing, expected a positive integer"):
        ModelShape.from_hf_config(config, "config.json")


def test_vocabulary_is_padded_as_megatron_pads():
    assert padded_vocab_size(1000, 128, 1) == 1024
    assert padded_vocab_size(49152, 128, 4) == 49152
    assert padded_vocab_size(49153, 128, 4) == 49664
