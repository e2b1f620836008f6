"""Destinations of a run's numbers besides its files: TensorBoard, Weights & Biases, MLflow, Comet.

A destination is a class with `write` and `close`; where a service knows runs, its id is kept in the
save directory, so that a resumed run continues there. Their packages are extras of setup.py.
"""

import importlib.util
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.metrics.model_facts import ModelFacts
from megatron_ft.printable import printable

SECONDS_TO_CLOSE = 60  # for what MLflow's server has not taken yet
MLFLOW_PARAMS_AT_ONCE = 100  # the server's limit
LONGEST_PARAM = 500


class Sink(Protocol):
    """A destination of numbers by name, such as `train/loss`."""

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Add the numbers of one iteration."""

    def close(self) -> None:
        """Write out everything and release the destination."""


def check_sinks(config: Config) -> None:
    """Raise UserError for a sink whose package is not installed."""
    logging = config.logging
    for flag, wanted, module, package in (
        ("--wandb-project", logging.wandb_project, "wandb", "wandb"),
        ("--mlflow-experiment", logging.mlflow_experiment, "mlflow", "mlflow-skinny"),
        ("--comet-project", logging.comet_project, "comet_ml", "comet-ml"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"{flag}: {module} is not installed; `pip install {package}`, or leave the flag out")
    if logging.mlflow_tracking_uri and not logging.mlflow_experiment:
        raise UserError("--mlflow-tracking-uri needs --mlflow-experiment NAME; add it")


def open_sinks(config: Config, model: ModelFacts, save_dir: Path | None, start_iteration: int) -> list[Sink]:
    """The sinks that flags ask for."""
    sinks: list[Sink] = []
    if config.logging.tensorboard_dir:
        sinks.append(TensorBoard(config.logging.tensorboard_dir, start_iteration))
    if config.logging.wandb_project:
        sinks.append(WeightsAndBiases(config, model, save_dir))
    if config.logging.mlflow_experiment:
        sinks.append(MLflow(config, model, save_dir))
    if config.logging.comet_project:
        sinks.append(Comet(config, model, save_dir))
    return sinks


def settings_of(config: Config, model: ModelFacts) -> dict[str, Any]:
    """What services show about a run: its flags, and the model's numbers."""
    flags = {name: value for name, value in config.values().items() if isinstance(value, int | float | str | bool)}
    return {**flags, **model.settings()}


def kept_id(save_dir: Path | None, name: str) -> str | None:
    """The id that an earlier start of the run has in a service, None if there is none."""
    path = save_dir / name if save_dir else None
    return path.read_text(encoding="utf-8").strip() if path and path.exists() else None


def keep_id(save_dir: Path | None, name: str, value: str) -> None:
    """Keep the run's id in a service for later starts."""
    if save_dir:
        (save_dir / name).write_text(value, encoding="utf-8")


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

        run_id = kept_id(save_dir, "wandb_run_id") or secrets.token_hex(8)
        keep_id(save_dir, "wandb_run_id", run_id)
        try:
            self._run = wandb.init(
                project=config.logging.wandb_project,
                name=config.logging.wandb_run_name,
                id=run_id,
                resume="allow",
                dir=save_dir,
                config=settings_of(config, model),
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


class MLflow:
    """An MLflow run, continued after a resume.

    Numbers are sent by a thread, so that a server that is slow or away does not hold up training:
    what it does not take is lost with a warning. On nodes without network access, give a folder as
    --mlflow-tracking-uri.
    """

    def __init__(self, config: Config, model: ModelFacts, save_dir: Path | None) -> None:
        uri = config.logging.mlflow_tracking_uri
        if uri and (uri.startswith("file:") or "://" not in uri):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow 3 refuses by default

        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        params = {name: str(value)[:LONGEST_PARAM] for name, value in settings_of(config, model).items()}
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run_id = kept_id(save_dir, "mlflow_run_id")
            if self._run_id:
                known = self._client.get_run(self._run_id).data.params
                params = {name: value for name, value in params.items() if name not in known}  # they are fixed
                self._client.update_run(self._run_id, status="RUNNING")
            else:
                name = config.logging.mlflow_experiment
                found = self._client.get_experiment_by_name(name)
                experiment = found.experiment_id if found else self._client.create_experiment(name)
                self._run_id = self._client.create_run(experiment).info.run_id
                keep_id(save_dir, "mlflow_run_id", self._run_id)
            wanted = [Param(name, value) for name, value in params.items()]
            for first in range(0, len(wanted), MLFLOW_PARAMS_AT_ONCE):
                self._client.log_batch(self._run_id, params=wanted[first : first + MLFLOW_PARAMS_AT_ONCE])
        except (MlflowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--mlflow-experiment: {reason}; correct --mlflow-tracking-uri, or leave both out"
            ) from error
        self._waiting: queue.SimpleQueue[tuple[int, int, dict[str, float]] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._sender.start()

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Queue the numbers of one iteration."""
        self._waiting.put((iteration, int(time.time() * 1000), dict(numbers)))

    def close(self) -> None:
        """Wait for what is queued, and finish the MLflow run."""
        self._waiting.put(None)
        self._sender.join(SECONDS_TO_CLOSE)
        if self._sender.is_alive():
            print(f"warning: MLflow has not taken all numbers in {SECONDS_TO_CLOSE} s; they are lost", file=sys.stderr)

    def _send(self) -> None:
        from mlflow.entities import Metric

        lost = False
        while (item := self._waiting.get()) is not None:
            iteration, when, numbers = item
            # Of a group's name, what MLflow does not allow.
            metrics = [
                Metric(re.sub(r"[^\w\-./ ]", "_", name), value, when, iteration) for name, value in numbers.items()
            ]
            try:
                self._client.log_batch(self._run_id, metrics=metrics)
            except Exception as error:  # of MLflow, of its HTTP client, of the disk
                if not lost:
                    print(printable(f"warning: MLflow takes no numbers: {error}"), file=sys.stderr, flush=True)
                lost = True
        try:
            self._client.set_terminated(self._run_id)
        except Exception as error:
            print(printable(f"warning: MLflow: the run could not be finished: {error}"), file=sys.stderr, flush=True)


class Comet:
    """A Comet experiment, continued after a resume.

    On nodes without network access, set COMET_START_ONLINE=0: archives are written to the save
    directory, for `comet upload`.
    """

    def __init__(self, config: Config, model: ModelFacts, save_dir: Path | None) -> None:
        import comet_ml

        key = kept_id(save_dir, "comet_experiment_key") or secrets.token_hex(16)
        keep_id(save_dir, "comet_experiment_key", key)
        quiet = comet_ml.ExperimentConfig(
            offline_directory=str(save_dir / "comet") if save_dir else None,
            log_code=False,
            log_git_metadata=False,
            log_git_patch=False,
            auto_output_logging=False,
            auto_metric_logging=False,
            auto_param_logging=False,
            parse_args=False,
            display_summary_level=0,
        )
        try:
            self._experiment = comet_ml.start(
                project_name=config.logging.comet_project,
                experiment_key=key,
                mode="get_or_create",
                experiment_config=quiet,
            )
        except Exception as error:  # of many types, some of its HTTP client
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            remedy = "log in with `comet login`, or without network access set COMET_START_ONLINE=0"
            raise UserError(f"--comet-project: {reason}; {remedy}") from error
        self._experiment.log_parameters(settings_of(config, model))

    def write(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Log numbers of one step."""
        self._experiment.log_metrics(dict(numbers), step=iteration)

    def close(self) -> None:
        """Send what is left, or close the archive."""
        self._experiment.end()
