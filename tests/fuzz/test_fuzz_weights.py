"""Mutated checkpoints are converted or refused: Hugging Face, legacy, torch_dist, adapters.

Each input ends in success or in one `error:` line with status 2: see workers.py, whose `check` also
tells how to repeat one input.
"""

import hashlib
import json
import shutil
from argparse import Namespace
from functools import partial
from pathlib import Path
from random import Random

import pytest
from forked_transformers import fork_transformers
from minimal import FOREIGN, MINIMAL_JSON, MINIMAL_PICKLES
from mutations import ANY, FORGED, json_tree, raw_pickle, safetensors_header, text, zip_records
from one_input import MUST_BE_REFUSED, Reader, program
from workers import check

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PYTORCH, PYTORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LEGACY = "release/mp_rank_00/model_optim_rng.pt"


# Intact inputs


def hugging_face(directory: Path) -> None:
    shutil.copytree(FIXTURES / "model", directory, dirs_exist_ok=True)


def tensors() -> dict:
    from safetensors.torch import load_file

    return load_file(FIXTURES / "model" / SAFETENSORS)


def safetensors_shards(directory: Path) -> None:
    from safetensors.torch import save_file

    shutil.copy(FIXTURES / "model/config.json", directory)
    names = list(tensors())
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: tensors()[name] for name in part}, directory / file, metadata={"format": "pt"})
    index(directory / INDEX, halves)


def pytorch(directory: Path) -> None:
    import torch

    shutil.copy(FIXTURES / "model/config.json", directory)
    torch.save(tensors(), directory / PYTORCH)


def pytorch_not_zipped(directory: Path) -> None:
    """As torch before 1.6 saved."""
    import torch

    shutil.copy(FIXTURES / "model/config.json", directory)
    torch.save(tensors(), directory / PYTORCH, _use_new_zipfile_serialization=False)


def pytorch_shards(directory: Path) -> None:
    import torch

    shutil.copy(FIXTURES / "model/config.json", directory)
    names = list(tensors())
    halves = {"a.bin": names[: len(names) // 2], "b.bin": names[len(names) // 2 :]}
    for file, part in halves.items():
        torch.save({name: tensors()[name] for name in part}, directory / file)
    index(directory / PYTORCH_INDEX, halves)


def index(path: Path, files: dict[str, list[str]]) -> None:
    weight_map = {name: file for file, names in files.items() for name in names}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), encoding="utf-8")


def megatron(form: str, directory: Path) -> None:
    """The fixture converted to "legacy" or "torch_dist"."""
    program(
        "convert/hf_to_megatron.py", "--load", FIXTURES / "model", "--save", directory.parent / "made", "--format", form
    )
    shutil.copytree(directory.parent / "made", directory, dirs_exist_ok=True)


def megatron_lm(directory: Path) -> None:
    """A torch_dist checkpoint as Megatron-LM writes it: no manifest, arguments in common.pt."""
    import torch

    megatron("torch_dist", directory)
    manifest = json.loads((directory / "release/manifest.json").read_bytes())
    (directory / "release/manifest.json").unlink()
    shape = manifest["shape"]
    args = Namespace(
        **{name: shape[name] for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")},
        ffn_hidden_size=4 * shape["hidden_size"], kv_channels=shape["hidden_size"] // shape["num_attention_heads"],
        multi_query_attention=True, group_query_attention=True, num_query_groups=1, add_position_embedding=True,
        position_embedding_type="learned_absolute", normalization="LayerNorm", swiglu=False, norm_epsilon=1e-5,
        layernorm_epsilon=1e-5, add_bias_linear=True, untie_embeddings_and_output_weights=False, padded_vocab_size=512,
        attention_head_type="multiquery", iteration=0, params_dtype=torch.bfloat16,
    )  # fmt: skip
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 0}, directory / "release/common.pt")


def run_with_trackers(directory: Path) -> None:
    """Two iterations and the two files that name one of them."""
    megatron("torch_dist", directory)
    (directory / "release").rename(directory / "iter_0000010")
    shutil.copytree(directory / "iter_0000010", directory / "iter_0000020")
    (directory / "latest_checkpointed_iteration.txt").write_text("20")
    (directory / "best_checkpointed_iteration.txt").write_text("10")


def adapter(directory: Path) -> None:
    """A PEFT adapter of rank 2 and its base."""
    import torch
    from safetensors.torch import save_file

    hugging_face(directory)
    base = directory / "base"
    base.mkdir()
    for file in ("config.json", SAFETENSORS):
        (directory / file).rename(base / file)
    random = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in tensors().items():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            outputs, inputs = tensor.shape
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(2, inputs, generator=random)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(outputs, 2, generator=random)
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": "base", "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "r": 2,
        "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["attn.c_attn", "mlp.c_fc"], "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))


def adapter_bin(directory: Path) -> None:
    """The same with the weights as PEFT saved them until 2023."""
    import torch
    from safetensors.torch import load_file

    adapter(directory)
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


# Reading


def to_megatron(directory: Path) -> None:
    out = directory.parent / "out"
    program("convert/hf_to_megatron.py", "--load", directory, "--save", out, "--format", "legacy")


def to_hugging_face(directory: Path, *flags: str | Path) -> str:
    """Digest of the weights that megatron_to_hf.py writes."""
    fork_transformers()
    out = directory.parent / "out"
    words = ("--tokenizer-file", FIXTURES / "tokenizer.json", *flags)
    program("convert/megatron_to_hf.py", "--load", directory, "--output", out, *words)
    return hashlib.sha256((out / SAFETENSORS).read_bytes()).hexdigest()


def best_and_latest(directory: Path) -> None:
    from megatron_ft.weights.open import open_weights

    open_weights(directory)
    open_weights(directory, "best")
    program("convert/reshard.py", "--load", directory, "--save", directory.parent / "out", "--tensor-parallel", "2")


def merge_adapter(directory: Path) -> str:
    return to_hugging_face(directory, "--merge-lora", "--base", directory / "base")


def sign_manifest(directory: Path, random: Random) -> None:
    """Renew sizes and checksums of the manifest in three of four inputs, so that what it protects
    is read; an attacker would."""
    path = directory / "release/manifest.json"
    if random.random() < 0.25:
        return
    try:
        content = json.loads(path.read_bytes())
        content.pop("checksum", None)
        for name, described in content.get("files", {}).items():
            if (path.parent / name).is_file() and isinstance(described, dict) and "sha256" in described:
                data = (path.parent / name).read_bytes()
                described.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError):
        pass  # the mutation broke more than a checksum


# Hand-written inputs


def changed(base: dict, file: str, changes: dict[str, object]) -> tuple[tuple[str, str, bytes], ...]:
    """One input per field and value of `changes` ("field=...": value)."""
    return tuple(
        (file, f"{name} = {value!r:.40}", json.dumps({**base, name.split("=")[0]: value}).encode())
        for name, value in changes.items()
    )


CONFIG = json.loads((FIXTURES / "model/config.json").read_bytes())
FIXED_CONFIG = (
    *(("config.json", *case) for case in {**MINIMAL_JSON, **FOREIGN}.items()),
    *changed(CONFIG, "config.json", {
        "n_layer": 10**8, "n_layer=1": 2.0, "n_layer=2": "2", "n_layer=3": 0, "n_layer=4": -1, "n_layer=5": None, "n_layer=6": True,
        "n_embd": 2**62, "n_embd=1": 0, "n_head": 0, "n_head=1": 3, "n_head=2": [4], "vocab_size": 2**40, "vocab_size=1": 400.0,
        "vocab_size=2": -400, "n_positions": {}, "n_positions=1": 1e300, "n_inner": [], "n_inner=1": "128", "layer_norm_epsilon": "1e-5",
        "layer_norm_epsilon=1": None, "model_type": ["gpt_bigcode"], "model_type=1": FORGED, "architectures": "GPT",
        "architectures=1": [None], "multi_query": "yes", "activation_function": {}, "activation_function=1": FORGED,
        "attn_pdrop": "0", "initializer_range": -1, "torch_dtype": 5, "scale_attn_weights": None,
    }),
)  # fmt: skip
NAMES = ("transformer.wte.weight", "transformer.h.0.ln_1.weight")
FIXED_INDEX = (
    *MINIMAL_JSON.items(),
    *(
        (f"weight_map = {value!r:.60}", json.dumps({"weight_map": value}).encode())
        for value in (
            None, [], 5, "a", {}, {NAMES[0]: 5}, {NAMES[0]: None}, {NAMES[0]: ["a.safetensors"]}, {NAMES[0]: ""}, {NAMES[0]: "."},
            {NAMES[0]: "../outside"}, {NAMES[0]: "/etc/hostname"}, {NAMES[0]: "a\0b"}, {NAMES[0]: "x" * 5000}, {FORGED: "a.safetensors"},
            {NAMES[0]: "a.safetensors", "": "a.safetensors"}, {NAMES[1]: FORGED}, {NAMES[0]: "config.json"},
        )
    ),
)  # fmt: skip
HEADER = (FIXTURES / "model" / SAFETENSORS).read_bytes()
TENSORS = [name for name in json.loads(HEADER[8 : 8 + int.from_bytes(HEADER[:8], "little")]) if name != "__metadata__"]


def outside(suffix: str) -> tuple[str, bytes]:
    """An index of intact shards that are not in its directory."""
    half = len(TENSORS) // 2
    weight_map = {name: f"../../template/{'ab'[i >= half]}.{suffix}" for i, name in enumerate(TENSORS)}
    return MUST_BE_REFUSED + "shards outside the directory", json.dumps({"weight_map": weight_map}).encode()


FIXED_ADAPTER = (
    *(("adapter_config.json", *case) for case in MINIMAL_JSON.items()),
    *changed({"base_model_name_or_path": "base", "peft_type": "LORA", "r": 2, "lora_alpha": 4}, "adapter_config.json", {
        "r": 0, "r=1": 2.0, "r=2": "2", "r=3": None, "r=4": -2, "r=5": 2**40, "r=6": True, "lora_alpha": float("nan"),
        "lora_alpha=1": float("inf"), "lora_alpha=2": "4", "lora_alpha=3": None, "lora_alpha=4": [4], "lora_alpha=5": 1e400,
        "lora_dropout": "a", "base_model_name_or_path": 5, "base_model_name_or_path=1": "../outside", "peft_type": [], "peft_type=1": FORGED,
        "rank_pattern": {"c_attn": 8}, "alpha_pattern": [], "modules_to_save": "all", "use_dora": "true", FORGED: 1,
    }),
)  # fmt: skip
FIXED_TRACKERS = tuple(
    (file, repr(content)[:40], content)
    for file in ("latest_checkpointed_iteration.txt", "best_checkpointed_iteration.txt")
    for content in (
        b"", b"\n", b"\xc2\xb3", b"\xd9\xa1\xd9\xa0", b"\xff\xfe", b"-20", b"+20", b" 20 \n", b"2_0", b"20.0", b"1e1", b"9" * 5000,
        b"9" * 30, b"\x1b[2J20", b"20\n10", b"20\x00", b"../iter_0000020", b"/etc/hostname", b"release", b"0x14", b"\xef\xbb\xbf20",
    )
)  # fmt: skip

READERS = [
    Reader("config.json", hugging_face, to_megatron, (("config.json", (json_tree,)),), fixed=FIXED_CONFIG, count=300),
    Reader("safetensors", hugging_face, to_megatron, ((SAFETENSORS, (safetensors_header,)),), count=300),
    Reader(
        "safetensors index", safetensors_shards, to_megatron, ((INDEX, (json_tree,)),),
        fixed=tuple((INDEX, *case) for case in (*FIXED_INDEX, outside("safetensors"))),
    ),
    Reader(
        "pytorch_model.bin", pytorch, to_megatron, ((PYTORCH, (zip_records,)),), count=300,
        fixed=tuple((PYTORCH, *case) for case in {**MINIMAL_PICKLES, **FOREIGN}.items()),
    ),
    Reader(
        "pytorch_model.bin, not zipped", pytorch_not_zipped, to_megatron, ((PYTORCH, ANY),), count=100,
        fixed=tuple((PYTORCH, *case) for case in MINIMAL_PICKLES.items()),
    ),
    Reader(
        "pytorch index", pytorch_shards, to_megatron, ((PYTORCH_INDEX, (json_tree,)),), count=100,
        fixed=tuple((PYTORCH_INDEX, *case) for case in (*FIXED_INDEX, outside("bin"))),
    ),
    Reader(
        "legacy .pt", partial(megatron, "legacy"), to_hugging_face, ((LEGACY, (zip_records,)),), count=300,
        fixed=tuple((LEGACY, *case) for case in MINIMAL_PICKLES.items()),
    ),
    Reader(
        ".metadata", partial(megatron, "torch_dist"), to_hugging_face, (("release/.metadata", (raw_pickle,)),), count=300,
        fixed=tuple(("release/.metadata", *case) for case in MINIMAL_PICKLES.items()), finish=sign_manifest,
    ),
    Reader(
        ".metadata without a manifest", megatron_lm, to_hugging_face, (("release/.metadata", (raw_pickle,)),),
    ),
    Reader("common.pt", megatron_lm, to_hugging_face, (("release/common.pt", (zip_records,)),)),
    Reader("distcp", megatron_lm, to_hugging_face, (("release/__0_0.distcp", ANY),)),
    Reader(
        "manifest", partial(megatron, "torch_dist"), to_hugging_face, (("release/manifest.json", (json_tree,)),), finish=sign_manifest,
        fixed=tuple(("release/manifest.json", *case) for case in MINIMAL_JSON.items()), count=300, exact=True,
    ),
    Reader(
        "trackers", run_with_trackers, best_and_latest,
        (("latest_checkpointed_iteration.txt", (text,)), ("best_checkpointed_iteration.txt", (text,))), fixed=FIXED_TRACKERS, count=100,
    ),
    Reader("adapter_config.json", adapter, merge_adapter, (("adapter_config.json", (json_tree,)),), fixed=FIXED_ADAPTER),
    Reader("adapter_model.safetensors", adapter, merge_adapter, (("adapter_model.safetensors", (safetensors_header,)),)),
    Reader(
        "adapter_model.bin", adapter_bin, merge_adapter, (("adapter_model.bin", (zip_records,)),), count=100,
        fixed=tuple(("adapter_model.bin", *case) for case in MINIMAL_PICKLES.items()),
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_mutated_weights_are_read_or_refused(reader: Reader, tmp_path: Path):
    check(reader, tmp_path)
