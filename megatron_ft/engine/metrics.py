"""What a run says of itself: console lines, progress bar, metrics.jsonl, TensorBoard, Weights & Biases, and report.html at the end.

Files in the save directory, one JSON object a line:

    metrics.jsonl     one line a step, each iteration once, whatever was lost and repeated between two starts
      iteration            optimizer steps done, this one included
      consumed_samples     packed rows seen so far                      consumed_tokens   tokens of documents in them
      loss                 training loss of the step (null when the step had no target or overflowed)
      lr                   learning rate the step used                  grad_norm         norm before clipping (null: fp16 overflow)
      loss_scale           fp16 loss scale, else 1                      global_batch_size rows of the step
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

import argparse
import importlib.util
import json
import math
import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_ft import memory
from megatron_ft.engine.report import read_lines, whole_line, write_report
from megatron_ft.errors import UserError
from megatron_ft.models import ModelShape, padded_vocab_size

DETERMINISTIC_KEYS = (
    "iteration", "consumed_samples", "consumed_tokens", "loss", "lr", "grad_norm", "loss_scale", "global_batch_size",
    "fill_rate", "skipped_iterations", "spikes",
)  # fmt: skip
TIMING_KEYS = ("step_seconds", "tokens_per_second", "tflops_per_gpu", "mfu", "memory_bytes", "part", "time")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How long the run is and where this start begins; what the log needs for ETA, cutting back and the banner."""

    train_iters: int
    start_iteration: int = 0
    train_samples: int | None = None
    rows_per_epoch: int | None = None
    device_name: str | None = None  # torch.cuda.get_device_name(), None on a CPU


class MetricsLog:
    """The run's log, on the one rank that `writes`; on all others every method does nothing.

    Opening it cuts the files in `save_dir` back to `plan.start_iteration`: steps that were done after the checkpoint and lost are
    taken out, since they will come again. `save_dir` None writes no files.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        shape: ModelShape,
        plan: RunPlan,
        save_dir: str | Path | None,
        *,
        writes: bool = True,
    ) -> None:
        if args.wandb_project and importlib.util.find_spec("wandb") is None:  # on every rank: all end alike
            raise UserError("--wandb-project: wandb is not installed; `pip install wandb`, or leave the flag out")
        self.args, self.shape, self.plan, self.writes = args, shape, plan, writes
        self.layout = memory.Layout.from_args(args)
        self.gpu = memory.find_gpu(plan.device_name) if plan.device_name else None
        self.save_dir = Path(save_dir) if save_dir else None
        self.part, self.spikes = 0, Spikes()
        self._files, self._failed, self._interval, self._sinks, self._bar = {}, set(), [], [], None
        self._iteration = plan.start_iteration
        if not writes:
            return
        if self.save_dir:
            self.save_dir.mkdir(parents=True, exist_ok=True)
            self._cut_back()
        if args.tensorboard_dir:
            self._sinks.append(TensorBoard(args.tensorboard_dir, plan.start_iteration))
        if args.wandb_project:
            self._sinks.append(WeightsAndBiases(args, shape, self.save_dir))

    # --- what the loop calls ---

    def banner(self, **facts: str) -> None:
        """Print what is about to run: model, layout, memory and length, and the `facts` the caller knows (data=..., start=...),
        each of one line or several."""
        if not self.writes:
            return
        lines = [("model", self._model_line()), ("layout", str(self.layout)), ("precision", self._precision_line())]
        lines += [("memory", self._memory_line()), ("training", self._training_line())]
        lines += [(name.replace("_", " "), text) for name, text in facts.items()]
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            for number, line in enumerate(text.split("\n")):
                self._print(f"{'' if number else name:>{width}} | {line}")
        self.event("start", iteration=self.plan.start_iteration, **facts)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.plan.train_iters,
                initial=self.plan.start_iteration,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def step(self, record: dict) -> None:
        """Log one finished step. `record` holds iteration, consumed_samples, consumed_tokens, loss, lr, grad_norm, loss_scale,
        global_batch_size, fill_rate, skipped_iterations, step_seconds; and where known memory_bytes and `squared_lengths`,
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
        self._interval.append(record)
        if self._bar is not None:
            loss = "none" if record["loss"] is None else f"{record['loss']:.4f}"
            self._bar.set_postfix_str(f"loss {loss}, {record['tokens_per_second']:,.0f} tokens/s", refresh=False)
            self._bar.update(record["iteration"] - self._bar.n)
        if record["iteration"] % self.args.log_interval == 0 or record["iteration"] == self.plan.train_iters:
            self._print(self._interval_line())
            self._interval.clear()

    def validation(self, iteration: int, group: str, record: dict) -> None:
        """Log one group's validation: `record` holds loss, perplexity, token_accuracy and what else is known."""
        if not self.writes:
            return
        self._write(
            "validation.jsonl", {"iteration": iteration, "group": group, **_finite(record), "time": time.time()}
        )
        for sink in self._sinks:
            sink.write(
                iteration,
                {f"validation/{group}/{name}": value for name, value in _finite(record).items() if value is not None},
            )
        shown = " | ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in record.items())
        self._print(f" validation at {iteration:>7,} | {group} | {shown}")

    def event(self, text: str, *, iteration: int | None = None, **details: str) -> None:
        """Log something that happened once (a checkpoint, a stop), and print it unless it is the start, which the banner tells."""
        if not self.writes:
            return
        at = self._iteration if iteration is None else iteration
        self._write("events.jsonl", {"iteration": at, "event": text, **details, "part": self.part, "time": time.time()})
        if text != "start":
            self._print(text)

    def close(self) -> None:
        """Close files and bar, and write report.html; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
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
                self._print(
                    f"{self.save_dir / 'report.html'}: {error.strerror}; python -m megatron_ft.engine.report writes it later"
                )

    # --- banner ---

    def _padded_vocab(self) -> int:
        return padded_vocab_size(
            self.shape.vocab_size, self.args.make_vocab_size_divisible_by, self.layout.tensor_parallel
        )

    def _model_line(self) -> str:
        shape = self.shape
        parameters = shape.num_parameters(self._padded_vocab())
        attention = "multi-query" if shape.multi_query else "multi-head"
        line = f"{self.args.preset or 'GPTBigCode'}: {parameters:,} parameters, {shape.num_layers} layers x {shape.hidden_size}, "
        line += f"{shape.num_attention_heads} heads ({attention}), vocabulary {shape.vocab_size:,} (padded {self._padded_vocab():,})"
        if self.layout.lora_rank:
            whole = memory.Layout(lora_rank=self.layout.lora_rank, lora_targets=self.layout.lora_targets)
            adapters = memory.adapter_parameters_on_rank(shape, whole)
            line += f"; LoRA rank {self.layout.lora_rank} trains {adapters:,} ({100 * adapters / parameters:.2f} %)"
        return line

    def _precision_line(self) -> str:
        optimizer = f"{self.args.optimizer}{' on the CPU' if self.args.optimizer_cpu_offload else ''}"
        return f"{self.layout.precision}, {optimizer}, peak lr {self.args.lr:g} ({self.args.lr_decay_style})"

    def _memory_line(self) -> str:
        need = memory.estimate(self.shape, self._padded_vocab(), self.layout, self.args.seq_length)
        parts = [(need.weights, "weights"), (need.gradients, "gradients"), (need.optimizer, "optimizer")]
        parts += [(need.activations, "activations")]
        unit, size = ("GiB", memory.GIB) if need.total >= memory.GIB else ("MiB", 2**20)
        line = f"about {need.total / size:.1f} {unit} a rank: "
        line += ", ".join(f"{name} {part / size:.1f}" for part, name in parts)
        if self.gpu and not need.fits(self.gpu):
            line += f"; MORE than {self.gpu.name} holds: see launch/plan.py"
        return line

    def _training_line(self) -> str:
        plan, args = self.plan, self.args
        tokens = args.global_batch_size * args.seq_length
        line = f"{plan.train_iters:,} steps of {args.global_batch_size} rows x {args.seq_length:,} tokens ({tokens:,})"
        if plan.rows_per_epoch:
            samples = plan.train_samples or plan.train_iters * args.global_batch_size
            line += f", {samples / plan.rows_per_epoch:.2f} epochs of {plan.rows_per_epoch:,} rows"
        if plan.start_iteration:
            line += f"; {plan.start_iteration:,} done before (start {self.part + 1})"
        return line

    # --- a step's record and line ---

    def _complete(self, record: dict) -> dict:
        """All documented keys in their order; NaN and infinity become null, as JSON has neither."""
        record = {"skipped_iterations": 0, "loss_scale": 1.0, "fill_rate": None, "memory_bytes": None, **record}
        positions = record["global_batch_size"] * self.args.seq_length
        attended = record.get("squared_lengths", 0) / positions
        flops = positions * memory.flops_per_token(self.shape, attended, lora=bool(self.layout.lora_rank))
        per_gpu = flops / record["step_seconds"] / self.args.world_size
        record["spikes"] = self.spikes.see(record["loss"])
        record["tokens_per_second"] = positions / record["step_seconds"]
        record["tflops_per_gpu"] = per_gpu / 1e12
        record["mfu"] = per_gpu / self.gpu.peak_flops(self.layout.precision) if self.gpu else None
        record["part"], record["time"] = self.part, time.time()
        return _finite({key: record[key] for key in DETERMINISTIC_KEYS + TIMING_KEYS})

    def _interval_line(self) -> str:
        steps, last = self._interval, self._interval[-1]
        seconds = sum(record["step_seconds"] for record in steps)
        mean = {
            key: sum(values) / len(values)
            for key in ("loss", "grad_norm", "fill_rate")
            if (values := [record[key] for record in steps if record[key] is not None])
        }
        weigh = {
            key: sum(r[key] * r["step_seconds"] for r in steps) / seconds
            for key in ("tokens_per_second", "tflops_per_gpu")
        }
        width = len(f"{self.plan.train_iters:,}")
        remaining = (self.plan.train_iters - last["iteration"]) * seconds / len(steps)
        parts = [
            f" iteration {last['iteration']:>{width},}/{self.plan.train_iters:,}",
            f"samples {last['consumed_samples']:>11,}",
            f"tokens {last['consumed_tokens']:>15,}",
            f"lr {last['lr']:.3e}",
            f"loss {mean['loss']:>9.6f}" if "loss" in mean else "loss      none",
            f"grad norm {mean['grad_norm']:>8.3f}" if "grad_norm" in mean else "grad norm     none",
            f"scale {last['loss_scale']:>7g}",
            f"{weigh['tokens_per_second']:>9,.0f} tok/s",
            f"{weigh['tflops_per_gpu']:>7.2f} TFLOP/s"
            if self.plan.device_name
            else f"{1e3 * weigh['tflops_per_gpu']:>7.2f} GFLOP/s",
        ]
        if self.gpu:
            peak = self.gpu.peak_flops(self.layout.precision)
            parts.append(f"MFU {100e12 * weigh['tflops_per_gpu'] / peak:>5.1f} %")
        if "fill_rate" in mean:
            parts.append(f"fill {100 * mean['fill_rate']:>5.1f} %")
        if last["memory_bytes"]:
            parts.append(f"mem {last['memory_bytes'] / memory.GIB:>5.1f} GiB")
        parts.append(f"ETA {clock(remaining)}")
        parts += [f"skipped {last['skipped_iterations']}"] if last["skipped_iterations"] else []
        parts += [f"spikes {last['spikes']}"] if last["spikes"] else []
        return " | ".join(parts)

    # --- files ---

    def _cut_back(self) -> None:
        """Keep the files' lines up to the start iteration; a line torn by a crash goes too. Rebuilds the spike count from what stays."""
        for name in ("metrics.jsonl", "validation.jsonl", "events.jsonl"):
            path = self.save_dir / name
            if not path.exists():
                continue
            kept = self.save_dir / (name + ".kept")
            with path.open() as source, kept.open("w") as target:
                for line in source:
                    record = whole_line(line)
                    if record is None:
                        continue
                    if name == "events.jsonl":  # what happened stays told, even where the steps were lost
                        self.part = max(self.part, record["part"] + 1)
                    elif record["iteration"] > self.plan.start_iteration:
                        continue
                    if name == "metrics.jsonl":
                        self.spikes.see(record["loss"])
                    target.write(line)
            os.replace(kept, path)

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
                self._print(f"{self.save_dir / name}: {error.strerror}; lines are lost until there is room again")
            self._failed.add(name)
            if name in self._files:
                self._files.pop(name).close()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)


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

    def __init__(self, args: argparse.Namespace, shape: ModelShape, save_dir: Path | None) -> None:
        import wandb

        id_file = save_dir / "wandb_run_id" if save_dir else None
        run_id = id_file.read_text().strip() if id_file and id_file.exists() else secrets.token_hex(8)
        if id_file:
            id_file.write_text(run_id)
        config = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str | bool)}
        try:
            self._run = wandb.init(
                project=args.wandb_project,
                name=args.wandb_run_name,
                id=run_id,
                resume="allow",
                dir=save_dir,
                config={**config, **shape.as_dict()},
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


def clock(seconds: float) -> str:
    """Seconds as 1d 02:03:04 or 0:03:04."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d {hour:02}" if days else f"{hour}") + f":{minute:02}:{second:02}"


def _finite(record: dict) -> dict:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
