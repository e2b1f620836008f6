"""The log of a run: to files, console (console.py), services (sinks.py), and report.html.

Files in the save directory, one JSON object per line:

    metrics.jsonl     one line per step; each iteration once, even if a resumed run repeated it
      iteration            optimizer steps done, including this one
      consumed_samples     packed sequences seen so far
      consumed_tokens      document tokens in them
      loss                 training loss of the step (null: no token had a loss)
      lr                   learning rate used by the step
      grad_norm            norm before clipping (null: an fp16 step was skipped)
      loss_scale           fp16 loss scale, else 1
      global_batch_size    sequences in the step
      loss_tokens          tokens with loss; each counts once, whatever its weight
      fill_rate            fraction of token positions that hold documents
      skipped_iterations   fp16 steps skipped so far
      spikes               losses far above their running mean so far
      -- up to this line, runs with the same flags agree; the rest are timings --
      step_seconds         wall time
      tokens_per_second    token positions per second, over all GPUs
      tflops_per_gpu       model TFLOP/s per GPU, without recomputation
      mfu                  fraction of the GPU's peak; null for an unknown device
      memory_bytes         peak memory of this rank's GPU so far (null on a CPU)
      part                 0 for the first start, 1 after the first resume, ...
      time                 Unix time in seconds
    validation.jsonl  one line per validation and group: iteration, group, loss, perplexity, ...
    events.jsonl      starts, checkpoints, stops, with iteration and time
    config.yaml       the flags that were given; launch/finetune.py --config repeats the run

The numbers of a step are logged as they are; only the console averages over an interval.
"""

import math
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_ft.config.command_line import keep_settings
from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.metrics.console import Console, RunPlan
from megatron_ft.metrics.lines import DETERMINISTIC_KEYS, EVENTS, METRICS, TIMING_KEYS, VALIDATION, read_log
from megatron_ft.metrics.log_files import LogFiles
from megatron_ft.metrics.model_facts import ModelFacts
from megatron_ft.metrics.report import write_report
from megatron_ft.metrics.sinks import Sink, open_sinks
from megatron_ft.model import cost


class MetricsLog:
    """The run's log on the one rank that `writes`; on all others every method does nothing.

    Opening it removes from the files in `save_dir` the steps after `plan.start_iteration`, which
    the run repeats (--skip-train repeats none and removes nothing). `last_step` is then the newest
    remaining line of metrics.jsonl, or None. With `save_dir` None no files are written. Raises
    UserError for a sink that cannot be opened.
    """

    def __init__(
        self,
        config: Config,
        model: ModelFacts,
        plan: RunPlan,
        save_dir: str | Path | None,
        *,
        writes: bool = True,
    ) -> None:
        self.config, self.model, self.plan, self.writes = config, model, plan, writes
        self.layout = config.layout()
        self.gpu = cost.find_gpu(plan.device_name) if plan.device_name else None
        self.console = Console(config, model, plan, self.layout, self.gpu)
        self.part, self.spikes = 0, Spikes()
        self.last_step: dict | None = None
        self._iteration = plan.start_iteration
        self._validated: set[tuple[int, str]] = set()  # (iteration, group) of the lines in VALIDATION
        self._files: LogFiles | None = None
        self._sinks: list[Sink] = []
        if not writes:
            return
        save_dir = Path(save_dir) if save_dir else None
        if save_dir:
            self._files = LogFiles(save_dir, self.console.print)
            keep_settings(config, save_dir)
            self._remove_repeated(self._files)
        self._sinks = open_sinks(config, model, save_dir, 0 if config.validation.skip_train else plan.start_iteration)

    # --- called by the training loop ---

    def banner(self, **facts: str) -> None:
        """Print and log what is about to run.

        The banner has the model, layout, memory and length, then the caller's `facts` (data=...,
        start=...), each of one or more lines.
        """
        if not self.writes:
            return
        self.console.banner(self.part, facts)
        about = {
            "model": self.model.summary(),
            "layout": str(self.layout),
            "precision": self.layout.precision,
            "device": self.plan.device_name or "CPU",
        }
        if self.config.validation.skip_train:
            self._event("evaluation only", self.plan.start_iteration, {**about, **facts})
        else:
            self._event("start", self.plan.start_iteration, {**about, **facts, "train_iters": self.plan.train_iters})

    def step(self, record: dict) -> None:
        """Log one finished step.

        `record` has the keys iteration, consumed_samples, consumed_tokens, loss, lr, grad_norm,
        loss_scale, global_batch_size, loss_tokens, fill_rate, skipped_iterations and step_seconds;
        memory_bytes if known; and squared_lengths, the sum of the squared document lengths in the
        global batch, to count the FLOPs of attention (default: not counted).
        """
        self._iteration = record["iteration"]
        if not self.writes:
            return
        record = self._complete(record)
        self._append(METRICS, record)
        self._to_sinks(
            record["iteration"],
            {f"train/{name}": value for name, value in record.items() if name not in ("iteration", "time")},
        )
        self.console.step(record)

    def validation(self, iteration: int, group: str, record: dict) -> None:
        """Log one group's validation: loss, perplexity, token_accuracy and other numbers.

        It replaces an existing line of the same iteration and group.
        """
        if not self.writes:
            return
        if self._files and (iteration, group) in self._validated:
            self._files.filter(VALIDATION, lambda line: (line["iteration"], line["group"]) != (iteration, group))
        self._validated.add((iteration, group))
        finite = _finite(record)
        self._append(VALIDATION, {"iteration": iteration, "group": group, **finite, "time": time.time()})
        self._to_sinks(iteration, {f"validation/{group}/{name}": value for name, value in finite.items()})
        shown = " | ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in record.items())
        self.console.print(f"validation at {iteration:,} | {group} | {shown}")

    def event(self, text: str) -> None:
        """Log and print a single event, such as a checkpoint or a stop."""
        if self.writes:
            self._event(text, self._iteration, {})
            self.console.print(text)

    def close(self) -> None:
        """Close files, sinks and progress bar, and write report.html; safe to call twice."""
        self.console.close()
        if self._files:
            self._files.close()
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()
        if self._files and read_log(self._files.directory, METRICS):
            save_dir = self._files.directory
            try:
                write_report(save_dir)
            except UserError as error:
                self.console.print(
                    f"warning: no report: {error}; "
                    f"write it later with: python launch/report.py {shlex.quote(str(save_dir))}"
                )

    # --- one step's record ---

    def _complete(self, record: dict) -> dict:
        """All documented keys in order; NaN and Inf become null, because JSON has neither."""
        record = {"memory_bytes": None, **record}
        positions = record["global_batch_size"] * self.config.data.seq_length
        attended = record.get("squared_lengths", 0) / positions
        flops = positions * self.model.flops_per_token(attended)
        per_gpu = flops / record["step_seconds"] / self.config.parallel.world_size
        record["spikes"] = self.spikes.add(record["loss"])
        record["tokens_per_second"] = positions / record["step_seconds"]
        record["tflops_per_gpu"] = per_gpu / 1e12
        record["mfu"] = per_gpu / self.gpu.peak_flops(self.layout.precision) if self.gpu else None
        record["part"], record["time"] = self.part, time.time()
        return _finite({key: record[key] for key in DETERMINISTIC_KEYS + TIMING_KEYS})

    # --- files and sinks ---

    def _remove_repeated(self, files: LogFiles) -> None:
        """Remove lines after the start iteration, and count the spikes in the remaining steps.

        A training that starts at 0 keeps no line, because its --eval-at-start is repeated.
        --skip-train keeps all.
        """
        skip_train = self.config.validation.skip_train
        last_kept = math.inf if skip_train else self.plan.start_iteration or -1

        def keep_step(line: dict) -> bool:
            if line["iteration"] > last_kept:
                return False
            self.spikes.add(line["loss"])
            self.last_step = line
            return True

        def keep_validation(line: dict) -> bool:
            if line["iteration"] > last_kept:
                return False
            self._validated.add((line["iteration"], line["group"]))
            return True

        def keep_event(line: dict) -> bool:  # also events of steps that are repeated
            self.part = max(self.part, (line["part"] or 0) + (not skip_train))
            return True

        files.filter(METRICS, keep_step)
        files.filter(VALIDATION, keep_validation)
        files.filter(EVENTS, keep_event)

    def _event(self, text: str, iteration: int, details: Mapping[str, str | int]) -> None:
        line = {"iteration": iteration, "event": text, **details, "part": self.part, "time": time.time()}
        self._append(EVENTS, line)

    def _append(self, name: str, record: dict) -> None:
        if self._files:
            self._files.append(name, record)

    def _to_sinks(self, iteration: int, numbers: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in numbers.items() if value is not None}
        for sink in self._sinks:
            sink.write(iteration, known)


class Spikes:
    """Counts losses that are more than six running standard deviations above their running mean.

    The first twenty steps only set mean and deviation.
    """

    def __init__(self) -> None:
        self.count, self._seen, self._mean, self._square = 0, 0, 0.0, 0.0

    def add(self, loss: float | None) -> int:
        """Add one step's loss; returns the number of spikes so far."""
        if loss is None or not math.isfinite(loss):
            return self.count
        deviation = math.sqrt(max(self._square - self._mean**2, 1e-12))
        if self._seen >= 20 and loss > self._mean + max(6 * deviation, 0.1):
            self.count += 1
            return self.count  # a spike changes neither mean nor deviation
        self._seen += 1
        weight = max(0.05, 1 / self._seen)
        self._mean += weight * (loss - self._mean)
        self._square += weight * (loss**2 - self._square)
        return self.count


def _finite(record: dict) -> dict:
    """`record` with None for NaN and Inf."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
