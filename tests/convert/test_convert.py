"""Conversion between Hugging Face, torch_dist and the mtf branch's format, checked by verify.py."""

import argparse
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import ROOT, convert, refusal, tiny_hf
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_ft.errors import UserError
from megatron_ft.weights.hf_files import parse_size
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.output_directory import new_directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trips_are_bitwise_equal_and_load_strictly(tmp_path, dtype, multi_query):
    from transformers import AutoTokenizer, GPTBigCodeForCausalLM

    start = tiny_hf(tmp_path / "start", dtype=dtype, multi_query=multi_query)
    before = tensors_of(start)
    layout = ["--tensor-parallel", "4", "--pipeline-parallel", "2"]
    for form in ("legacy", "torch_dist"):
        convert("hf_to_megatron", "--load", start, "--save", tmp_path / form, "--format", form, *layout)
        source = open_weights(tmp_path / form)
        assert source.shape.vocab_size == 512 and source.iteration == "release"
        assert not source.read_slice("embedding.word_embeddings.weight", 0, 300, 512).any()  # padding is zeros
        back = tmp_path / f"{form}-hf"
        size = "120KB" if form == "legacy" else "5GB"
        convert(
            "megatron_to_hf",
            "--load",
            tmp_path / form,
            "--output",
            back,
            "--tokenizer-from",
            start,
            "--max-shard-size",
            size,
        )
        assert (back / "model.safetensors.index.json").exists() == (form == "legacy")
        assert_same(tensors_of(back), before)
        model, info = GPTBigCodeForCausalLM.from_pretrained(back, output_loading_info=True)
        assert not any(info.values()) and model.dtype == dtype, info
        model.save_pretrained(tmp_path / "again")
        assert_same(tensors_of(tmp_path / "again"), before)
        shutil.rmtree(tmp_path / "again")
        config = json.loads((back / "config.json").read_text())
        assert (config["eos_token_id"], config["bos_token_id"], config["vocab_size"]) == (0, 0, 300)
        assert (config["multi_query"], config["activation_function"]) == (multi_query, "gelu_pytorch_tanh")
        assert AutoTokenizer.from_pretrained(back)("w3 w5").input_ids == [3, 5]
    if multi_query and dtype == torch.bfloat16:
        convert("reshard", "--load", tmp_path / "legacy", "--save", tmp_path / "legacy-tp1", "--tensor-parallel", "1")
        convert("verify", tmp_path / "legacy-tp1", tmp_path / "torch_dist-hf")


def test_golden_checkpoints_become_the_golden_model_with_mtf_logits(golden, tmp_path):
    from transformers import GPTBigCodeForCausalLM

    for layout in ("tp1pp1", "tp2pp2", "distopt_tp2pp2"):
        out = tmp_path / layout
        convert("megatron_to_hf", "--load", golden / "legacy" / layout, "--output", out, "--keep-padding")
        assert_same(tensors_of(out), load_file(golden / "hf/hf_tiny/model.safetensors"))
    reference = np.load(golden / "train/ref_short_s257.npz")
    end = int((reference["position_ids"][0, 1:] == 0).argmax()) + 1  # the first document of the first row
    with torch.no_grad():
        logits = GPTBigCodeForCausalLM.from_pretrained(out)(torch.from_numpy(reference["tokens"][:1, :end])).logits
    assert np.abs(logits[0].numpy() - reference["logits"][0, :end]).max() < 1e-5

    tokenizer = golden / "data/tokenizer.json"
    cut = tmp_path / "cut"
    convert("megatron_to_hf", "--load", golden / "legacy/tp2pp2", "--output", cut, "--tokenizer-file", tokenizer)
    assert tensors_of(cut)["transformer.wte.weight"].shape == (1000, 64)
    card = (cut / "README.md").read_text()
    assert "| `--weight-decay` | 0.05 |" in card and "iteration 7" in card and str(golden) not in card
    report = tmp_path / "report.json"
    printed = convert("verify", golden / "legacy/distopt_tp2pp2", cut, "--logits", "--report", report)
    assert "24 embedding rows are on one side only" in printed and "padding" in printed
    found = json.loads(report.read_text())
    assert found["equal"] and found["largest_difference"] == 0 and found["largest_logit_difference"] < 1e-5
    for dtype, name in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        out = tmp_path / dtype
        convert(
            "megatron_to_hf", "--load", golden / "legacy/tp2pp2", "--output", out, "--dtype", dtype, "--keep-padding"
        )
        assert tensors_of(out)["transformer.h.0.mlp.c_fc.weight"].dtype == name
        convert("verify", golden / "legacy/tp2pp2", out, "--allow-rounding")
    assert "def print_hello_world():" in convert("complete", cut, "--max-new-tokens", "3")


def test_verify_reports_differences_and_fails(golden, tmp_path):
    changed = Path(shutil.copytree(golden / "hf/hf_tiny", tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    tensors["transformer.h.2.mlp.c_fc.weight"][17, 3] += 0.25
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    printed = convert(
        "verify", golden / "legacy/tp2pp2", changed, "--logits", "--report", tmp_path / "report.json", status=1
    )
    assert "0.25 at transformer.h.2.mlp.c_fc.weight" in printed and printed.rstrip().endswith("DIFFERENT")
    assert json.loads((tmp_path / "report.json").read_text())["largest_logit_difference"] > 1e-4
    # Tolerated as tensors, but the models do not compute the same: still a failure.
    printed = convert("verify", golden / "legacy/tp2pp2", changed, "--logits", "--tolerance", "1", status=1)
    assert "(tolerated)" in printed
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-6}))
    assert "layernorm_epsilon: 1e-05 and 1e-06" in convert("verify", golden / "legacy/tp2pp2", changed, status=1)


def test_legacy_files_match_those_the_mtf_branch_writes(golden, tmp_path):
    hf = golden / "hf/hf_tiny"
    out = tmp_path / "legacy"
    convert("hf_to_megatron", "--load", hf, "--save", out, "--format", "legacy", "--tensor-parallel", "2",
            "--pipeline-parallel", "2", "--data-parallel", "2")  # fmt: skip
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "release"
    for rank in ("00_000", "00_001", "01_000", "01_001"):
        from megatron_ft.weights.safe_pickle import load_pt

        theirs = load_pt(golden / f"legacy/tp2pp2/iter_0000007/mp_rank_{rank}/model_optim_rng.pt")
        place = out / f"release/mp_rank_{rank}"
        ours = torch.load(place / "model_rng.pt", weights_only=False)
        assert isinstance(ours["args"], argparse.Namespace) and ours["checkpoint_version"] == 3.0
        for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "padded_vocab_size",
                     "make_vocab_size_divisible_by", "tokenizer_type", "tensor_model_parallel_size",
                     "pipeline_model_parallel_size", "attention_head_type", "ffn_hidden_size", "kv_channels"):  # fmt: skip
            assert getattr(ours["args"], name) == getattr(theirs["args"], name), name

        def compare(a, b, where=""):
            assert a.keys() == b.keys(), where
            for key in a:
                if isinstance(a[key], dict):
                    compare(a[key], b[key], f"{where}{key}.")
                else:
                    assert torch.equal(a[key], b[key]) and a[key].is_contiguous(), f"{where}{key}"

        compare(ours["model"], theirs["model"])
        assert [(out / f"release/mp_rank_{rank}_00{d}/optim.pt").is_file() for d in range(3)] == [True, True, False]


def load_by_megatron_core(directory: str, tp: int, pp: int) -> dict[str, np.ndarray]:
    """This rank's parameters after Megatron-Core's own loader, with 640 embedding rows."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megatron_ft.config.config import Config
    from megatron_ft.config.flags import Parallel
    from megatron_ft.engine import device, parallel
    from megatron_ft.engine.model import build_model

    device.set_up_device()
    config = Config(parallel=Parallel(tensor=tp, pipeline=pp, world_size=tp * pp)).with_flags(global_batch_size=1)
    parallel.initialize(config)
    [model] = build_model(config, open_weights(directory).shape, 640)
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    state, missing, unexpected = dist_checkpointing.load(
        {"model": model.sharded_state_dict(metadata=metadata)}, directory + "/release", strict=StrictHandling.RETURN_ALL
    )
    model.load_state_dict(state["model"])
    assert not missing and not unexpected
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def test_megatron_core_loads_the_torch_dist_files_at_other_layouts(tmp_path):
    start = tiny_hf(tmp_path / "hf")
    out = tmp_path / "core"
    convert("hf_to_megatron", "--load", start, "--save", out, "--format", "torch_dist", "--tensor-parallel", "4",
            "--pipeline-parallel", "2")  # fmt: skip
    resharded = tmp_path / "resharded"
    convert("reshard", "--load", out, "--save", resharded, "--tensor-parallel", "1", "--pipeline-parallel", "4")
    assert open_weights(resharded).shape.vocab_size == 384
    expected = tensors_of(start)
    for directory, tp, pp in ((out, 2, 1), (resharded, 1, 2)):
        ranks = run_ranks(load_by_megatron_core, tp * pp, str(directory), tp, pp)
        qkv = np.concatenate([rank["decoder.layers.1.self_attention.linear_qkv.weight"] for rank in ranks[:tp]])
        assert np.array_equal(qkv, expected["transformer.h.1.attn.c_attn.weight"].numpy())
        proj = np.concatenate([rank["decoder.layers.1.mlp.linear_fc2.weight"] for rank in ranks[-tp:]], axis=1)
        last = 3 if pp == 2 else 1
        assert np.array_equal(proj, expected[f"transformer.h.{last}.mlp.c_proj.weight"].numpy())
        words = np.concatenate([rank["embedding.word_embeddings.weight"] for rank in ranks[:tp]])
        assert np.array_equal(words[:300], expected["transformer.wte.weight"].numpy()) and not words[300:].any()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_hf(tmp_path_factory.mktemp("tiny") / "hf")


def test_usage_errors_report_one_line_and_write_nothing(tiny, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "precious").write_text("x")
    out = tmp_path / "out"
    to_core = ("hf_to_megatron", "--load", tiny, "--format", "torch_dist", "--save")
    assert "is not empty" in refusal(*to_core, used)
    assert (used / "precious").read_text() == "x"
    assert "contains precious, so no converter wrote it" in refusal(*to_core, used, "--overwrite")
    assert (used / "precious").read_text() == "x"
    (used / "precious").unlink()
    convert(*to_core, used)
    convert(*to_core, used, "--overwrite", "--dtype", "bf16")
    assert sorted(path.name for path in used.iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
    assert "--tensor-parallel 3 does not divide the 8 attention heads" in refusal(
        *to_core, out, "--tensor-parallel", "3"
    )
    assert "--pipeline-parallel 3 does not divide the 4 layers" in refusal(*to_core, out, "--pipeline-parallel", "3")
    assert "--pipeline-parallel 0: must be at least 1" in refusal(*to_core, out, "--pipeline-parallel", "0")
    assert "use convert/hf_to_megatron.py" in refusal(
        "reshard", "--load", tiny, "--save", out, "--tensor-parallel", "1"
    )
    assert "convert/reshard.py" in refusal("hf_to_megatron", "--load", used, "--format", "legacy", "--save", out)
    assert "a Hugging Face model already" in refusal("megatron_to_hf", "--load", tiny, "--output", out)
    back = ("megatron_to_hf", "--load", used, "--output", out)
    assert "no such tokenizer" in refusal(*back, "--tokenizer-file", tmp_path / "none.json")
    assert "iteration 5 was asked for; there are release" in refusal(*back, "--iteration", "5")
    assert "not a size" in refusal(*back, "--max-shard-size", "lots")
    assert "--merge-lora" in refusal(*back, "--merge-lora")
    larger = tiny_hf(tmp_path / "larger", vocab=400)
    assert "400 tokens, but" in refusal(*back, "--tokenizer-from", larger)
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama"}')
    assert "expected 'gpt_bigcode'" in refusal("verify", llama, tiny)
    assert "convert it with convert/megatron_to_hf.py" in refusal("complete", used)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["larger", "llama", "used"]

    shard = used / "release/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-3000])
    assert "cut short" in refusal(*back)
    shard.unlink()
    assert "missing __0_0.distcp" in refusal(*back)
    (used / "release/.metadata").unlink()
    assert "its save did not finish" in refusal(*back)
    with pytest.raises(UserError, match=r"1000000.00 GB will be written, but its disk has .* GB free"):
        with new_directory(tmp_path / "huge", needed=10**15):
            pass
    assert not out.exists() and not (tmp_path / "huge").exists()


def test_values_too_large_for_fp16_are_reported(tiny, tmp_path):
    big = Path(shutil.copytree(tiny, tmp_path / "big"))
    tensors = load_file(big / "model.safetensors")
    tensors["transformer.h.1.ln_1.weight"][5] = 1e6
    save_file(tensors, big / "model.safetensors", metadata={"format": "pt"})
    line = refusal("hf_to_megatron", "--load", big, "--save", tmp_path / "out", "--format", "legacy", "--dtype", "fp16")
    assert (
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight: holds values up to 1e+06" in line
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_writes_nothing(tmp_path, stop):
    """The signal arrives in the middle of a file."""
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from megatron_ft.weights.output_directory import new_directory
from megatron_ft.errors import run_program
def main():
    with new_directory(Path({str(tmp_path / "out")!r}), needed=1) as directory:
        (directory / "half").write_bytes(b"x")
        print("half-way", flush=True)
        time.sleep(60)
run_program(main)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half-way\n"
    process.send_signal(stop)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == ((130, "interrupted\n") if stop == signal.SIGINT else (143, "terminated\n"))
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_parsed_as_in_transformers():
    assert [parse_size(text) for text in ("5GB", "1.5MB", "2GiB", "77")] == [5 * 10**9, 1_500_000, 2**31, 77]
    for wrong in ("0GB", "GB", "5 parsecs", "inf", "nan"):
        with pytest.raises(UserError, match="--max-shard-size"):
            parse_size(wrong)


def test_a_tiny_model_converts_in_seconds(tiny, tmp_path):
    for command in (
        ("hf_to_megatron", "--load", tiny, "--save", tmp_path / "m", "--format", "legacy"),
        ("megatron_to_hf", "--load", tmp_path / "m", "--output", tmp_path / "h"),
    ):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        program, *argv = map(str, command)
        subprocess.run(
            [sys.executable, str(ROOT / f"convert/{program}.py"), *argv], check=True, cwd="/", capture_output=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # CPU seconds, imports included: on a shared machine steadier than the clock.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


@pytest.mark.slow
def test_a_model_of_real_width_converts_in_little_memory(tmp_path):
    """Four layers of StarCoderBase-1B's width, TP4 PP4: 0.9 GB in, 0.6 GB out."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "bench/convert.py"), "--preset", "starcoderbase-1b", "--scale", "0.17"]
    subprocess.run([*command, "--directory", str(tmp_path), "--report", str(report)], check=True, cwd="/")
    found = json.loads(report.read_text())
    assert found["layers"] == 4 and found["gigabytes"] > 0.8
    assert found["peak RssAnon, MiB"] < 1024
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
