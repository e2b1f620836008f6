"""Weights of a Hugging Face directory: safetensors or `.bin`, one file or shards."""

import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_ft.errors import UserError
from megatron_ft.files.first_bytes import what_it_is
from megatron_ft.files.json_file import read_json, require
from megatron_ft.files.os_error import remedy
from megatron_ft.model.families import family_of
from megatron_ft.model.family import Family
from megatron_ft.model.hf_names import HFTensor, hf_name, hf_tensors
from megatron_ft.model.tensor_names import EMBEDDING, OUTPUT_LAYER
from megatron_ft.weights.directory import check_file_name, check_link
from megatron_ft.weights.hf_config import read_hf_config
from megatron_ft.weights.safe_pickle import load_pt
from megatron_ft.weights.santacoder import SantaCoderTensors, Tensors
from megatron_ft.weights.source import WeightSource, check_shape, is_plain

INDEX = ".index.json"
# In the order in which transformers looks for them; it loads the first that exists.
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
WRAPPERS = ("_orig_mod.", "module.")  # torch.compile and data parallelism, around the same model
PREFIXES = {
    "base_model.model.": "PEFT's wrapper: call merge_and_unload() of the PEFT model, and save_pretrained() of the result",
    "model.": "a wrapper such as a Lightning module: call save_pretrained() of the model inside",
}


class HFSource(WeightSource):
    """See WeightSource.

    All tensors of the files are read, as transformers does, whichever an index lists. Their names
    may lack the family's prefix (a bare GPTBigCodeModel) or have one of `WRAPPERS`, and of a tied
    embedding and lm_head one may be missing. Raises UserError for a directory that is damaged,
    incomplete, of another architecture, or whose lm_head is not tied but should be.
    """

    kind = "Hugging Face"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = read_hf_config(path)
        self.shape = self._config.shape
        self.notice = "; ".join(self._config.notices) or None
        self.family = family_of(self.shape)
        self._embedding, self._head = (hf_name(self.shape, name) for name in (EMBEDDING, OUTPUT_LAYER))
        self._opened: dict[Path, Tensors] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        for file in self._files():
            for stored_name in self._open(file).names():
                name = _without_wrappers(stored_name)
                if name != self._head and not name.startswith(self.family.prefix):
                    name = self.family.prefix + name
                if name in self._where and self._where[name][1] != stored_name:
                    raise UserError(
                        f"{file}: {stored_name} and {self._where[name][1]} are the same tensor of the model"
                    )
                self._where[name] = (file, stored_name)
        tied = not self.shape.untie_embeddings_and_output_weights
        if tied and self._head in self._where and self._embedding not in self._where:
            self._where[self._embedding] = self._where.pop(self._head)
        self._check_names()
        for tensor in self._tensors():
            check_shape(tensor.name, self._shape_of(tensor.name), tensor.shape, self._where[tensor.name][0])
        self.check_dtypes()
        if tied and self._head in self._where and not self._head_is_tied():
            raise UserError(
                f"{path}: {self._head} differs from {self._embedding}, expected the same values, since config.json "
                "does not say tie_word_embeddings: false; the files do not belong together"
            )

    @property
    def special_ids(self) -> dict[str, int | None]:
        return self._config.special_ids

    def _tensors(self) -> list[HFTensor]:
        """The model's tensors in the files, without a tied lm_head."""
        return [tensor for name in self.names() for tensor in hf_tensors(self.shape, name)]

    def _files(self) -> list[Path]:
        """The files of weights, in the order in which transformers reads them."""
        found = [name for name in WEIGHTS if (self.path / name).is_file()]
        if not found:
            links = [name for name in WEIGHTS if (self.path / name).is_symlink()]
            raise UserError(
                f"{self.path / links[0]}: a link to a file that does not exist"
                if links
                else f"{self.path}: config.json but no weights; expected model.safetensors or pytorch_model.bin, or shards"
            )
        file = self.path / found[0]
        if len(found) > 1:
            choice = f"{self.path}: reading {found[0]}, as transformers does, and ignoring {', '.join(found[1:])}"
            self.notice = "; ".join([choice, *self._config.notices])
        if not file.name.endswith(INDEX):
            return [file]
        weight_map = require(read_json(file), "weight_map", dict, str(file), low=1, of=str)
        for name, shard in weight_map.items():
            check_file_name(shard, f'{file}: "weight_map" of {name!r:.100}')
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (self.path / shard).is_file()]:
            raise UserError(f"{self.path}: {file.name} names shards that are missing: {', '.join(missing[:10])}")
        return [self.path / shard for shard in shards]

    def _check_names(self) -> None:
        """Raise UserError unless the stored tensors are those of the model."""
        expected = [tensor.name for tensor in self._tensors()]
        missing = [name for name in expected if name not in self._where]
        # `.attn.bias` and `.attn.masked_bias` are causal masks that old transformers saved.
        known = {*expected, self._head}
        unknown = [n for n in self._where if n not in known and not n.endswith((".attn.bias", ".masked_bias"))]
        if missing and (prefix := _foreign_prefix([stored for _, stored in self._where.values()], self.family)):
            raise UserError(
                f"{self.path}: names of tensors begin with {prefix!r}, expected {self._embedding}; "
                f"they were saved from {PREFIXES.get(prefix, PREFIXES['model.'])}"
            )
        if missing and unknown:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}, and there is "
                f"{self._where[unknown[0]][1]}; expected those of a {self.family.title} of {self.shape.num_layers} layers, as in config.json"
            )
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}; "
                "config.json is of another model, or the weights were not saved or copied completely"
            )
        if unknown:
            raise UserError(
                f"{self.path}: {unknown[0]} does not belong to a {self.family.title} of {self.shape.num_layers} layers"
            )

    def _open(self, file: Path) -> Tensors:
        if file not in self._opened:
            check_link(file, self.path)
            opened = open_tensors(file)
            self._opened[file] = SantaCoderTensors(opened) if self._config.santacoder else opened
        return self._opened[file]

    def _shape_of(self, name: str) -> tuple[int, ...]:
        file, stored_name = self._where[name]
        return self._open(file).shape(stored_name)

    def _head_is_tied(self, rows: int = 4096) -> bool:
        """Compares a few rows at a time, so that two embeddings are never in memory together."""
        if self._shape_of(self._head) != self._shape_of(self._embedding):
            return False
        for row in range(0, self.shape.vocab_size, rows):
            stop = min(row + rows, self.shape.vocab_size)
            head, words = (self._tensor(name)[row:stop] for name in (self._head, self._embedding))
            if not torch.equal(head, words) and not torch.allclose(head, words, rtol=0, atol=0, equal_nan=True):
                return False
        return True

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        """Where queries, keys and values are tensors of their own, views of their rows."""
        views: dict[int, torch.Tensor] = {}
        for tensor in hf_tensors(self.shape, name):
            stored, first = self._tensor(tensor.name), 0
            for rows in tensor.rows:
                views[rows.start] = stored.narrow(0, first, len(rows))
                first += len(rows)
        return 0, [views[start] for start in sorted(views)]

    def _tensor(self, name: str) -> torch.Tensor:
        file, stored_name = self._where[name]
        return self._open(file).tensor(stored_name)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors or `.bin` file, without prefixes of wrappers, memory-mapped.

    Raises UserError if it is neither.
    """
    opened = open_tensors(file)
    return {_without_wrappers(name): opened.tensor(name) for name in opened.names()}


def open_tensors(file: Path) -> "_Safetensors | _Bin":
    """A safetensors or `.bin` file, by its suffix."""
    return _Safetensors(file) if file.suffix == ".safetensors" else _Bin(file)


def _without_wrappers(name: str) -> str:
    """A tensor's name without the prefixes of wrappers that do not change the model.

    >>> _without_wrappers("module._orig_mod.transformer.wte.weight")
    'transformer.wte.weight'
    """
    while name.startswith(WRAPPERS):
        name = name[name.index(".") + 1 :]
    return name


def _foreign_prefix(names: list[str], family: Family) -> str | None:
    """What names of a family's tensors begin with, if it is not the family's own prefix.

    >>> from megatron_ft.model.gpt_bigcode import GPT_BIGCODE
    >>> _foreign_prefix(["model.transformer.h.0.ln_1.weight"], GPT_BIGCODE)
    'model.'
    """
    for module in ("word_embeddings", "input_layernorm", "output_layer"):
        end = f"{family.modules[module][0].format(0).removeprefix(family.prefix)}.weight"
        for name in names:
            if name.endswith(f".{end}"):
                prefix = _without_wrappers(name.removesuffix(end).removesuffix(family.prefix))
                return prefix or None
    return None


class _Safetensors:
    """A safetensors file."""

    def __init__(self, file: Path) -> None:
        self._path = file
        try:
            self._file = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: {_not_safetensors(file, error)}") from None

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, AttributeError, RuntimeError) as error:  # a dtype that torch does not have
            raise UserError(f"{self._path}: {name} cannot be read ({str(error)[:200]})") from None


def _not_safetensors(file: Path, error: Exception) -> str:
    if isinstance(error, OSError) and (todo := remedy(error, "")):
        return f"cannot be read ({error.strerror or error}); {todo}"
    if zipfile.is_zipfile(file):
        return "a zip archive, as torch.save writes; if it holds weights, name it pytorch_model.bin"
    if other := what_it_is(file, expected=("safetensors",)):
        return other
    return f"not a readable safetensors file ({str(error)[:200]}); if it was copied, copy it again"


class _Bin:
    """A file of torch.save."""

    def __init__(self, file: Path) -> None:
        self._path = file
        found = load_pt(file)
        if not isinstance(found, dict):
            raise UserError(f"{file}: holds {type(found).__name__}, expected a dictionary of tensors")
        self._tensors = {name: found[name] for name in found if isinstance(name, str) and is_plain(found[name])}
        if not self._tensors:
            inner = [
                key for key, value in found.items() if isinstance(value, dict) and any(map(is_plain, value.values()))
            ]
            if inner:
                raise UserError(
                    f"{file}: a training checkpoint, as Lightning and others save them: its tensors are in {inner[0]!r}; "
                    "save the model itself with save_pretrained()"
                )
            raise UserError(f"{file}: holds no tensors, expected a dictionary of tensors")

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]
