"""What a run says of itself, to files (here), console (console.py), TensorBoard and Weights & Biases (sinks.py), and report.html at the end.

Files in the save directory, one JSON object a line:

    metrics.jsonl     one line a step, each iteration once, whatever was lost and repeated between two starts
      iteration            optimizer steps done, this one included
      consumed_samples     packed rows seen so far                      consumed_tokens   tokens of documents in them
      loss                 training loss of the step (null when the step had no target or overflowed)
      lr                   learning rate the step used                  grad_norm         norm before clipping (null: fp16 overflow)
      loss_scale           fp16 loss scale, else 1                      global_batch_size rows of the step
      loss_tokens          positions of the step whose loss counts, each once, whatever it weighs (--norm-target-loss)
      fill_rate            share of the rows' positions that hold documents
      skipped_iterations   fp16 steps skipped so far                    spikes            losses far above their running mean so far
      -- above: the same in every run of the same flags; below: times, which differ
      step_seconds         wall time of the step
      tokens_per_second    positions of rows processed a second, all GPUs
      tflops_per_gpu       model TFLOP/s a GPU (recomputation not counted)   mfu         share of the GPU's peak; null for unknown devices
      memory_bytes         largest memory a GPU of this rank held (null on a CPU)
      part                 0 for the first start, 1 after the first resume ...   time     seconds since 1970
    validation.jsonl  one line a validation and group: iteration, group, loss, perplexity, token_accuracy, tokens, ...
    events.jsonl      what happened, with iteration and time: starts, checkpoints, stops

The learning rate, norm and loss of a step are what `step` is given; nothing is averaged in the file. Console lines show means over the interval.
"""

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from megatron_ft.config.config import Config
from megatron_ft.files.log_lines import parse_log_line, read_lines
from megatron_ft.metrics.console import Console, RunPlan
from megatron_ft.metrics.report import write_report
from megatron_ft.metrics.sinks import check_sinks, open_sinks
from megatron_ft.model import cost
from megatron_ft.model.shape import ModelShape

DETERMINISTIC_KEYS = (
    "iteration", "consumed_samples", "consumed_tokens", "loss", "lr", "grad_norm", "loss_scale", "global_batch_size",
    "loss_tokens", "fill_rate", "skipped_iterations", "spikes",
)  # fmt: skip
TIMING_KEYS = ("step_seconds", "tokens_per_second", "tflops_per_gpu", "mfu", "memory_bytes", "part", "time")


class MetricsLog:
    """The run's log, on the one rank that `writes`; on all others every method does nothing.

    Opening it cuts the files in `save_dir` back to `plan.start_iteration`: steps that were done after the checkpoint and lost are
    taken out, since they will come again (--skip-train repeats none, and cuts nothing). `last_step` is then the newest line that stays of
    metrics.jsonl, or None. `save_dir` None writes no files. Raises UserError for a sink that is not installed.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        plan: RunPlan,
        save_dir: str | Path | None,
        *,
        writes: bool = True,
    ) -> None:
        check_sinks(config)  # on every rank: all end alike
        self.config, self.shape, self.plan, self.writes = config, shape, plan, writes
        self.layout = config.layout()
        self.gpu = cost.find_gpu(plan.device_name) if plan.device_name else None
        self.console = Console(config, shape, plan, self.layout, self.gpu)
        self.save_dir = Path(save_dir) if save_dir else None
        self.part, self.spikes = 0, Spikes()
        self.last_step: dict | None = None
        self._validated: set[tuple[int, str]] = set()  # what validation.jsonl has a line of
        self._files, self._failed, self._sinks = {}, set(), []
        self._iteration = plan.start_iteration
        if not writes:
            return
        if self.save_dir:
            self.save_dir.mkdir(parents=True, exist_ok=True)
            self._cut_back()
        self._sinks = open_sinks(
            config, shape, self.save_dir, 0 if config.validation.skip_train else plan.start_iteration
        )

    # --- what the loop calls ---

    def banner(self, **facts: str) -> None:
        """Print what is about to run: model, layout, memory and length, and the `facts` the caller knows (data=..., start=...),
        each of one line or several."""
        if not self.writes:
            return
        self.console.banner(self.part, facts)
        if self.config.validation.skip_train:
            self._event("evaluation only", self.plan.start_iteration, facts)
        else:
            self._event("start", self.plan.start_iteration, {**facts, "train_iters": self.plan.train_iters})

    def step(self, record: dict) -> None:
        """Log one finished step. `record` holds iteration, consumed_samples, consumed_tokens, loss, lr, grad_norm, loss_scale,
        global_batch_size, loss_tokens, fill_rate, skipped_iterations, step_seconds; and where known memory_bytes and `squared_lengths`,
        the sum of squared document lengths of the global batch, for attention's share of the FLOPs (left out: not counted).
        """
        self._iteration = record["iteration"]
        if not self.writes:
            return
        record = self._complete(record)
        self._write("metrics.jsonl", record)
        numbers = {
            name: value for name, value in record.items() if value is not None and name not in ("iteration", "time")
        }
        for sink in self._sinks:
            sink.write(record["iteration"], {f"train/{name}": value for name, value in numbers.items()})
        self.console.step(record)

    def validation(self, iteration: int, group: str, record: dict) -> None:
        """Log one group's validation: `record` holds loss, perplexity, token_accuracy and what else is known.

        A line of the same iteration and group gives way to it.
        """
        if not self.writes:
            return
        if (iteration, group) in self._validated:
            self._files.pop("validation.jsonl", io.BytesIO()).close()
            with contextlib.suppress(OSError):  # a full disk: rather twice than not at all
                self._keep("validation.jsonl", lambda line: (line["iteration"], line["group"]) != (iteration, group))
        self._validated.add((iteration, group))
        self._write(
            "validation.jsonl", {"iteration": iteration, "group": group, **_finite(record), "time": time.time()}
        )
        for sink in self._sinks:
            sink.write(
                iteration,
                {f"validation/{group}/{name}": value for name, value in _finite(record).items() if value is not None},
            )
        shown = " | ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in record.items())
        self.console.print(f" validation at {iteration:>7,} | {group} | {shown}")

    def event(self, text: str) -> None:
        """Log something that happened once (a checkpoint, a stop), and print it."""
        if self.writes:
            self._event(text, self._iteration, {})
            self.console.print(text)

    def close(self) -> None:
        """Close files and bar, and write report.html; safe to call twice."""
        self.console.close()
        for file in self._files.values():
            file.close()
        self._files.clear()
        for sink in self._sinks:
            sink.close()
        self._sinks.clear()
        if self.writes and self.save_dir and read_lines(self.save_dir / "metrics.jsonl"):
            try:
                write_report(self.save_dir)
            except OSError as error:
                self.console.print(
                    f"{self.save_dir / 'report.html'}: {error.strerror}; python -m megatron_ft.metrics.report writes it later"
                )

    # --- a step's record ---

    def _complete(self, record: dict) -> dict:
        """All documented keys in their order; NaN and infinity become null, as JSON has neither."""
        record = {"memory_bytes": None, **record}
        positions = record["global_batch_size"] * self.config.data.seq_length
        attended = record.get("squared_lengths", 0) / positions
        flops = positions * cost.flops_per_token(self.shape, attended, lora=bool(self.layout.lora_rank))
        per_gpu = flops / record["step_seconds"] / self.config.parallel.world_size
        record["spikes"] = self.spikes.see(record["loss"])
        record["tokens_per_second"] = positions / record["step_seconds"]
        record["tflops_per_gpu"] = per_gpu / 1e12
        record["mfu"] = per_gpu / self.gpu.peak_flops(self.layout.precision) if self.gpu else None
        record["part"], record["time"] = self.part, time.time()
        return _finite({key: record[key] for key in DETERMINISTIC_KEYS + TIMING_KEYS})

    # --- files ---

    def _cut_back(self) -> None:
        """Keep the files' lines up to the start iteration; a line torn by a crash goes too. Rebuilds the spike count from what stays.

        A training that starts at 0 keeps none: its --eval-at-start comes again. --skip-train adds to what is there.
        """
        last_kept = math.inf if self.config.validation.skip_train else self.plan.start_iteration or -1

        def step_stays(line: dict) -> bool:
            if line["iteration"] > last_kept:
                return False
            self.spikes.see(line["loss"])
            self.last_step = line
            return True

        def validation_stays(line: dict) -> bool:
            if line["iteration"] > last_kept:
                return False
            self._validated.add((line["iteration"], line["group"]))
            return True

        def event_stays(line: dict) -> bool:  # what happened stays told, even where the steps were lost
            self.part = max(self.part, line["part"] + (not self.config.validation.skip_train))
            return True

        self._keep("metrics.jsonl", step_stays)
        self._keep("validation.jsonl", validation_stays)
        self._keep("events.jsonl", event_stays)

    def _keep(self, name: str, stays: Callable[[dict], bool]) -> None:
        """Rewrite a file with the lines that stay, in their order; torn ones do not."""
        path = self.save_dir / name
        if not path.exists():
            return
        kept = self.save_dir / (name + ".kept")
        with path.open() as source, kept.open("w") as target:
            target.writelines(line for line in source if (record := parse_log_line(line)) is not None and stays(record))
        os.replace(kept, path)

    def _event(self, text: str, iteration: int, details: dict[str, str | int]) -> None:
        line = {"iteration": iteration, "event": text, **details, "part": self.part, "time": time.time()}
        self._write("events.jsonl", line)

    def _write(self, name: str, record: dict) -> None:
        """Append a line. A disk that is full costs lines of the log, not the run: said once, tried again with every line."""
        if not self.save_dir:
            return
        try:
            if name not in self._files:
                self._files[name] = (self.save_dir / name).open("ab", buffering=0)
                if name in self._failed:  # what was written of the last line must not spoil this one
                    self._files[name].write(b"\n")
            self._files[name].write(json.dumps(record).encode() + b"\n")
            self._failed.discard(name)
        except OSError as error:
            if name not in self._failed:
                self.console.print(
                    f"{self.save_dir / name}: {error.strerror}; lines are lost until there is room again"
                )
            self._failed.add(name)
            if name in self._files:
                self._files.pop(name).close()


class Spikes:
    """Counts losses more than six running standard deviations above their running mean, after twenty steps to learn both."""

    def __init__(self) -> None:
        self.count, self._seen, self._mean, self._square = 0, 0, 0.0, 0.0

    def see(self, loss: float | None) -> int:
        """Take one step's loss; returns the count so far."""
        if loss is None or not math.isfinite(loss):
            return self.count
        deviation = math.sqrt(max(self._square - self._mean**2, 1e-12))
        if self._seen >= 20 and loss > self._mean + max(6 * deviation, 0.1):
            self.count += 1
            return self.count  # a spike does not move what it is measured by
        self._seen += 1
        weight = max(0.05, 1 / self._seen)
        self._mean += weight * (loss - self._mean)
        self._square += weight * (loss**2 - self._square)
        return self.count


def _finite(record: dict) -> dict:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
