"""Presets hold the published numbers, and a shape survives the round trip to config.json."""

import pytest
import torch
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from megatron_ft.errors import UserError
from megatron_ft.model.shape import PRESETS, ModelShape, padded_vocab_size


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("multi_query", [True, False])
def test_number_of_parameters_matches_transformers(name, multi_query):
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
        ({"n_embd": 130, "n_head": 4}, "n_embd 130 is not divisible by n_head 4"),
    ],
)
def test_a_configuration_megatron_cannot_express_is_refused(change, word):
    with pytest.raises(UserError, match=f"config.json: .*{word}"):
        ModelShape.from_hf_config({**PRESETS["tiny"].to_hf_config(), **change}, "config.json")


def test_a_configuration_without_a_required_number_is_refused():
    config = PRESETS["tiny"].to_hf_config()
    del config["n_positions"]
    with pytest.raises(UserError, match="config.json: n_positions is missing, expected a positive integer"):
        ModelShape.from_hf_config(config, "config.json")


def test_vocabulary_is_padded_as_megatron_pads():
    assert padded_vocab_size(1000, 128, 1) == 1024
    assert padded_vocab_size(49152, 128, 4) == 49152
    assert padded_vocab_size(49153, 128, 4) == 49664


def test_heads_that_do_not_divide_the_model_are_reported_where_they_were_given():
    numbers = {"num_layers": 1, "hidden_size": 130, "num_attention_heads": 4, "max_position_embeddings": 8}
    with pytest.raises(UserError, match="^--hidden-size 130 is not divisible by --num-attention-heads 4"):
        ModelShape(**numbers)
    with pytest.raises(UserError, match="^runs/iter_7: hidden_size 130 is not divisible by num_attention_heads 4"):
        ModelShape.from_megatron_args(numbers, 16, "runs/iter_7")


def test_layout_errors_name_the_flags_of_the_program():
    with pytest.raises(UserError, match="^--tensor-model-parallel-size 3 does not divide"):
        PRESETS["tiny"].check_layout(3, 1)
    with pytest.raises(UserError, match="^--stages 3 does not divide the 4 layers; use one of .1, 2, 4."):
        PRESETS["tiny"].check_layout(1, 3, pipeline_flag="--stages")
