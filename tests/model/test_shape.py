"""Presets hold the published numbers, and a shape survives the round trip to config.json."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ft.errors import UserError
from megatron_ft.model.families import PRESETS, family_of, shape_of_config
from megatron_ft.model.gpt_bigcode import GPT_BIGCODE, shape_of_megatron_args
from megatron_ft.model.shape import ModelShape, padded_vocab_size


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("multi_query", [True, False])
def test_number_of_parameters_matches_transformers(name, multi_query):
    shape = replace(PRESETS[name], num_query_groups=1 if multi_query else PRESETS[name].num_attention_heads)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**family_of(shape).write_config(shape)))
    assert shape.num_parameters() == sum(p.numel() for p in model.parameters())


def test_starcoderbase_has_its_published_size():
    assert PRESETS["starcoderbase"].num_parameters() == 15_517_456_384


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_shape_survives_hugging_face_configuration(name):
    config = AutoConfig.for_model(**family_of(PRESETS[name]).write_config(PRESETS[name]))
    assert shape_of_config(config.to_dict(), "config.json") == PRESETS[name]


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": ["gpt_bigcode"]}, "model_type is a list"),
        (
            {"activation_function": "quick_gelu"},
            "'quick_gelu', expected the tanh GELU 'gelu_pytorch_tanh' or the exact",
        ),
        ({"activation_function": {}}, "activation_function is an object"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"scale_attn_weights": None}, '"scale_attn_weights" is null, expected true or false'),
        ({"embd_pdrop": 0.3}, "embd_pdrop"),
        ({"attn_pdrop": "0"}, '"attn_pdrop" is "0", expected a finite number, 0 to 1'),
        ({"n_layer": "40"}, '"n_layer" is "40", expected an integer, 1 to 10000'),
        ({"n_layer": 10**8}, '"n_layer" is 100000000, expected an integer, 1 to 10000'),
        ({"n_layer": True}, '"n_layer" is true, expected an integer'),
        ({"n_head": 0}, '"n_head" is 0'),
        ({"n_embd": 2**62}, '"n_embd" is 46116'),
        ({"vocab_size": -400}, '"vocab_size" is -400'),
        ({"n_inner": 2.5}, '"n_inner" is 2.5'),
        ({"layer_norm_epsilon": None}, '"layer_norm_epsilon" is null, expected a finite number'),
        ({"layer_norm_epsilon": float("nan")}, '"layer_norm_epsilon" is NaN'),
        ({"multi_query": "yes"}, '"multi_query" is "yes", expected true or false'),
        ({"n_embd": 130, "n_head": 4}, "n_embd 130 is not divisible by n_head 4"),
    ],
)
def test_a_configuration_megatron_cannot_express_is_refused(change, word):
    with pytest.raises(UserError, match=f"config.json: .*{word}"):
        shape_of_config({**GPT_BIGCODE.write_config(PRESETS["tiny"]), **change}, "config.json")


@pytest.mark.parametrize(
    "name, exact", [("gelu", True), ("gelu_python", True), ("gelu_new", False), ("gelu_fast", False)]
)
def test_both_forms_of_gelu_survive_the_round_trip(name, exact):
    shape = shape_of_config({**GPT_BIGCODE.write_config(PRESETS["tiny"]), "activation_function": name}, "config.json")
    assert shape.exact_gelu == exact
    assert GPT_BIGCODE.write_config(shape)["activation_function"] == ("gelu" if exact else "gelu_pytorch_tanh")
    assert ModelShape.from_dict(shape.as_dict(), "manifest.json") == shape


@pytest.mark.parametrize(
    "change, word",
    [
        ({"num_layers": 10**8}, '"num_layers" is 100000000'),
        ({"num_layers": 2.0}, '"num_layers" is 2.0, expected an integer'),
        ({"hidden_size": None}, '"hidden_size" is null'),
        ({"vocab_size": -1}, '"vocab_size" is -1'),
        ({"multi_query": 1}, '"multi_query" is 1, expected true or false'),
        ({"hidden_dropout": "0.1"}, '"hidden_dropout" is "0.1"'),
        ({"rotary": True}, "unknown field 'rotary'"),
        ({"num_attention_heads": 3}, "hidden_size 128 is not divisible"),
    ],
)
def test_a_malformed_shape_in_a_manifest_is_refused(change, word):
    with pytest.raises(UserError, match=f"manifest.json: .*{word}"):
        ModelShape.from_dict({**PRESETS["tiny"].as_dict(), **change}, "manifest.json")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"num_layers": 10**8}, '"num_layers" is 100000000'),
        ({"hidden_size": "64"}, '"hidden_size" is "64"'),
        ({"num_attention_heads": 0}, '"num_attention_heads" is 0'),
        ({"swiglu": True}, "a gated activation .swiglu=True"),
        ({"num_experts": [8]}, "experts .num_experts=a list"),
        ({"group_query_attention": True, "num_query_groups": 2}, "2 key/value heads for 4"),
        ({"layernorm_epsilon": torch.ones(2)}, '"layernorm_epsilon" is Tensor'),
    ],
)
def test_malformed_arguments_of_megatron_are_refused(change, word):
    numbers = {"num_layers": 1, "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 8}
    with pytest.raises(UserError, match=f"^runs/iter_7: .*{word}"):
        shape_of_megatron_args({**numbers, **change}, 16, "runs/iter_7")


def test_a_configuration_without_a_required_number_is_refused():
    config = GPT_BIGCODE.write_config(PRESETS["tiny"])
    del config["n_positions"]
    with pytest.raises(UserError, match='config.json: no "n_positions", expected an integer'):
        shape_of_config(config, "config.json")


def test_vocabulary_is_padded_as_megatron_pads():
    assert padded_vocab_size(1000, 128, 1) == 1024
    assert padded_vocab_size(49152, 128, 4) == 49152
    assert padded_vocab_size(49153, 128, 4) == 49664


def test_heads_that_do_not_divide_the_model_are_reported_where_they_were_given():
    numbers = {"num_layers": 1, "hidden_size": 130, "num_attention_heads": 4, "max_position_embeddings": 8}
    with pytest.raises(UserError, match="^--hidden-size 130 is not divisible by --num-attention-heads 4"):
        ModelShape(**numbers)
    with pytest.raises(
        UserError, match="^runs/iter_7: arguments: hidden_size 130 is not divisible by num_attention_heads 4"
    ):
        shape_of_megatron_args(numbers, 16, "runs/iter_7")


def test_layout_errors_name_the_flags_of_the_program():
    with pytest.raises(UserError, match="^--tensor-model-parallel-size 3 does not divide"):
        PRESETS["tiny"].check_layout(3, 1)
    with pytest.raises(UserError, match="^--stages 3 does not divide the 4 layers; use one of .1, 2, 4."):
        PRESETS["tiny"].check_layout(1, 3, pipeline_flag="--stages")
