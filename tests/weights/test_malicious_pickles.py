"""No file of a checkpoint is trusted: a malicious pickle in any is refused and never executed."""

import enum
import io
import json
import pickle
import shutil
import sys
import types
import zipfile
from argparse import Namespace
from pathlib import Path, PurePosixPath

import pytest
import torch
from conversions import convert, refusal, tiny_hf
from torch.distributed.checkpoint import metadata

from megatron_ft.errors import UserError
from megatron_ft.files.checksum import describe_file
from megatron_ft.weights.manifest import read_manifest
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.safe_pickle import load_pt
from megatron_ft.weights.torch_dist_pickle import load_dcp_metadata


class Touch:
    """Pickles as a call that would create a file."""

    def __init__(self, how: str, trace: Path) -> None:
        self.how, self.trace = how, trace

    def __reduce__(self):
        import os
        import subprocess

        command = f"touch {self.trace}"
        return {
            "os.system": (os.system, (command,)),
            "eval": (eval, (f"__import__('os').system({command!r})",)),
            "exec": (exec, (f"import os; os.system({command!r})",)),
            "getattr": (getattr, ("text", "upper")),
            "subprocess": (subprocess.check_call, (["touch", str(self.trace)],)),
            "import": (__import__, ("this",)),
        }[self.how]


HOWS = ["os.system", "eval", "exec", "getattr", "subprocess", "import"]
NAMED = {"os.system": "posix.system", "subprocess": "subprocess.check_call", "import": "__import__"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """One model in every format."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {"hf": tiny_hf(root / "hf")}
    for form in ("legacy", "torch_dist"):
        convert("hf_to_megatron", "--load", found["hf"], "--save", root / form, "--format", form)
        found[form] = root / form
    binary = Path(shutil.copytree(found["hf"], root / "bin"))
    from safetensors.torch import load_file

    torch.save(load_file(binary / "model.safetensors"), binary / "pytorch_model.bin")
    (binary / "model.safetensors").unlink()
    return found | {"bin": binary}


@pytest.mark.parametrize("how", HOWS)
def test_malicious_files_are_refused_by_name_and_not_executed(checkpoints, tmp_path, how):
    trace = tmp_path / "trace"
    name = NAMED.get(how, how).split(".")[-1]

    def poisoned(form: str, file: str, content) -> Path:
        directory = Path(shutil.copytree(checkpoints[form], tmp_path / f"{form}-{file.replace('/', '_')}"))
        if callable(content):
            content(directory / file)
        elif file.endswith(".metadata"):
            (directory / file).write_bytes(pickle.dumps(content))
        else:
            torch.save(content, directory / file)
        return directory

    evil = Touch(how, trace)
    legacy_file = "release/mp_rank_00/model_optim_rng.pt"
    good = load_pt(checkpoints["legacy"] / legacy_file)

    def record(file: Path) -> None:
        """Replaces the archive of the first tensor by one of the same length or more."""
        stream = io.BytesIO()
        content = file.read_bytes()
        torch.save([evil, "x" * len(content)], stream)
        metadata = load_dcp_metadata(file.parent / ".metadata")
        for info in metadata.storage_data.values():
            if info.offset == 0:
                info.offset, info.length = len(content), len(stream.getvalue())
        (file.parent / ".metadata").write_bytes(pickle.dumps(metadata))
        file.write_bytes(content + stream.getvalue())
        manifest = read_manifest(file.parent)  # an attacker can also write its checksum
        manifest.files = {name: describe_file(file.parent / name) for name in manifest.files}
        manifest.write(file.parent)

    directories = [
        (poisoned("legacy", legacy_file, {**good, "args": Namespace(**vars(good["args"]), more=evil)}), legacy_file),
        (poisoned("bin", "pytorch_model.bin", {"transformer.wte.weight": evil}), "pytorch_model.bin"),
        (poisoned("torch_dist", "release/.metadata", evil), ".metadata"),
    ]
    for directory, file in directories:
        with pytest.raises(UserError, match=f"{file}: refused, the pickle references .*{name}"):
            open_weights(directory)

    common = poisoned("torch_dist", "release/common.pt", {"args": evil})
    (common / "release/manifest.json").unlink()
    with pytest.raises(UserError, match="common.pt: refused"):
        open_weights(common)

    stored = poisoned("torch_dist", "release/__0_0.distcp", record)
    source = open_weights(stored)
    with pytest.raises(UserError, match=f"__0_0.distcp: refused, a pickle in it .*{name}.*the file is as megatron-ft"):
        for tensor in source.names():
            source.read(tensor)
    assert not trace.exists()
    if how == "os.system":
        assert "refused" in refusal("megatron_to_hf", "--load", directories[0][0], "--output", tmp_path / "out")
        assert "refused" in refusal("verify", directories[2][0], checkpoints["hf"])
        assert "refused" in refusal("reshard", "--load", common, "--save", tmp_path / "out", "--tensor-parallel", "1")
        assert not trace.exists() and not (tmp_path / "out").exists()


def test_attributes_of_allowed_modules_cannot_be_reached(tmp_path):
    """Protocol 4 can name attributes of attributes; the allow-list has complete names."""
    file = tmp_path / ".metadata"
    for module, name in (("torch", "serialization.os.system"), ("torch.distributed.checkpoint.metadata", "os.getcwd")):
        pickled = (
            b"\x80\x04\x8c"
            + bytes([len(module)])
            + module.encode()
            + b"\x8c"
            + bytes([len(name)])
            + name.encode()
            + b"\x93)R."
        )
        file.write_bytes(pickled)
        with pytest.raises(UserError, match=f"references {module}.{name}"):
            load_dcp_metadata(file)


def reduced_by_getattr(self, protocol):
    """As Enum.__reduce_ex__ of Python 3.11.2."""
    return getattr, (type(self), self.name)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_metadata_saved_by_python_3_11_2_is_read(tmp_path, monkeypatch, protocol):
    properties = metadata.TensorProperties(dtype=torch.bfloat16)
    found = metadata.Metadata({"w": metadata.TensorStorageMetadata(properties, torch.Size([2]), [])}, None, {})
    monkeypatch.setattr(metadata._MEM_FORMAT_ENCODING, "__reduce_ex__", reduced_by_getattr)
    pickled = pickle.dumps(found, protocol)
    assert b"getattr" in pickled
    (tmp_path / ".metadata").write_bytes(pickled)
    read = load_dcp_metadata(tmp_path / ".metadata").state_dict_metadata["w"]
    assert (read.properties.dtype, read.properties.memory_format) == (torch.bfloat16, torch.contiguous_format)


def test_arguments_saved_by_python_3_11_2_are_read(tmp_path, monkeypatch):
    module = types.ModuleType("megatron.core.enums")
    kind = enum.Enum("ModelType", ["encoder_or_decoder"], module="megatron.core.enums")
    module.ModelType = kind
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)
    monkeypatch.setattr(kind, "__reduce_ex__", reduced_by_getattr)
    torch.save({"args": Namespace(model_type=kind.encoder_or_decoder)}, tmp_path / "common.pt")
    read = load_pt(tmp_path / "common.pt")["args"].model_type
    assert read.value == "encoder_or_decoder" and type(read).__module__.startswith("megatron_ft.")


def test_names_that_others_allow_in_the_process_are_refused(tmp_path):
    torch.save({"args": PurePosixPath("a")}, tmp_path / "common.pt")
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([PurePosixPath]):
        with pytest.raises(UserError, match="PurePosixPath, which is not on the allow-list"):
            load_pt(tmp_path / "common.pt")
        assert PurePosixPath in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == before


def call_getattr(enum: bytes, name: bytes) -> bytes:
    return b"c__builtin__\ngetattr\n(" + enum + b"X" + len(name).to_bytes(4, "little") + name + b"tR"


ENUM = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
MEMBER = b"TORCH_CONTIGUOUS_FORMAT"


@pytest.mark.parametrize(
    "called",
    [
        call_getattr(ENUM, b"__class__"),
        call_getattr(ENUM, b"__members__"),
        call_getattr(ENUM, b"mro"),
        call_getattr(ENUM, b"NONE"),
        call_getattr(call_getattr(ENUM, MEMBER), b"__class__"),
        call_getattr(call_getattr(ENUM, MEMBER), b"name"),
        call_getattr(b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"__init__"),
        call_getattr(b"c__builtin__\ngetattr\n", b"__globals__"),
        call_getattr(b"ctorch\nSize\n", b"numel"),
        call_getattr(b"ctorch.distributed.checkpoint.planner\nSavePlan\n", b"x"),
        call_getattr(b"ctorch.distributed.checkpoint.planner\nWriteItemType\n", b"__init__"),
        b"c__builtin__\ngetattr\n(" + ENUM + ENUM + b"tR",
        b"c__builtin__\ngetattr\n(" + ENUM + b"tR",
        b"c__builtin__\ngetattr\n(" + call_getattr(ENUM, MEMBER) + b"X\x01\0\0\0xNtR",
        ENUM + b"}X\x01\0\0\0x" + ENUM + b"sb",  # state of a class
    ],
)
def test_getattr_reaches_nothing_but_members_of_the_allowed_enums(tmp_path, called):
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + called + b".")
    with pytest.raises(UserError, match="not readable|refused"):
        load_dcp_metadata(tmp_path / ".metadata")
    assert not hasattr(metadata._MEM_FORMAT_ENCODING, "x")


@pytest.mark.parametrize("target", [b"cos\n", b"cargparse\nNamespace\n", b"ctorch\nTensor\n", b"cnumpy\nndarray\n"])
def test_getattr_in_a_pt_file_reaches_nothing_but_enums(tmp_path, target):
    torch.save({"a": 1}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            pickled = b"\x80\x02" + call_getattr(target, b"__init__") + b"."
            bad.writestr(name, pickled if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(UserError, match="bad.pt: refused|bad.pt: not a readable") as refused:
        load_pt(tmp_path / "bad.pt")
    assert "weights_only" not in str(refused.value)


def test_a_refusal_of_a_file_as_our_run_saved_it_does_not_warn_of_it(checkpoints, tmp_path):
    for changed in (False, True):
        directory = Path(shutil.copytree(checkpoints["torch_dist"], tmp_path / str(changed))) / "release"
        (directory / ".metadata").write_bytes(b"\x80\x02cnew_torch\nThing\n)R.")
        manifest = read_manifest(directory)
        manifest.files[".metadata"] = describe_file(directory / ".metadata")
        manifest.write(directory)
        if changed:
            (directory / ".metadata").write_bytes(b"\x80\x02cnew_torch\nThing2\n)R.")
        with pytest.raises(UserError, match="references new_torch.Thing") as refused:
            load_dcp_metadata(directory / ".metadata")
        assert ("do not load it elsewhere" in str(refused.value)) == changed
        assert ("is as megatron-ft" in str(refused.value)) != changed


def test_damaged_files_are_called_damaged(checkpoints, tmp_path):
    original = checkpoints["legacy"] / "release/mp_rank_00/model_optim_rng.pt"
    for name, content in (("cut", original.read_bytes()[:5000]), ("noise", b"\x80\x02not a pickle"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a readable torch file"):
            load_pt(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: not readable"):
            load_dcp_metadata(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("readme", "no weights")
    with pytest.raises(UserError, match="zip: not a readable torch file"):
        load_pt(tmp_path / "zip")
    with pytest.raises(UserError, match="none: no such file"):
        load_pt(tmp_path / "none")
    for content in ("{", "[]", json.dumps({"shape": {"layers": 3}})):
        directory = Path(shutil.copytree(checkpoints["torch_dist"], tmp_path / "manifest", dirs_exist_ok=True))
        (directory / "release/manifest.json").write_text(content)
        with pytest.raises(UserError, match="manifest.json"):
            open_weights(directory)


def test_arguments_of_megatron_load_as_inert_values(golden):
    found = load_pt(golden / "legacy/tp2pp2/iter_0000007/mp_rank_00_000/model_optim_rng.pt")
    kind = found["args"].position_embedding_type
    assert kind.value == 2 and type(kind).__module__.startswith("megatron_ft.")
    assert found["rng_state"][0]["np_rng_state"][1].dtype == "uint32"
