"""Packed sequences of several kinds of models equal their documents one by one; what is refused."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import one_error_line, run_program
from engine_runs import random_batch
from hf_runs import VOCABULARY, tiny_model, write_adapters

from megatron_ft.errors import UserError
from megatron_ft.hf_engine.arguments import parse
from megatron_ft.training.batches import micro_batch_from

KINDS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "starcoder2": {"sliding_window": 16, "use_bias": True},  # rows and some documents are longer
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
COMMON = "--data-prefix unused --train-iters 1"


@pytest.fixture
def flags(tmp_path) -> list[str]:
    (tmp_path / "tokenizer.json").write_text("{}")
    return [*COMMON.split(), "--tokenizer-file", str(tmp_path / "tokenizer.json")]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_documents_one_by_one(kind, flags, tmp_path):
    from megatron_ft.hf_engine.model import check_isolation, load_model, logits_of, read_config
    from megatron_ft.hf_engine.start import find_start

    directory = tiny_model(kind, tmp_path / kind, **KINDS[kind])
    config = parse([*flags, "--load", str(directory), "--seq-length", "96", "--micro-batch-size", "2"])
    point, cpu = find_start(str(directory), "latest", adapters=False), torch.device("cpu")
    packed, single = (load_model(directory, read_config(point), config, cpu).eval() for _ in range(2))
    batch = random_batch(3, 2, 96, 4, VOCABULARY)
    micro = micro_batch_from(batch, batch.loss_mask, "token", [0, 1])
    logits = logits_of(packed, micro, config, packed.config._attn_implementation)
    losses = F.cross_entropy(logits[0], micro.labels[0], reduction="none")
    loss = (losses * micro.weights[0]).sum() / micro.weight
    loss.backward()

    expected, bounds = 0.0, batch.cu_seqlens.tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        weights = micro.weights[0, first:last]
        if weights.any():
            logits = single(micro.tokens[:, first:last]).logits[0]
            losses = F.cross_entropy(logits, micro.labels[0, first:last], reduction="none")
            part = (losses * weights).sum() / micro.weight
            part.backward()
            expected += part.item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for (name, ours), theirs in zip(packed.named_parameters(), single.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6), name
    check_isolation(packed, kind, cpu)

    class Leaking(torch.nn.Module):
        """Forgets where documents begin."""

        def forward(self, input_ids, position_ids, **kwargs):
            return packed(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)

    if kind != "gpt_bigcode":  # learned positions end at 128, those of the probe at 16
        with pytest.raises(UserError, match="does not keep the documents of a packed sequence apart"):
            check_isolation(Leaking(), kind, cpu)


@pytest.mark.parametrize(("kind", "expected"), [("llama", "flash_attention_2"), ("xglm", None)])
def test_flash_attention_is_chosen_for_models_that_take_it(kind, expected, flags, tmp_path, monkeypatch):
    from transformers import CONFIG_MAPPING

    from megatron_ft.hf_engine import model

    monkeypatch.setattr(model, "is_flash_attn_2_available", lambda: True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    config = parse([*flags, "--load", str(tmp_path), "--bf16"])
    assert model.attention_of(CONFIG_MAPPING[kind](), config, torch.device("cuda")) == expected
    assert model.attention_of(CONFIG_MAPPING[kind](), config, torch.device("cpu")) is None


def test_flash_attention_gets_rows_of_which_transformers_finds_the_documents(flags, tmp_path):
    """By transformers' own test, without which it runs flash attention over entire rows."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    from megatron_ft.hf_engine.model import FLASH, logits_of

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = parse([*flags, "--load", str(tmp_path), "--seq-length", "96", "--micro-batch-size", "2"])
    batch = random_batch(3, 2, 96, 4, VOCABULARY)
    micro = micro_batch_from(batch, batch.loss_mask, "token", [0, 1])

    class Model(torch.nn.Module):
        """Returns its token ids as logits."""

        def forward(self, input_ids, position_ids, attention_mask, use_cache):
            assert attention_mask is None and _is_packed_sequence(position_ids, len(input_ids))
            assert (position_ids == 0).sum() == len(batch.cu_seqlens) - 1
            return SimpleNamespace(logits=input_ids[..., None])

    assert torch.equal(logits_of(Model(), micro, config, FLASH)[..., 0], micro.tokens)


def test_targets_are_named_as_in_megatron_or_as_in_the_model(flags, tmp_path):
    from transformers import AutoModelForCausalLM

    from megatron_ft.hf_engine.adapters import target_modules

    def targets(kind: str, words: str) -> list[str]:
        directory = tmp_path / kind
        if not directory.exists():
            tiny_model(kind, directory, **KINDS[kind])
        config = parse([*flags, "--load", str(directory), "--lora-rank", "4", *words.split()])
        return target_modules(AutoModelForCausalLM.from_pretrained(directory), config.lora)

    assert targets("llama", "--lora-targets linear_qkv,linear_fc1") == [
        "q_proj",
        "k_proj",
        "v_proj",
        "gate_proj",
        "up_proj",
    ]
    assert targets("gpt_bigcode", "--lora-targets linear_proj") == ["attn.c_proj"]
    assert targets("gpt_bigcode", "--lora-targets c_proj,c_attn,c_fc") == ["c_proj", "c_attn", "c_fc"]
    assert len(targets("llama", "")) == 7 and len(targets("gpt_bigcode", "")) == 4
    with pytest.raises(UserError, match="no linear layer of this llama is a c_fc; name some of .*mlp.up_proj"):
        targets("llama", "--lora-targets c_fc")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size: only --engine megatron-core has it"),
        ("--preset tiny", "--preset: only --engine megatron-core has it"),
        ("--recompute-granularity selective", "recomputes entire layers; give full"),
        ("--no-reset-position-ids", "tells documents apart by their positions"),
        ("--lora-dora", "--lora-dora needs adapters to train; add --lora-rank 16"),
        ("--seq-length 4 --load no/such", "--load no/such: no such directory"),
    ],
)
def test_flags_without_a_meaning_here_are_refused(flags, tmp_path, words, message):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError) as error:
        parse([*flags, "--load", str(model), *words.split()], world_size=2)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_flags_of_this_engine_are_refused_by_the_other(flags):
    from megatron_ft.config.arguments import parse_args

    with pytest.raises(UserError, match="--quantize-base: only --engine transformers has it"):
        parse_args([*flags, "--preset", "tiny", "--lora-rank", "4", "--quantize-base", "nf4"])


def refused(flags: list[str], load: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        parse([*flags, "--load", str(load), *words])
    return str(error.value)


def test_models_that_cannot_be_trained_are_refused_before_anything_is_loaded(flags, tmp_path):
    from megatron_ft.hf_engine.model import read_config
    from megatron_ft.hf_engine.start import find_start

    model = tmp_path / "model"
    model.mkdir()
    config = model / "config.json"
    assert "neither config.json nor an intact checkpoint found" in refused(flags, model)
    config.write_text("{}")
    assert "model_type" in refused(flags, model)
    config.write_text('{"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}')
    assert "the model's code comes with it (auto_map), and is not run" in refused(flags, model)
    config.write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="'t5', which is not a causal language model of transformers"):
        read_config(find_start(str(model), "latest", adapters=False))


def test_models_that_are_damaged_report_one_line_errors(flags, tmp_path):
    from megatron_ft.hf_engine.model import load_model, read_config
    from megatron_ft.hf_engine.start import find_start

    model = tiny_model("llama", tmp_path / "llama")
    config, weights = model / "config.json", model / "model.safetensors"

    def error_of_loading() -> str:
        point = find_start(str(model), "latest", adapters=False)
        with pytest.raises(UserError) as error:
            load_model(model, read_config(point), parse([*flags, "--load", str(model)]), torch.device("cpu"))
        assert "\n" not in str(error.value)
        return str(error.value)

    good = json.loads(config.read_text())
    config.write_text(json.dumps({**good, "hidden_size": "32"}))
    assert "config.json: transformers cannot read it: Validation error for field 'hidden_size'" in error_of_loading()
    config.write_text(json.dumps({**good, "intermediate_size": 2 * good["intermediate_size"]}))
    assert "mlp.down_proj.weight is [" in error_of_loading()
    config.write_text(json.dumps(good))
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "damaged weights (Error while deserializing header" in error_of_loading()


def test_missing_packages_are_refused_before_anything_is_loaded(flags, tmp_path):
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    model = tiny_model("llama", tmp_path / "llama")
    words = ["--load", str(model), "--lora-rank", "4", "--quantize-base", "nf4"]
    done = run_program("launch/finetune.py", "--engine", "transformers", *flags, *words, ok=False)
    assert one_error_line(done) == "error: bitsandbytes is not installed; pip install -e '.[transformers]' installs it"


def test_adapters_with_other_settings_are_refused(flags, tmp_path):
    from megatron_ft.hf_engine.adapters import add_adapters, load_adapters
    from megatron_ft.hf_engine.model import load_model, read_config
    from megatron_ft.hf_engine.start import find_start

    model = tiny_model("llama", tmp_path / "llama")
    adapters = write_adapters(model, tmp_path / "adapters", r=4, lora_alpha=8, target_modules=["q_proj"])
    assert "adapters, not a complete model" in refused(flags, adapters)
    point = find_start(str(adapters), "latest", adapters=True)
    assert point.model == model

    def difference(words: str) -> str:
        config = parse([*flags, "--load", str(adapters), "--lora-rank", "4", *words.split()])
        base = load_model(model, read_config(point), config, torch.device("cpu"))
        with pytest.raises(UserError) as error:
            load_adapters(add_adapters(base, config, model), adapters, config)
        return str(error.value)

    assert "--lora-alpha was 8, is 16.0" in difference("--lora-alpha 16 --lora-targets q_proj")
    assert "is only in the flags" in difference("--lora-alpha 8 --lora-targets q_proj,v_proj")
    assert "is only in the adapters" in difference("--lora-alpha 8 --lora-targets v_proj")
    assert json.loads((adapters / "adapter_config.json").read_text())["r"] == 4
