"""`Config`: the settled flags of a run, which is what functions are given.

`config.parallel.tensor`, `config.data.seq_length`: the groups are the dataclasses of flags.py. A
`Config` is frozen; `with_flags` makes a copy with other values.
"""

import argparse
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_ft.config.flag import MEGATRON, Flag, flag_fields
from megatron_ft.config.flags import (
    Checkpoint,
    Data,
    Logging,
    Lora,
    Loss,
    Memory,
    Model,
    Optimizer,
    Parallel,
    Precision,
    Schedule,
    Training,
    Validation,
)
from megatron_ft.model.cost import Layout
from megatron_ft.model.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every flag's value, in groups.

    `shape` is the model's, None until a checkpoint gives it, and always in --engine transformers.
    `notices` are lines for the log; copies share the list, and setting up a run appends to it.
    `given` are the flags that a user has set, as the settings of a config.yaml.
    """

    model: Model = Model()
    data: Data = Data()
    loss: Loss = Loss()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Precision = Precision()
    parallel: Parallel = Parallel()
    memory: Memory = Memory()
    lora: Lora = Lora()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    engine: str = MEGATRON
    shape: ModelShape | None = None
    notices: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_namespace(cls, parsed: argparse.Namespace, world_size: int = 1, engine: str = MEGATRON) -> "Config":
        """From what the parser of command_line.py gives."""
        given = {dest: getattr(parsed, dest) for dest in ENTRIES}
        return cls(engine=engine, notices=list(parsed.notices)).with_flags(**given, world_size=world_size)

    def value(self, dest: str) -> Any:
        """A flag's value by its name with underscores, as manifests have it."""
        entry = ENTRIES[dest]
        return getattr(getattr(self, entry.group), entry.field)

    def values(self) -> dict[str, Any]:
        """All flags by their names with underscores, in the table's order."""
        return {dest: self.value(dest) for dest in ENTRIES}

    def layout(self) -> Layout:
        """What the flags say about memory and speed, for model/cost.py."""
        data_parallel = max(1, self.parallel.data)
        micro_batch = self.training.micro_batch_size
        return Layout(
            tensor_parallel=self.parallel.tensor,
            pipeline_parallel=self.parallel.pipeline,
            data_parallel=data_parallel,
            context_parallel=self.parallel.context,
            sequence_parallel=self.parallel.sequence,
            distributed_optimizer=self.parallel.distributed_optimizer,
            precision=self.precision.name,
            fp32_gradients=self.precision.fp32_gradients,
            optimizer=self.optimizer.name,
            optimizer_cpu_offload=self.optimizer.cpu_offload,
            micro_batch=micro_batch,
            num_microbatches=max(1, self.training.global_batch_size // (micro_batch * data_parallel)),
            recompute=self.memory.recompute_granularity,
            recompute_num_layers=self.memory.recompute_num_layers or 1,
            recompute_method=self.memory.recompute_method or "uniform",
            lora_rank=self.lora.rank,
            lora_targets=tuple(self.lora.targets.split(",")) if self.lora.rank else (),
            lora_dropout=self.lora.dropout,
        )

    def with_flags(self, **changes: Any) -> "Config":
        """A copy with other values of some flags, by their names with underscores, or of
        `world_size`."""
        groups: dict[str, dict[str, Any]] = {}
        for dest, value in changes.items():
            group, name = ("parallel", dest) if dest == "world_size" else (ENTRIES[dest].group, ENTRIES[dest].field)
            groups.setdefault(group, {})[name] = value
        return replace(self, **{group: replace(getattr(self, group), **given) for group, given in groups.items()})


@dataclass(frozen=True)
class Entry:
    """One flag: where its value is in `Config`, its default, and its description."""

    group: str
    field: str
    default: Any
    flag: Flag


# Groups by their names in `Config`, and all flags by their names with underscores.
GROUPS: dict[str, type] = {
    item.name: type(item.default) for item in fields(Config) if item.name not in ("engine", "shape", "notices", "given")
}
ENTRIES: dict[str, Entry] = {
    described.dest: Entry(group, item.name, item.default, described)
    for group, kind in GROUPS.items()
    for item, described in flag_fields(kind)
}
