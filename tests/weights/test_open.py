"""Reading weights from every format, and filling Megatron-Core models from them."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from megatron_ft.errors import UserError
from megatron_ft.model.hf_names import hf_name
from megatron_ft.model.tensor_names import tensor_names
from megatron_ft.weights.open import open_weights

LEGACY = ("tp1pp1", "tp2pp2", "distopt_tp2pp2")


@pytest.fixture(scope="module")
def hf_tiny(golden) -> dict[str, torch.Tensor]:
    return load_file(golden / "hf/hf_tiny/model.safetensors")


def assert_same(source, tensors: dict[str, torch.Tensor]) -> None:
    """A source has exactly these tensors of a Hugging Face GPTBigCode."""
    assert {hf_name(source.shape, name) for name in source.names()} == set(tensors)
    for name in source.names():
        assert torch.equal(source.read(name), tensors[hf_name(source.shape, name)]), name


@pytest.mark.parametrize("layout", LEGACY)
def test_legacy_layouts_read_as_exactly_the_hugging_face_tensors(golden, hf_tiny, layout):
    source = open_weights(golden / "legacy" / layout)
    assert source.iteration == 7 and source.args["hidden_size"] == 64 and source.dtype == torch.float32
    assert_same(source, hf_tiny)
    proj, fused = "decoder.layers.3.mlp.linear_fc2.weight", "decoder.layers.3.self_attention.linear_qkv.weight"
    hf_proj, hf_fused = hf_tiny["transformer.h.3.mlp.c_proj.weight"], hf_tiny["transformer.h.3.attn.c_attn.weight"]
    assert torch.equal(source.read_slice(proj, 1, 20, 180), hf_proj[:, 20:180])
    assert torch.equal(source.read_slice(fused, 0, 20, 80), hf_fused[20:80])
    assert torch.equal(source.read_slice(fused, 1, 3, 9), hf_fused[:, 3:9])


def copy_hf(golden: Path, to: Path) -> Path:
    return Path(shutil.copytree(golden / "hf/hf_tiny", to))


def test_hugging_face_shards_bin_files_and_bare_models_read_the_same(golden, hf_tiny, tmp_path):
    from transformers import GPTBigCodeForCausalLM

    names = list(hf_tiny)
    sharded = copy_hf(golden, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    halves = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in halves.items():
        save_file({name: hf_tiny[name] for name in part}, sharded / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))

    binary = copy_hf(golden, tmp_path / "binary")
    (binary / "model.safetensors").unlink()
    tied = {**hf_tiny, "lm_head.weight": hf_tiny["transformer.wte.weight"]}
    torch.save(tied, binary / "pytorch_model.bin")

    bare = copy_hf(golden, tmp_path / "bare")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in hf_tiny.items()}, bare / "model.safetensors"
    )

    for directory in (sharded, binary, bare):
        source = open_weights(directory)
        assert source.names() == tensor_names(source.shape)
        assert_same(source, hf_tiny)

    # transformers loads the single file where there is an index too, and safetensors before .bin.
    save_file({name: tensor + 1 for name, tensor in hf_tiny.items()}, sharded / "model.safetensors")
    torch.save(tied, sharded / "pytorch_model.bin")
    (binary / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"nothing": "gone.bin"}}))
    for directory in (sharded, binary):
        source, loaded = open_weights(directory), GPTBigCodeForCausalLM.from_pretrained(directory)
        assert_same(source, dict(loaded.named_parameters()))
    assert open_weights(binary).notice.endswith(
        "reading pytorch_model.bin, as transformers does, and ignoring pytorch_model.bin.index.json"
    )
    assert open_weights(bare).notice is None
    (sharded / "model.safetensors").unlink()
    assert_same(open_weights(sharded), hf_tiny)

    (sharded / "b.safetensors").unlink()
    with pytest.raises(UserError, match="shards that are missing: b.safetensors"):
        open_weights(sharded)
    save_file({**hf_tiny, "lm_head.weight": hf_tiny["transformer.wte.weight"] + 1}, bare / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs"):
        open_weights(bare)
    wrong = {**hf_tiny, "transformer.h.2.mlp.c_fc.weight": torch.zeros(8, 64)}
    save_file(wrong, bare / "model.safetensors")
    with pytest.raises(UserError, match=r"h.2.mlp.c_fc.weight has shape \[8, 64\], expected \[256, 64\]"):
        open_weights(bare)
    (bare / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="'llama', expected 'gpt_bigcode'"):
        open_weights(bare)


def edit(file: Path, change) -> None:
    """Rewrite one rank's file of a golden checkpoint."""
    from megatron_ft.weights.safe_pickle import load_pt

    found = load_pt(file)
    found = {
        "args": vars(found["args"]),
        "model": found["model"],
        "iteration": found["iteration"],
        "checkpoint_version": 3.0,
    }
    found["args"] = Namespace(
        **{k: v for k, v in found["args"].items() if k not in ("model_type", "position_embedding_type")}
    )
    change(found)
    torch.save(found, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def test_an_inconsistent_legacy_checkpoint_is_refused_by_file(golden, tmp_path):
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(golden / "legacy/tp2pp2", tmp_path / name)) / "iter_0000007"

    missing = damaged("missing")
    shutil.rmtree(missing / "mp_rank_01_001")
    with pytest.raises(UserError, match="TP2 PP2 .*mp_rank_01_001 is missing"):
        open_weights(missing)

    mixed = damaged("mixed")
    edit(mixed / "mp_rank_01_000/model_optim_rng.pt", lambda found: found.update(iteration=9))
    with pytest.raises(UserError, match="mp_rank_01_000: from iteration 9, but the first rank is from 7"):
        open_weights(mixed)

    drifted = damaged("drifted")

    def nudge(found):
        found["model"]["language_model"]["encoder"]["layers.1.self_attention.key_value.weight"] += 0.5

    edit(drifted / "mp_rank_01_001/model_optim_rng.pt", nudge)
    source = open_weights(drifted)
    source.read("decoder.layers.2.self_attention.linear_qkv.weight")
    with pytest.raises(
        UserError, match="layers.1.self_attention.key_value.weight .*differs between mp_rank_00_001 and mp_rank_01_001"
    ):
        source.read("decoder.layers.3.self_attention.linear_qkv.weight")

    untied = damaged("untied")
    edit(
        untied / "mp_rank_01_001/model_optim_rng.pt",
        lambda found: found["model"]["word_embeddings_for_head"]["weight"].add_(1),
    )
    with pytest.raises(UserError, match="word_embeddings_for_head.weight of mp_rank_01_001 differs"):
        open_weights(untied).read("embedding.word_embeddings.weight")

    short = damaged("short")
    edit(
        short / "mp_rank_00_000/model_optim_rng.pt",
        lambda found: found["model"]["language_model"]["encoder"].pop("layers.1.mlp.dense_h_to_4h.bias"),
    )
    with pytest.raises(UserError, match="mp_rank_00_000: has no encoder.layers.1.mlp.dense_h_to_4h.bias"):
        open_weights(short)

    # Checkpoint tools write this into merged arguments, which elsewhere means the exact GELU.
    merged = damaged("merged")
    for rank in merged.glob("mp_rank_*"):
        edit(rank / "model_optim_rng.pt", lambda found: setattr(found["args"], "bias_gelu_fusion", False))
    assert not open_weights(merged).shape.exact_gelu
    for changes, what in (
        ({"checkpoint_version": 1.0}, "checkpoint_version 1 of a multi-query model"),
        ({"checkpoint_version": 4.0}, "checkpoint_version 4 of a multi-query model"),
    ):
        old = damaged(what.replace(" ", "_"))
        edit(old / "mp_rank_00_000/model_optim_rng.pt", lambda found, changes=changes: found.update(changes))
        with pytest.raises(UserError, match=what):
            open_weights(old)
    gated = damaged("gated")
    edit(gated / "mp_rank_00_000/model_optim_rng.pt", lambda found: setattr(found["args"], "glu_activation", "swiglu"))
    with pytest.raises(UserError, match="a gated activation .glu_activation='swiglu'.; expected a GPTBigCode"):
        open_weights(gated)

    with pytest.raises(UserError, match="iteration 8 was asked for; there are iter_0000007"):
        open_weights(golden / "legacy/tp2pp2", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither config.json nor an intact checkpoint found .*there are none"):
        open_weights(tmp_path / "empty")
    with pytest.raises(UserError, match="no such directory"):
        open_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("version", [0, 1, 2])
def test_old_orders_of_query_key_value_become_todays(tmp_path, version):
    heads, d, h, layers = 4, 2, 8, 1
    torch.manual_seed(version)
    today = torch.randn(heads, 3, d, h)  # per head: query, key, value
    stored = {0: today.transpose(0, 1), 1: today.transpose(1, 2), 2: today}[version].reshape(-1, h)
    norm = {"weight": torch.ones(h), "bias": torch.zeros(h)}
    encoder = {f"final_layernorm.{k}": v for k, v in norm.items()}
    for k, v in norm.items():
        encoder |= {f"layers.0.{n}_layernorm.{k}": v for n in ("input", "post_attention")}
    encoder |= {
        "layers.0.attention.query_key_value.weight": stored,  # versions of that age have attention, not self_attention
        "layers.0.attention.query_key_value.bias": torch.zeros(3 * h),
        "layers.0.attention.dense.weight": torch.zeros(h, h),
        "layers.0.attention.dense.bias": torch.zeros(h),
        "layers.0.mlp.dense_h_to_4h.weight": torch.zeros(4 * h, h),
        "layers.0.mlp.dense_h_to_4h.bias": torch.zeros(4 * h),
        "layers.0.mlp.dense_4h_to_h.weight": torch.zeros(h, 4 * h),
        "layers.0.mlp.dense_4h_to_h.bias": torch.zeros(h),
    }
    embedding = {
        "word_embeddings": {"weight": torch.zeros(16, h)},
        "position_embeddings": {"weight": torch.zeros(8, h)},
    }
    args = Namespace(num_layers=layers, hidden_size=h, num_attention_heads=heads, max_position_embeddings=8)
    rank = tmp_path / "release/mp_rank_00"
    rank.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    model = {"language_model": {"embedding": embedding, "transformer": encoder}}
    torch.save(
        {"args": args, "checkpoint_version": version, "iteration": 0, "model": model}, rank / "model_optim_rng.pt"
    )
    source = open_weights(tmp_path)
    assert source.iteration == "release" and not source.shape.multi_query
    assert torch.equal(source.read("decoder.layers.0.self_attention.linear_qkv.weight"), today.reshape(-1, h))


def fill_and_run(path: str, tp: int, pp: int, sequence_parallel: bool, tokens: np.ndarray) -> np.ndarray | None:
    """On every rank, build the model, fill it and run one sequence.

    The last stage returns its logits [s, vocabulary / TP].
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.config.config import Config
    from megatron_ft.config.flags import Parallel
    from megatron_ft.engine import device, parallel
    from megatron_ft.engine.model import build_model

    device.set_up_device()
    layout = Parallel(tensor=tp, pipeline=pp, sequence=sequence_parallel, world_size=tp * pp)
    config = Config(parallel=layout).with_flags(global_batch_size=1)
    parallel.initialize(config)
    source = open_weights(path)
    [model] = build_model(config, source.shape, source.shape.vocab_size)
    model.eval()
    load_weights(source, [model])
    tokens = torch.from_numpy(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        if pp > 1:
            previous = parallel_state.get_pipeline_model_parallel_prev_rank()
            following = parallel_state.get_pipeline_model_parallel_next_rank()
            hidden = torch.empty(tokens.shape[1] // (tp if sequence_parallel else 1), 1, source.shape.hidden_size)
            if not parallel_state.is_pipeline_first_stage():
                dist.recv(hidden, previous)
                model.set_input_tensor(hidden)
        out = model(tokens, positions, None)
        if pp > 1 and not parallel_state.is_pipeline_last_stage():
            dist.send(out.contiguous(), following)
            return None
    return out[0].numpy()


@pytest.mark.parametrize(
    ("layout", "tp", "pp", "sequence_parallel"),
    [("legacy/tp2pp2", 1, 1, False), ("hf/hf_tiny", 2, 1, True), ("legacy/distopt_tp2pp2", 1, 2, False)],
)
def test_a_model_filled_at_any_layout_gives_the_branchs_logits(golden, layout, tp, pp, sequence_parallel):
    reference = np.load(golden / "train/ref_short_s257.npz")
    positions = torch.from_numpy(reference["position_ids"])[:1]
    end = int((positions[0, 1:] == 0).nonzero()[0]) + 1  # the first document of the row
    end -= end % 2
    ranks = run_ranks(
        fill_and_run, tp * pp, str(golden / layout), tp, pp, sequence_parallel, reference["tokens"][:1, :end]
    )
    logits = np.concatenate([out for out in ranks if out is not None], axis=-1)
    assert np.abs(logits - reference["logits"][0, :end]).max() < 1e-5
