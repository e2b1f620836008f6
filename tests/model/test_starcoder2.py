"""StarCoder2's configurations become shapes and are written again; others are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Starcoder2Config

from megatron_ft.config.arguments import parse_args
from megatron_ft.engine.kernels import Installed, why_not_transformer_engine
from megatron_ft.engine.rotary import rotate, rotation
from megatron_ft.errors import UserError
from megatron_ft.launcher.mtf import mtf_command
from megatron_ft.model import cost
from megatron_ft.model.families import PRESETS, shape_of_config, shape_of_manifest
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.starcoder2 import STARCODER2

# bigcode/starcoder2-3b's config.json, as published for transformers 4.
PUBLISHED_3B = {
    "architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "activation_function": "gelu",
    "hidden_act": "gelu_pytorch_tanh", "attention_dropout": 0.1, "embedding_dropout": 0.1, "residual_dropout": 0.1,
    "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 3072, "initializer_range": 0.018042, "intermediate_size": 12288,
    "max_position_embeddings": 16384, "mlp_type": "default", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
    "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "rope_theta": 999999.4420358813,
    "sliding_window": 4096, "use_bias": True, "use_cache": True, "vocab_size": 49152,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("starcoder2-3b", 3_030_371_328), ("starcoder2-7b", 7_173_923_840), ("starcoder2-15b", 15_957_889_024)],
)
def test_presets_have_the_published_sizes(name, parameters):
    assert PRESETS[name].num_parameters() == parameters


def test_the_published_configuration_is_the_presets():
    assert shape_of_config(PUBLISHED_3B, "config.json") == PRESETS["starcoder2-3b"]
    written = STARCODER2.write_config(PRESETS["starcoder2-3b"])
    loaded = Starcoder2Config(**written)
    assert loaded.rope_parameters["rope_theta"] == 999999.4420358813 and loaded.sliding_window == 4096
    again = shape_of_config(loaded.to_dict(), "config.json")
    assert again == PRESETS["starcoder2-3b"] and STARCODER2.notices(loaded.to_dict()) == []


def test_a_manifest_keeps_every_field_and_older_ones_mean_gptbigcode():
    for name in ("starcoder2-3b", "starcoder2-15b", "starcoderbase-1b"):
        shape = PRESETS[name]
        for groups in (shape.num_query_groups, 1, shape.num_attention_heads):
            changed = replace(shape, num_query_groups=groups)
            assert shape_of_manifest(changed.as_dict(), "manifest.json") == changed
    assert sorted(PRESETS["starcoderbase-1b"].as_dict()) == [
        "attention_dropout", "ffn_hidden_size", "hidden_dropout", "hidden_size", "init_method_std", "layernorm_epsilon",
        "max_position_embeddings", "multi_query", "num_attention_heads", "num_layers", "vocab_size",
    ]  # fmt: skip
    with pytest.raises(UserError, match="manifest.json: family 'starcoder3'"):
        shape_of_manifest({**PRESETS["starcoder2-3b"].as_dict(), "family": "starcoder3"}, "manifest.json")


@pytest.mark.parametrize(
    ("preset", "change", "reason"),
    [
        ("starcoder2-3b", {"num_query_groups": 5}, "num_query_groups 5 does not divide the 24 heads"),
        ("starcoder2-3b", {"rotary_base": 0}, "StarCoder2 has rotary positions"),
        ("tiny", {"rotary_base": 1e4}, "--rotary-base: a GPTBigCode .StarCoder. has none"),
        ("tiny", {"window_size": 16}, "--window-size: a GPTBigCode"),
    ],
)
def test_a_manifest_that_contradicts_its_family_is_refused(preset, change, reason):
    with pytest.raises(UserError, match=f"^manifest.json: .*{reason}"):
        shape_of_manifest({**PRESETS[preset].as_dict(), **change}, "manifest.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "starcoder3"}, "'starcoder3', expected 'gpt_bigcode' .* or 'starcoder2'"),
        ({"use_bias": False}, "use_bias is false"),
        ({"embedding_dropout": 0.0}, "embedding_dropout and residual_dropout differ"),
        ({"sliding_window": "4096"}, '"sliding_window" is "4096", expected an integer, 1 to'),
        ({"sliding_window": 4096.0}, '"sliding_window" is 4096.0'),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide the 24"),
        ({"head_dim": 64}, "heads of another size"),
        ({"rope_theta": "1e6"}, '"rope_theta" is "1e6"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "of type 'linear'"),
        ({"rope_scaling": {"factor": 2.0}}, "factor of the rotary positions"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor of the"),
        ({"tie_word_embeddings": None}, '"tie_word_embeddings" is null'),
    ],
)
def test_what_is_not_covered_is_refused_by_field(change, reason):
    with pytest.raises(UserError, match=f"^config.json: .*{reason}"):
        shape_of_config({**PUBLISHED_3B, **change}, "config.json")


@pytest.mark.parametrize(
    ("change", "base"),
    [
        ({}, 999999.4420358813),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5}}, 5.0),
        ({"rope_theta": None}, 10000.0),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, 10000.0),
    ],
)
def test_the_rotary_base_is_found_where_each_version_writes_it(change, base):
    config = {**PUBLISHED_3B, **change}
    assert shape_of_config(config, "config.json").rotary_base == base
    assert len(STARCODER2.notices(config)) == (base == 10000.0)


def test_rotation_equals_transformers():
    from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2RotaryEmbedding, apply_rotary_pos_emb

    config = Starcoder2Config(hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 12345.6})  # fmt: skip
    positions = torch.tensor([0, 1, 2, 0, 1, 16000])
    query, key = torch.randn(6, 4, 16), torch.randn(6, 2, 16)
    cos, sin = Starcoder2RotaryEmbedding(config)(query, positions[None])
    expected = apply_rotary_pos_emb(*(x.transpose(0, 1)[None] for x in (query, key)), cos, sin)
    by = rotation(positions, 12345.6, 16, torch.float32)
    for ours, theirs in zip((rotate(query, by), rotate(key, by)), expected, strict=True):
        torch.testing.assert_close(ours, theirs[0].transpose(0, 1), atol=1e-6, rtol=0)


LAYOUT = "--data-prefix unused --tokenizer-file / --train-iters 1"


@pytest.mark.parametrize(
    ("flags", "ranks", "reason"),
    [
        ("--preset starcoder2-3b --position-embedding-type absolute", 1, "StarCoder2 has rotary positions"),
        ("--preset starcoderbase-1b --rotary-base 5", 1, "--rotary-base 5 needs --position-embedding-type rope"),
        ("--preset starcoderbase-1b --num-query-groups 4", 1, "--num-query-groups 4: a GPTBigCode"),
        ("--preset starcoderbase-1b --window-size 4", 1, "--window-size: a GPTBigCode"),
        ("--preset tiny --untie-embeddings-and-output-weights", 1, "--untie-embeddings-and-output-weights: a GPT"),
        ("--preset starcoder2-3b --num-query-groups 5", 1, "--num-query-groups 5 does not divide the 24"),
        ("--preset starcoder2-3b --attention-head-type multihead --num-query-groups 4", 1, "exclude each other"),
        ("--preset starcoder2-3b --num-attention-heads 1024 --num-query-groups 1", 1, "3 channels per head are odd"),
        ("--preset starcoder2-3b --tensor-model-parallel-size 3", 3, "24 attention heads in 2 groups; use one of .1, 2, 4, 8"),
        ("--preset starcoder2-7b --tensor-model-parallel-size 6", 6, "36 attention heads in 4 groups; use one of .1, 2, 4."),
    ],
)  # fmt: skip
def test_flags_that_no_family_has_are_refused(flags, ranks, reason):
    with pytest.raises(UserError, match=reason):
        parse_args(f"{flags} {LAYOUT}".split(), ranks)


def test_a_hand_made_shape_with_rotary_positions_is_starcoder2s():
    flags = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --window-size 16"
    flags += " --position-embedding-type rope --untie-embeddings-and-output-weights --max-position-embeddings 128"
    shape = parse_args(f"{flags} {LAYOUT}".split()).shape
    assert shape == ModelShape(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, window_size=16, rotary_base=10000.0,
        untie_embeddings_and_output_weights=True, max_position_embeddings=128, family="starcoder2",
    )  # fmt: skip


def test_layers_are_not_transformer_engines():
    config = parse_args(f"--preset starcoder2-3b --bf16 {LAYOUT}".split())
    installed = Installed("2.9.0", flash_attention_2=True, capability=(9, 0))
    assert "rotary positions are applied by the local layers" in why_not_transformer_engine(config, installed)
    assert why_not_transformer_engine(replace(config, shape=PRESETS["tiny"]), installed) is None


def test_the_mtf_engine_refuses_the_model():
    config = parse_args(f"--preset starcoder2-3b --bf16 {LAYOUT}".split())
    with pytest.raises(UserError, match="--engine mtf: the branch has GPTBigCode .* and no StarCoder2; use --engine"):
        mtf_command(config, [], [], Path("/nowhere"))


def test_attention_flops_count_what_the_window_shows():
    shape = replace(PRESETS["starcoder2-3b"], window_size=4)
    pairs = {length: sum(min(q + 1, 4) for q in range(length)) for length in (3, 4, 10)}
    for length, seen in pairs.items():
        assert cost.attended_length(shape, length) * length / 2 == pytest.approx(seen, abs=2)
    assert cost.attended_length(PRESETS["tiny"], 10) == 10
