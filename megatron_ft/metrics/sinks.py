"""Destinations of a run's numbers besides its files: TensorBoard and Weights & Biases."""

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.metrics.model_facts import ModelFacts


class Sink(Protocol):
    """A destination of numbers by name, such as `train/loss`."""

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers of one iteration."""

    def close(self) -> None:
        """Write out everything and release the destination."""


def check_sinks(config: Config) -> None:
    """Raise UserError for a sink whose package is not installed."""
    if config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb-project: wandb is not installed; `pip install wandb`, or leave the flag out")


def open_sinks(config: Config, model: ModelFacts, save_dir: Path | None, start_iteration: int) -> list[Sink]:
    """The sinks that flags ask for."""
    sinks: list[Sink] = []
    if config.logging.tensorboard_dir:
        sinks.append(TensorBoard(config.logging.tensorboard_dir, start_iteration))
    if config.logging.wandb_project:
        sinks.append(WeightsAndBiases(config, model, save_dir))
    return sinks


class TensorBoard:
    """Event files; events of an earlier start after `start_iteration` are purged from view."""

    def __init__(self, directory: str, start_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory, purge_step=start_iteration + 1 if start_iteration else None)

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run, continued after a resume: its id is kept in the save directory.

    W&B takes every step once, so steps that are repeated after a resume keep their first values. On
    nodes without network access, set WANDB_MODE=offline and run `wandb sync` later.
    """

    def __init__(self, config: Config, model: ModelFacts, save_dir: Path | None) -> None:
        import wandb

        id_file = save_dir / "wandb_run_id" if save_dir else None
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file and id_file.exists() else secrets.token_hex(8)
        if id_file:
            id_file.write_text(run_id, encoding="utf-8")
        settings = {
            name: value for name, value in config.values().items() if isinstance(value, int | float | str | bool)
        }
        try:
            self._run = wandb.init(
                project=config.logging.wandb_project,
                name=config.logging.wandb_run_name,
                id=run_id,
                resume="allow",
                dir=save_dir,
                config={**settings, **model.settings()},
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--wandb-project: {reason}; without network access set WANDB_MODE=offline") from error

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Log numbers of one step."""
        self._run.log(dict(numbers), step=iteration)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()
