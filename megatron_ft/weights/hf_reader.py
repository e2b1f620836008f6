"""Weights of a Hugging Face GPTBigCode directory: safetensors or `.bin`, one file or shards."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import read_json
from megatron_ft.model.shape import ModelShape
from megatron_ft.model.tensor_names import WTE, hf_names
from megatron_ft.weights.safe_pickle import load_pt
from megatron_ft.weights.source import WeightSource, check_shape

HEAD = "lm_head.weight"
INDEX = ".index.json"
# In the order in which transformers looks for them; it loads the first that exists.
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")


class HFSource(WeightSource):
    """See WeightSource.

    Names in the files may lack the `transformer.` prefix (a bare GPTBigCodeModel), and there may be
    a tied lm_head. Raises UserError for a directory that is damaged, incomplete, of another
    architecture, or whose lm_head is not tied.
    """

    kind = "Hugging Face"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shape = ModelShape.from_hf_config(read_json(path / "config.json"), str(path / "config.json"))
        self._files: dict[Path, _Safetensors | _Bin] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        for file, stored_name in self._stored_names():
            name = stored_name if stored_name.startswith(("transformer.", "lm_head.")) else f"transformer.{stored_name}"
            self._where[name] = (file, stored_name)
        missing = [name for name in hf_names(self.shape) if name not in self._where]
        if missing:
            raise UserError(
                f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}; copy the checkpoint again"
            )
        # `.attn.bias` and `.attn.masked_bias` are causal masks that old transformers saved.
        expected = {*hf_names(self.shape), HEAD}
        unknown = [n for n in self._where if n not in expected and not n.endswith((".attn.bias", ".masked_bias"))]
        if unknown:
            raise UserError(f"{path}: {unknown[0]} does not belong to a GPTBigCode of {self.shape.num_layers} layers")
        for name in hf_names(self.shape):
            check_shape(self.shape, name, self._shape_of(name), self._where[name][0])
        if HEAD in self._where and not self._head_is_tied():
            raise UserError(
                f"{path}: lm_head.weight differs from {WTE}; only models with tied embeddings can be converted"
            )

    def _stored_names(self) -> list[tuple[Path, str]]:
        """(file, tensor name in it) of every stored tensor."""
        found = [name for name in WEIGHTS if (self.path / name).is_file()]
        if not found:
            raise UserError(
                f"{self.path}: config.json but no weights; expected model.safetensors or pytorch_model.bin, or shards"
            )
        file = self.path / found[0]
        if len(found) > 1:
            self.notice = f"{self.path}: reading {found[0]}, as transformers does, and ignoring {', '.join(found[1:])}"
        if not file.name.endswith(INDEX):
            return [(file, name) for name in self._open(file).names()]
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{file}: has no weight_map; copy it again")
        missing = sorted({shard for shard in weight_map.values() if not (self.path / shard).is_file()})
        if missing:
            raise UserError(f"{self.path}: {file.name} names shards that are missing: {', '.join(missing)}")
        return [(self.path / shard, name) for name, shard in weight_map.items()]

    def _open(self, file: Path) -> "_Safetensors | _Bin":
        if file not in self._files:
            self._files[file] = _Safetensors(file) if file.suffix == ".safetensors" else _Bin(file)
        return self._files[file]

    def _shape_of(self, name: str) -> tuple[int, ...]:
        file, stored_name = self._where[name]
        return self._open(file).shape(stored_name)

    def _head_is_tied(self, rows: int = 4096) -> bool:
        """Compares a few rows at a time, so that two embeddings are never in memory together."""
        if tuple(self._shape_of(HEAD)) != tuple(self._shape_of(WTE)):
            return False
        return all(
            torch.equal(self.read_slice(HEAD, 0, row, stop), self.read_slice(WTE, 0, row, stop))
            for row in range(0, self.shape.vocab_size, rows)
            for stop in [min(row + rows, self.shape.vocab_size)]
        )

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        file, stored_name = self._where[name]
        return 0, [self._open(file).tensor(stored_name)]


class _Safetensors:
    """A safetensors file."""

    def __init__(self, file: Path) -> None:
        try:
            self._file = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); copy it again") from None
        self._path = file

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._file.keys():  # noqa: SIM118 (a Rust object, not a dict)
            raise UserError(f"{self._path}: has no {name}, which the index expects in it; copy the checkpoint again")
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)


class _Bin:
    """A file of torch.save."""

    def __init__(self, file: Path) -> None:
        self._path = file
        found = load_pt(file)
        if not isinstance(found, dict):
            raise UserError(f"{file}: holds a {type(found).__name__}, expected a dictionary of tensors")
        self._tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise UserError(f"{self._path}: has no {name}, which the index expects in it; copy the checkpoint again")
        return self._tensors[name]
