"""Where the numbers of a run go besides its files: TensorBoard and Weights & Biases. Each has `write(iteration, numbers)` and `close()`."""

import importlib.util
import secrets
from pathlib import Path

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.model.shape import ModelShape


def check_sinks(config: Config) -> None:
    """Raise UserError for a sink whose package is not installed."""
    if config.logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb-project: wandb is not installed; `pip install wandb`, or leave the flag out")


def open_sinks(config: Config, shape: ModelShape, save_dir: Path | None, start_iteration: int) -> list:
    """The sinks that flags ask for."""
    sinks = []
    if config.logging.tensorboard_dir:
        sinks.append(TensorBoard(config.logging.tensorboard_dir, start_iteration))
    if config.logging.wandb_project:
        sinks.append(WeightsAndBiases(config, shape, save_dir))
    return sinks


class TensorBoard:
    """Event files; events after the start iteration that an earlier start wrote are purged from view."""

    def __init__(self, directory: str, start_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory, purge_step=start_iteration + 1 if start_iteration else None)

    def write(self, iteration: int, numbers: dict[str, float]) -> None:
        """Add scalars at `iteration`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run whose id is kept beside the checkpoints, so that a resumed run goes on in the same curves (steps done again are
    left as they were: W&B takes none twice).

    On compute nodes without network, WANDB_MODE=offline and `wandb sync` afterwards.
    """

    def __init__(self, config: Config, shape: ModelShape, save_dir: Path | None) -> None:
        import wandb

        id_file = save_dir / "wandb_run_id" if save_dir else None
        run_id = id_file.read_text().strip() if id_file and id_file.exists() else secrets.token_hex(8)
        if id_file:
            id_file.write_text(run_id)
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
                config={**settings, **shape.as_dict()},
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--wandb-project: {reason}; without network set WANDB_MODE=offline") from error

    def write(self, iteration: int, numbers: dict[str, float]) -> None:
        """Log numbers at `iteration`."""
        self._run.log(numbers, step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
