"""Every GPTBigCode on the Hub loads, plans, and survives both Megatron formats with its logits.

The models are scaled down to two layers and 8 channels per head; their heads, and what is special
about each configuration, stay.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import _run
from gpt_bigcode_models import MODELS, REFACT, ROTARY, SANTACODER
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_ft.errors import UserError
from megatron_ft.model.families import PRESETS, family_of, shape_of_config
from megatron_ft.weights.open import open_weights

PRESET_OF = {
    "starcoderbase-1b": "starcoderbase-1b", "starcoderbase-3b": "starcoderbase-3b", "starcoder": "starcoderbase",
    "starcoderbase-7b": "starcoderbase-7b", "gpt_bigcode-santacoder": "santacoder",
    "granite-20b-code-base": "granite-20b", "granite-34b-code-instruct": "granite-34b",
}  # fmt: skip
ARCHITECTURE = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")


def scaled(config: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model, small; its ids keep their distance to the end of the vocabulary."""
    width, fewer = 8 * config["n_head"], 49152 - 256
    ids = {name: config[name] - (fewer if config[name] else 0) for name in config if name.endswith("_token_id")}
    small = {"n_layer": 2, "n_embd": width, "n_inner": 4 * width, "n_positions": config["n_positions"] // 256}
    return {**config, **small, **ids, "vocab_size": config["vocab_size"] - fewer}


def write_model(config: dict[str, Any], directory: Path):
    """A random model of this configuration, as it would be on the Hub; biases are not zero."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(1)
    model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.1)
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))  # not what transformers makes of it
    return model


def succeed(program: str, *argv: str | Path) -> str:
    status, out, err = _run(program, [str(word) for word in argv])
    assert status == 0, f"{program} {argv}\n{out}\n{err}"
    return out + err


def logits_of(directory: Path) -> torch.Tensor:
    from transformers import GPTBigCodeForCausalLM

    model, info = GPTBigCodeForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


def round_trips(root: Path) -> dict[str, dict[str, Any]]:
    """What became of each model, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for name, config in MODELS.items():
        here = root / name
        start = here / "start"
        model = write_model(scaled(config), start)
        with torch.no_grad():
            expected = model(torch.arange(8)[None]).logits
        result = found[name] = {"plan": plan_of(config, here / "published")}
        for form, layout in (("torch_dist", "2 1"), ("legacy", "2 2")):
            tp, pp = layout.split()
            made, back = here / form, here / f"{form}-hf"
            words = ["--format", form, "--tensor-parallel", tp, "--pipeline-parallel", pp]
            printed = succeed("convert/hf_to_megatron.py", "--load", start, "--save", made, *words)
            succeed("convert/megatron_to_hf.py", "--load", made, "--output", back)
            keep = config["vocab_size"] - 49152 + 256  # legacy checkpoints do not record what is padding
            before, after = (load_file(where / "model.safetensors") for where in (start, back))
            after["transformer.wte.weight"] = after["transformer.wte.weight"][:keep]
            result[form] = {
                "same_tensors": [name for name, tensor in after.items() if torch.equal(tensor, before[name])],
                "tensors": sorted(before.keys() - {"lm_head.weight"}),
                "difference": (logits_of(back)[..., :keep] - expected).abs().max().item(),
                "config": json.loads((back / "config.json").read_text()),
                "card": (back / "README.md").read_text(),
                "printed": printed,
            }
    return found


def plan_of(config: dict[str, Any], directory: Path) -> str:
    """What the planner prints for the published model, of which only config.json is there."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    return succeed("launch/plan.py", "--load", directory, "--nodes", "8", "--gpu", "h100-80gb")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Where `results` puts its models: NAME/start, NAME/torch_dist, NAME/legacy."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def results(models) -> dict[str, dict[str, Any]]:
    [found] = run_ranks(round_trips, 1, models)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_each_model_loads_plans_and_comes_back_with_its_logits(name, results):
    config, small, result = MODELS[name], scaled(MODELS[name]), results[name]
    shape = shape_of_config(config, "config.json")
    written = family_of(shape).write_config(shape)
    same = {key: value for key, value in written.items() if key in config and key != "architectures"}
    assert {key: config[key] for key in same} == same and len(same) > 12
    assert f"{shape.num_parameters():,} parameters" in result["plan"] and "proposal 1:" in result["plan"]
    if name in PRESET_OF:
        preset = PRESETS[PRESET_OF[name]]
        assert [getattr(preset, field) for field in ARCHITECTURE] == [getattr(shape, field) for field in ARCHITECTURE]
    for form in ("torch_dist", "legacy"):
        back = result[form]
        assert sorted(back["same_tensors"]) == back["tensors"] and len(back["tensors"]) == 28
        assert back["difference"] < 2e-5  # the other form of GELU: 1e-3
        assert back["config"]["activation_function"] == config["activation_function"]
        assert f"activation `{config['activation_function']}`" in back["card"]
        gelu_line = "StarCoder was pre-trained with the tanh form" in back["printed"]
        assert gelu_line == (config["activation_function"] == "gelu")
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            known = small.get(token) if small.get(token, 0) < small["vocab_size"] else None
            assert back["config"].get(token) == known, token
    outside = "eos_token_id 1360 is not one of the vocabulary's 256 ids and is left out"
    assert (outside in results[name]["legacy"]["printed"]) == (name == "NT-Java-1.1B")


def santacoder_tensors(of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A GPTBigCode's tensors as bigcode/santacoder's own code has them."""
    found = {}
    for name, tensor in of.items():
        linear = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        tensor = tensor.t().contiguous() if linear else tensor
        if ".attn.c_attn." in name:
            hidden = of["transformer.ln_f.weight"].numel()
            query, key_value = tensor[..., :hidden], tensor[..., hidden:]
            found[name.replace("c_attn", "q_attn")] = query.contiguous()
            found[name.replace("c_attn", "kv_attn")] = key_value.contiguous()
        else:
            found[name] = tensor
    return {**found, "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}


@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
def test_santacoder_with_code_of_its_own_is_the_converted_model(suffix, results, models, tmp_path):
    theirs = models / "gpt_bigcode-santacoder/start"
    small, names = scaled(MODELS["gpt_bigcode-santacoder"]), ("n_layer", "n_embd", "n_inner", "n_positions")
    sizes = {name: small[name] for name in (*names, "vocab_size", "bos_token_id", "eos_token_id")}
    (tmp_path / "config.json").write_text(json.dumps({**SANTACODER, **sizes}))
    tensors = santacoder_tensors(load_file(theirs / "model.safetensors"))
    assert tensors["transformer.h.1.attn.kv_attn.weight"].shape == (128, 16)
    (torch.save if suffix.endswith(".bin") else save_file)(tensors, tmp_path / suffix)
    ours, expected = open_weights(tmp_path), open_weights(theirs)
    assert ours.shape == expected.shape and ours.special_ids == {"bos_token_id": 256, "eos_token_id": 256}
    for name in expected.names():
        assert torch.equal(ours.read(name), expected.read(name)), name
    del tensors["transformer.h.1.attn.kv_attn.weight"]
    (torch.save if suffix.endswith(".bin") else save_file)(tensors, tmp_path / suffix)
    with pytest.raises(UserError, match="1 of 28 tensors are missing, the first is transformer.h.1.attn.c_attn.weight"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        (REFACT, "names GPTRefactForCausalLM, expected GPTBigCodeForCausalLM; its learned positions .* are missing"),
        (ROTARY, "use_position_embeddings is false; a GPTBigCode has learned positions"),
        ({**ROTARY, "use_position_embeddings": True}, "use_rotary_embeddings is True, which is rotary positions"),
        ({**REFACT, "architectures": [["x"]]}, "architectures names .'x'., expected GPTBigCodeForCausalLM"),
        ({**SANTACODER, "attention_head_type": "multihead"}, "'multihead', .*bigcode/gpt_bigcode-santacoder is that"),
        ({**SANTACODER, "architectures": ["GPT2LMHeadModel"]}, "model_type is 'gpt2', expected 'gpt_bigcode'"),
    ],
)
def test_other_models_are_refused_by_what_they_lack(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        open_weights(tmp_path)


def test_refact_that_hides_its_class_is_refused_by_its_first_missing_tensor(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**REFACT, "architectures": None}))
    names = ("wte.weight", "h.0.ln_1.weight", "h.0.attn.q.weight", "h.0.attn.kv.weight")
    save_file({f"transformer.{name}": torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    missing = "tensors are missing, the first is transformer.wpe.weight, and there is transformer.h.0.attn."
    with pytest.raises(UserError, match=missing):
        open_weights(tmp_path)


def activations(start: Path, legacy: Path, out: Path) -> dict[str, Any]:
    """What runs compute that start from the same weights in other ways, and the lines they log."""
    from megatron_ft.config.arguments import parse_args
    from megatron_ft.run import with_model

    data = ["--data-prefix", "unused", "--tokenizer-file", __file__, "--train-iters", "1", "--seq-length", "8"]
    found: dict[str, Any] = {}
    for flags in (
        f"--load {start}",
        f"--load {start} --activation gelu_tanh",
        f"--load {start} --activation gelu",
        f"--preset starcoderbase --load {start}",
        f"--preset starcoderbase --load {start} --activation gelu_tanh",
        f"--load {legacy}",
        f"--load {legacy} --activation gelu",
        "--preset tiny --from-scratch",
        "--preset tiny --from-scratch --activation gelu",
    ):
        config = with_model(parse_args([*data, *flags.split()]))
        assert config.shape is not None
        lines = [line for line in config.notices if "activation" in line]
        found[flags.replace(f"{start}", "GELU").replace(f"{legacy}", "LEGACY")] = (config.shape.exact_gelu, lines)
    printed = succeed("convert/megatron_to_hf.py", "--load", legacy, "--output", out, "--activation", "gelu")
    found["exported"] = (json.loads((out / "config.json").read_text())["activation_function"], printed)
    words = ["--format", "torch_dist", "--activation", "gelu_tanh"]
    printed = succeed("convert/hf_to_megatron.py", "--load", start, "--save", out / "core", *words)
    found["imported"] = (open_weights(out / "core").shape.exact_gelu, printed)
    return found


def test_the_activation_is_the_configurations_unless_a_flag_overrides_it(results, models, tmp_path):
    """`legacy`: of the branch, with arguments into which a merge tool wrote the exact form."""
    legacy = models / "starcoderbase-1b/legacy"
    for file in legacy.glob("release/mp_rank_*/model_optim_rng.pt"):
        content = torch.load(file, weights_only=False)
        content["args"].bias_gelu_fusion = False
        torch.save(content, file)
    [found] = run_ranks(activations, 1, models / "starcoder/start", legacy, tmp_path / "exported")
    to_tanh = ["--activation gelu_tanh overrides the checkpoint's gelu"]
    to_gelu = ["--activation gelu overrides the checkpoint's gelu_tanh"]
    assert found == {
        "--load GELU": (True, []),
        "--load GELU --activation gelu_tanh": (False, to_tanh),
        "--load GELU --activation gelu": (True, []),
        "--preset starcoderbase --load GELU": (True, []),
        "--preset starcoderbase --load GELU --activation gelu_tanh": (False, to_tanh),
        "--load LEGACY": (False, []),
        "--load LEGACY --activation gelu": (True, to_gelu),
        "--preset tiny --from-scratch": (False, []),
        "--preset tiny --from-scratch --activation gelu": (True, []),
        "exported": ("gelu", found["exported"][1]),
        "imported": (False, found["imported"][1]),
    }
    assert to_gelu[0] in found["exported"][1] and to_tanh[0] in found["imported"][1]


def logits_of_both(directory: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """fp32 logits of a Hugging Face model: transformers', ours, and ours in the other form."""
    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.config.config import Config
    from megatron_ft.engine import device, parallel
    from megatron_ft.engine.model import build_model

    config = Config().with_flags(transformer_impl="local", global_batch_size=1)
    device.set_up_device(config)
    parallel.initialize(config)
    found = [logits_of(directory).numpy()]
    source = open_weights(directory)
    for activation in (None, "gelu_tanh"):
        source.override_activation(activation)
        [model] = build_model(config, source.shape, source.shape.vocab_size)
        load_weights(source, [model])
        with torch.no_grad():
            tokens = torch.arange(8)[None]
            found.append(model.eval()(tokens, tokens, None).numpy())
    return found[0], found[1], found[2]


def test_the_exact_form_computes_transformers_logits_and_the_other_does_not(results, models):
    [(theirs, ours, other)] = run_ranks(logits_of_both, 1, models / "starcoder/start")
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(other - theirs).max() > 1e-4
