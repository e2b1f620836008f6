"""The process group of all ranks of a run."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ft.config.config import Config


def create_process_group(config: Config) -> None:
    """Create the default process group, unless there is one.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are torchrun's; without them there is one rank.
    """
    if dist.is_initialized():
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(minutes=config.parallel.timeout_minutes),
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        store=None if "MASTER_ADDR" in os.environ else dist.HashStore(),
    )
