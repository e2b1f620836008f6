"""Weights of Megatron before Core, as BigCode's branch saves them, in any TP x PP layout.

A checkpoint has one directory per rank:

    release | iter_0000250/
      mp_rank_TT            one pipeline stage
      mp_rank_TT_PPP        several stages
        model_optim_rng.pt, or with the distributed optimizer model_rng.pt
      mp_rank_TT_PPP_DDD/optim.pt, not read

Layers are numbered from 0 on every stage. Tensors that tensor parallelism replicates (key_value of
multi-query attention, norms, output biases, positions) must be equal on all ranks, and the last
stage's copy of the tied embedding must equal the first stage's.
"""

import re
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import optional
from megatron_ft.model.gpt_bigcode import shape_of_megatron_args
from megatron_ft.model.tensor_names import EMBEDDING, POSITIONS, layer_of, tensor_shape, weight_of
from megatron_ft.weights.directory import check_link
from megatron_ft.weights.hf_config import SPECIAL_IDS_ARG, known_ids
from megatron_ft.weights.safe_pickle import load_pt
from megatron_ft.weights.source import WeightSource, arguments_of, check_shape, is_plain, widest

MODEL_FILES = ("model_optim_rng.pt", "model_rng.pt")
TENSOR_PARALLEL_ARGS = ("tensor_model_parallel_size", "model_parallel_size")
MOST_RANKS, MOST_LEVELS = 10_000, 20


class LegacySource(WeightSource):
    """See WeightSource.

    Raises UserError for a checkpoint that is incomplete, mixes two saves, is not a GPTBigCode, or
    whose order of query, key and value rows is unknown. Replicas are compared when they are read.
    """

    kind = "legacy Megatron"

    def __init__(self, directory: Path, iteration: int | str | None) -> None:
        self.path = directory
        self.iteration = iteration
        ranks = self._rank_directories()
        first = self._load(ranks[min(ranks)])
        self.args = arguments_of(first["args"], directory)
        self.version = float(optional(first, "checkpoint_version", float, str(directory), 0.0))
        where = f"{directory}: arguments"
        tensor_parallel = next((name for name in TENSOR_PARALLEL_ARGS if name in self.args), TENSOR_PARALLEL_ARGS[0])
        tp = optional(self.args, tensor_parallel, int, where, 1, low=1, high=MOST_RANKS)
        pp = optional(self.args, "pipeline_model_parallel_size", int, where, 1, low=1, high=MOST_RANKS)
        self.pipeline_parallel = pp
        missing = ((t, p) for p in range(pp) for t in range(tp) if (t, p) not in ranks)
        if names := [self._rank_name(*rank) for rank in islice(missing, 5)]:
            raise UserError(
                f"{directory}: TP{tp} PP{pp} according to its arguments, but {', '.join(names)} is missing; "
                "copy the checkpoint again"
            )
        # [pipeline stage][tensor rank] -> flat names; `layers.N.` counts from the stage's first
        self._stages = [
            [self._tensors(self._load(ranks[t, p]), first, ranks[t, p]) for t in range(tp)] for p in range(pp)
        ]
        if EMBEDDING not in self._stages[0][0] or POSITIONS not in self._stages[0][0]:
            raise UserError(
                f"{directory}: the first stage has no word and learned position embeddings; expected a GPTBigCode"
            )
        rows = sum((*tensor.shape, 0)[0] for tensor in self._shards(0, EMBEDDING))
        self.shape = shape_of_megatron_args(self.args, rows, directory)
        if self.version not in (0, 1, 2, 3) or (self.version < 2 and self.shape.multi_query):
            raise UserError(
                f"{directory}: checkpoint_version {self.version:g} of a "
                f"{'multi-query' if self.shape.multi_query else 'multi-head'} model, whose query-key-value order is unknown; "
                "expected version 2 or 3 (or 0 and 1 for multi-head models)"
            )
        self._first_layers = self._count_layers()
        self._compared: set[str] = set()  # names of tensors whose replicas are equal
        for name in self.names():
            self._check_shape(name)
        self.check_dtypes()

    @property
    def special_ids(self) -> dict[str, int | None]:
        """Those of the Hugging Face model that `write_legacy` wrote the checkpoint from."""
        found = (self.args or {}).get(SPECIAL_IDS_ARG)
        return known_ids(found, self.shape.vocab_size) if isinstance(found, dict) else {}

    def _check_shape(self, name: str) -> None:
        """Raise UserError unless the pieces of a tensor make its shape in the model."""
        expected = tensor_shape(self.shape, name)
        dim, pieces = self._stored(name)
        for piece in pieces:
            if [*piece.shape[:dim], *piece.shape[dim + 1 :]] != [*expected[:dim], *expected[dim + 1 :]]:
                check_shape(name, piece.shape, expected, self.path)
        total = list(expected)
        total[dim] = sum(piece.shape[dim] for piece in pieces)
        check_shape(name, total, expected, self.path)
        if (
            self.version < 2
            and weight_of(name).module == "linear_qkv"
            and any(len(piece) % (3 * self.shape.kv_channels) for piece in pieces)
        ):
            raise UserError(f"{self.path}: {name} is cut within a head, expected complete heads on each rank")

    def _rank_name(self, tensor_rank: int, stage: int) -> str:
        return f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if self.pipeline_parallel > 1 else "")

    def _rank_directories(self) -> dict[tuple[int, int], Path]:
        """(tensor rank, stage) -> directory.

        Directories with a data-parallel rank in their name hold only optimizer state.
        """
        found = {}
        for path in self.path.iterdir():
            match = re.fullmatch(r"mp_rank_([0-9]{2,6})(?:_([0-9]{3}))?", path.name)
            if match and any((path / name).is_file() for name in MODEL_FILES):
                found[int(match.group(1)), int(match.group(2) or 0)] = path
        if not found:
            raise UserError(
                f"{self.path}: mp_rank_* directories without {' or '.join(MODEL_FILES)}; copy the checkpoint again"
            )
        return found

    def _load(self, rank: Path) -> dict[str, Any]:
        file = next(rank / name for name in MODEL_FILES if (rank / name).is_file())
        check_link(file, self.path)
        found = load_pt(file)
        if not isinstance(found, dict) or not isinstance(found.get("model"), dict) or "args" not in found:
            raise UserError(f"{file}: has no 'model' and 'args', expected a checkpoint of Megatron-LM")
        optional(found, "iteration", int, str(file), None)
        return found

    def _tensors(self, found: dict[str, Any], first: dict[str, Any], rank: Path) -> dict[str, torch.Tensor]:
        if found.get("iteration") != first.get("iteration"):
            raise UserError(
                f"{rank}: from iteration {found.get('iteration')}, but the first rank is from {first.get('iteration')}; "
                "the files are from two checkpoints, copy one of them again"
            )
        flat: dict[str, torch.Tensor] = {}

        def walk(tree: dict[Any, Any], prefix: str, levels: int) -> None:
            if not levels:
                raise UserError(f"{rank}: 'model' has more than {MOST_LEVELS} levels, expected those of Megatron-LM")
            for key, value in tree.items():
                if isinstance(value, dict):
                    walk(value, f"{prefix}{key}.", levels - 1)
                elif is_plain(value):
                    flat[f"{prefix}{key}"] = value

        walk(found["model"], "", MOST_LEVELS)
        # Older versions have the names transformer for encoder and attention for self_attention.
        return {
            name.removeprefix("language_model.")
            .replace("transformer.layers.", "encoder.layers.")
            .replace("transformer.final_", "encoder.final_")
            .replace(".attention.", ".self_attention."): tensor
            for name, tensor in flat.items()
        }

    def _count_layers(self) -> list[int]:
        """Number of the first layer of every stage, and the total at the end."""
        firsts = [0]
        for stage in self._stages:
            numbers = {
                int(m.group(1)) for name in stage[0] if (m := re.match(r"encoder\.layers\.([0-9]{1,6})\.", name))
            }
            if numbers != set(range(len(numbers))):
                raise UserError(
                    f"{self.path}: layers {sorted(numbers)[:20]} on a pipeline stage, expected consecutive ones from 0; "
                    "copy the checkpoint again"
                )
            firsts.append(firsts[-1] + len(numbers))
        if firsts[-1] != self.shape.num_layers:
            raise UserError(
                f"{self.path}: {firsts[-1]} layers on {self.pipeline_parallel} stages, expected {self.shape.num_layers} "
                "from its arguments; the files do not belong together, copy the checkpoint again"
            )
        return firsts

    def dtype_of(self, name: str) -> torch.dtype:
        return widest(piece.dtype for piece in self._stored(name)[1])  # compares nothing, so reads nothing

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        cuts = self._cuts(name, compare=name not in self._compared)
        self._compared.add(name)
        return cuts

    def _cuts(self, name: str, compare: bool = False) -> tuple[int, list[torch.Tensor]]:
        """Axis and shards in rank order, with rows in today's order.

        With `compare`, UserError when replicas are not equal.
        """
        axis, shards = self._stored(name, compare)
        if weight_of(name).module == "linear_qkv" and self.version < 2:
            shards = [self._reordered(shard) for shard in shards]
        return axis, shards

    def _stored(self, name: str, compare: bool = False) -> tuple[int, list[torch.Tensor]]:
        layer, weight = layer_of(name), weight_of(name)
        if layer is None:
            stage = self.pipeline_parallel - 1 if weight.legacy.startswith("encoder.") else 0
            key = weight.legacy
        else:
            stage = next(p for p in range(self.pipeline_parallel) if layer < self._first_layers[p + 1])
            key = f"encoder.layers.{layer - self._first_layers[stage]}.{weight.legacy}"
        if weight.tp_dim is None:
            return 0, [self._replica(stage, key, name, compare)]
        if "query_key_value" in key and self.shape.multi_query:
            query = key.replace("query_key_value", "query")
            key_value = key.replace("query_key_value", "key_value")
            return 0, [*self._shards(stage, query), self._replica(stage, key_value, name, compare)]
        shards = self._shards(stage, key)
        if name == EMBEDDING and self.pipeline_parallel > 1 and compare:
            for rank, shard in enumerate(shards):
                copy = self._stages[-1][rank].get("word_embeddings_for_head.weight")
                if copy is not None and not torch.equal(copy, shard):
                    raise UserError(
                        f"{self.path}: word_embeddings_for_head.weight of "
                        f"{self._rank_name(rank, self.pipeline_parallel - 1)} differs from the embedding of "
                        f"{self._rank_name(rank, 0)}, {_difference(copy, shard)}; tied weights must be equal"
                    )
        return weight.tp_dim, shards

    def _shards(self, stage: int, key: str) -> list[torch.Tensor]:
        for rank, tensors in enumerate(self._stages[stage]):
            if key not in tensors:
                raise UserError(f"{self.path / self._rank_name(rank, stage)}: has no {key}; copy the checkpoint again")
        return [tensors[key] for tensors in self._stages[stage]]

    def _replica(self, stage: int, key: str, name: str, compare: bool) -> torch.Tensor:
        copies = self._shards(stage, key)
        for rank, copy in enumerate(copies[1:] if compare else [], start=1):
            if not torch.equal(copies[0], copy):
                raise UserError(
                    f"{self.path}: {key} ({name}) differs between {self._rank_name(0, stage)} and "
                    f"{self._rank_name(rank, stage)}, {_difference(copies[0], copy)}; replicas must be equal, "
                    "use a checkpoint from before they diverged"
                )
        return copies[0]

    def _reordered(self, shard: torch.Tensor) -> torch.Tensor:
        """Rows of query_key_value in today's order, [heads, 3, d].

        Checkpoint version 0 has the order [3, heads, d], version 1 [heads, d, 3].
        """
        d, rest = self.shape.kv_channels, shard.shape[1:]
        if self.version == 0:
            return shard.view(3, -1, d, *rest).transpose(0, 1).reshape(shard.shape)
        return shard.view(-1, d, 3, *rest).transpose(1, 2).reshape(shard.shape)


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    if a.shape != b.shape:
        return f"shapes {list(a.shape)} and {list(b.shape)}"
    return f"by up to {(a.float() - b.float()).abs().max().item():.3g}"
