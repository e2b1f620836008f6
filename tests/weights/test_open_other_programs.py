"""Weights as other programs leave them: Megatron-Core 0.19, wrapped models, links, odd trackers."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from conversions import convert
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megatron_ft.errors import UserError
from megatron_ft.model.hf_names import hf_name
from megatron_ft.weights.open import open_weights


@pytest.fixture(scope="module")
def hf_tiny(golden) -> dict[str, torch.Tensor]:
    return load_file(golden / "hf/hf_tiny/model.safetensors")


def as_megatron_core_0_19(golden: Path, to: Path, args: object) -> Path:
    """hf_tiny as Megatron-Core 0.19 writes it: the content of common.pt is an object instead."""
    source = open_weights(golden / "hf/hf_tiny")
    state: dict = {name: source.read(name) for name in source.names()}
    state["common_state/shard_0_1"] = [{"args": args, "iteration": 7, "checkpoint_version": 3.0}]
    planner = DefaultSavePlanner(flatten_state_dict=False)  # the list is one object, as a ShardedObject is
    torch.distributed.checkpoint.save(state, checkpoint_id=to / "iter_0000007", planner=planner, no_dist=True)
    (to / "latest_checkpointed_iteration.txt").write_text("7")
    return to


def arguments(**changes) -> Namespace:
    shape = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256}
    return Namespace(**{**shape, "group_query_attention": True, "num_query_groups": 1, **changes})


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_checkpoint_of_megatron_core_0_19_is_read_and_resharded(golden, hf_tiny, tmp_path, as_dict):
    args = arguments(hidden_dropout=0.0)
    checkpoint = as_megatron_core_0_19(golden, tmp_path / "core", vars(args) if as_dict else args)
    assert not list(checkpoint.rglob("common.pt"))
    convert("reshard", "--load", checkpoint, "--save", tmp_path / "tp2", "--tensor-parallel", "2")
    for directory in (checkpoint, tmp_path / "tp2"):
        source = open_weights(directory)
        assert source.iteration == 7 and source.args["hidden_size"] == 64 and source.shape.multi_query
        for name in source.names():
            expected = hf_tiny[hf_name(source.shape, name)]
            assert torch.equal(source.read(name)[: len(expected)], expected), name


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (torch.nn.Linear(1, 1), "common_state/shard_0_1: refused, it references torch.nn.modules.linear.Linear"),
        ([1], "'args' are list, expected the arguments"),
        (arguments(num_layers=10**8), '"num_layers" is 100000000'),
        (arguments(swiglu=True), "a gated activation"),
    ],
)
def test_the_common_state_of_megatron_core_0_19_goes_through_the_allow_list(golden, tmp_path, args, reason):
    with pytest.raises(UserError, match=reason):
        open_weights(as_megatron_core_0_19(golden, tmp_path / "core", args))


@pytest.mark.parametrize(
    "content", ["\u00b3", "\u0661\u0660", "-7", "+7", "7.0", "9" * 5000, "../iter_0000007", "7\n8", "\x1b[2J7", ""]
)
def test_an_odd_tracker_file_names_no_checkpoint(golden, tmp_path, content):
    save = Path(shutil.copytree(golden / "legacy/tp1pp1", tmp_path / "save"))
    (save / "latest_checkpointed_iteration.txt").write_text(content)
    (save / "best_checkpointed_iteration.txt").write_text(content)
    source = open_weights(save)
    assert source.iteration == 7 and "using the newest intact checkpoint, iteration 7" in source.notice
    assert source.notice.isprintable()
    with pytest.raises(UserError, match="best_checkpointed_iteration.txt names no iteration"):
        open_weights(save, "best")


def test_a_tracker_with_white_space_around_the_number_is_read(golden, tmp_path):
    save = Path(shutil.copytree(golden / "legacy/tp1pp1", tmp_path / "save"))
    (save / "latest_checkpointed_iteration.txt").write_text(" 7 \r\n")
    assert open_weights(save).notice is None


def test_a_linked_iteration_is_read(golden, hf_tiny, tmp_path):
    (tmp_path / "save").mkdir()
    (tmp_path / "save/iter_0000007").symlink_to((golden / "legacy/tp2pp2/iter_0000007").resolve())
    source = open_weights(tmp_path / "save", 7)
    assert torch.equal(source.read("decoder.final_layernorm.weight"), hf_tiny["transformer.ln_f.weight"])


def with_tensors(golden: Path, to: Path, tensors: dict) -> Path:
    to.mkdir()
    shutil.copy(golden / "hf/hf_tiny/config.json", to)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.transformer_"])
def test_names_of_a_wrapped_model_load(golden, hf_tiny, tmp_path, prefix):
    bare = prefix.endswith("transformer_")
    named = {
        prefix.removesuffix("transformer_") + name.removeprefix("transformer." if bare else ""): t
        for name, t in hf_tiny.items()
    }
    source = open_weights(with_tensors(golden, tmp_path / "hf", named))
    assert all(torch.equal(source.read(name), hf_tiny[hf_name(source.shape, name)]) for name in source.names())


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [("model.", "save_pretrained"), ("base_model.model.", "merge_and_unload"), ("module.net.", "save_pretrained")],
)
def test_another_prefix_is_named_with_what_to_do(golden, hf_tiny, tmp_path, prefix, remedy):
    source = with_tensors(golden, tmp_path / "hf", {prefix + name: tensor for name, tensor in hf_tiny.items()})
    with pytest.raises(
        UserError, match=f"names of tensors begin with '{prefix.removeprefix('module.')}'.*{remedy}"
    ) as refused:
        open_weights(source)
    assert "again" not in str(refused.value)


def test_a_training_checkpoint_of_lightning_is_named(golden, hf_tiny, tmp_path):
    directory = with_tensors(golden, tmp_path / "hf", {})
    (directory / "model.safetensors").unlink()
    torch.save({"state_dict": hf_tiny, "epoch": 3}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="its tensors are in 'state_dict'; save the model itself"):
        open_weights(directory)


def test_a_head_without_embedding_is_the_tied_embedding(golden, hf_tiny, tmp_path):
    tensors = dict(hf_tiny)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    source = open_weights(with_tensors(golden, tmp_path / "hf", tensors))
    assert torch.equal(source.read("embedding.word_embeddings.weight"), hf_tiny["transformer.wte.weight"])


def test_a_tensor_that_the_index_leaves_out_is_read(golden, hf_tiny, tmp_path):
    directory = with_tensors(golden, tmp_path / "hf", hf_tiny)
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    index = {"weight_map": {name: "a.safetensors" for name in hf_tiny if name != "transformer.ln_f.bias"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(open_weights(directory).read("decoder.final_layernorm.bias"), hf_tiny["transformer.ln_f.bias"])


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/hostname", "x/a.safetensors", "..", ".", "", "a\0b", "x" * 300, 5, None, ["a"]]
)
def test_an_index_that_leaves_its_directory_is_refused_with_its_key(golden, hf_tiny, tmp_path, shard):
    directory = with_tensors(golden, tmp_path / "hf", hf_tiny)
    (directory / "model.safetensors").rename(tmp_path / "a.safetensors")
    index = {"weight_map": dict.fromkeys(hf_tiny, shard)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model.safetensors.index.json: .*weight_map"):
        open_weights(directory)


def test_a_link_out_of_the_directory_is_refused_and_one_into_the_hubs_blobs_is_read(golden, hf_tiny, tmp_path):
    outside = with_tensors(golden, tmp_path / "outside", hf_tiny)
    linked = Path(shutil.copytree(outside, tmp_path / "linked"))
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(outside / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors: a link to .*outside/model.safetensors"):
        open_weights(linked)
    model = tmp_path / "models--bigcode--tiny"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for file in outside.iterdir():
        file.rename(model / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    for path in (model, snapshot):
        assert torch.equal(
            open_weights(path).read("decoder.final_layernorm.weight"), hf_tiny["transformer.ln_f.weight"]
        )


def test_a_name_on_the_hub_is_answered_with_how_to_download_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="hf download bigcode/starcoderbase-1b"):
        open_weights("bigcode/starcoderbase-1b")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"PAR1" + bytes(64), "Parquet"),
        (bytes(4096), "NUL bytes"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_of_another_kind_are_recognized(golden, tmp_path, name, content, found):
    (tmp_path / name).write_bytes(content)
    shutil.copy(golden / "hf/hf_tiny/config.json", tmp_path)
    with pytest.raises(UserError, match=f"{name}: .*{found}"):
        open_weights(tmp_path)
