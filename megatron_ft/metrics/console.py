"""Console output of a run: a banner, one line per --log-interval steps, and a progress bar.

A line fits 120 columns and has fewer on a narrower terminal; metrics.jsonl has all numbers. The bar
is shown only on a terminal, below the lines.
"""

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tqdm import tqdm

from megatron_ft.config.config import Config
from megatron_ft.metrics.model_facts import ModelFacts
from megatron_ft.model import cost
from megatron_ft.printable import printable

LINE_WIDTH = 120
SEPARATOR = " | "


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The length of a run and the iteration it starts or resumes from.

    `device_name`: torch.cuda.get_device_name(), None on a CPU.
    """

    train_iters: int
    start_iteration: int = 0
    train_samples: int | None = None
    sequences_per_epoch: int | None = None
    device_name: str | None = None


@dataclass(frozen=True)
class Column:
    """A column of a log line; the most important have rank 0 and stay on a narrow terminal."""

    rank: int
    text: str


class Console:
    """Prints on the rank that logs. `gpu` is None on a CPU and for an unknown device."""

    def __init__(
        self,
        config: Config,
        model: ModelFacts,
        plan: RunPlan,
        layout: cost.Layout,
        gpu: cost.Gpu | None,
    ) -> None:
        self.config, self.model, self.plan, self.layout, self.gpu = config, model, plan, layout, gpu
        self._interval: list[dict] = []
        self._bar: tqdm | None = None

    def banner(self, part: int, facts: Mapping[str, str]) -> None:
        """Print model, layout, device, memory, length and `facts`, and start the progress bar.

        Each fact has one or more lines. `part` counts resumes.
        """
        lines = [("model", self.model.summary()), ("layout", str(self.layout)), ("precision", self._precision())]
        lines += [
            ("device", self.plan.device_name or "CPU"),
            ("memory", self.model.memory(self.gpu)),
            ("training", self._training(part)),
        ]
        lines += [(name.replace("_", " "), text) for name, text in facts.items()]
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            for number, line in enumerate(text.split("\n")):
                self.print(f"{'' if number else name:>{width}} | {line}")
        if sys.stderr.isatty() and not self.config.validation.skip_train:
            self._bar = tqdm(
                total=self.plan.train_iters,
                initial=self.plan.start_iteration,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.1,
            )

    def step(self, record: dict) -> None:
        """Add a step's record, with the keys of metrics.jsonl; print a line per interval."""
        self._interval.append(record)
        if self._bar is not None:
            loss = "none" if record["loss"] is None else f"{record['loss']:.4f}"
            with self._terminal():
                self._bar.set_postfix_str(f"loss {loss}, {record['tokens_per_second']:,.0f} tokens/s", refresh=False)
                self._bar.update(record["iteration"] - self._bar.n)
        if record["iteration"] % self.config.logging.interval == 0 or record["iteration"] == self.plan.train_iters:
            self.print(self._interval_line())
            self._interval.clear()

    def print(self, text: str) -> None:
        """Print a line, or several, above the bar if there is one."""
        text = printable(text, limit=None, keep="\n")
        with self._terminal():
            if self._bar is not None:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def close(self) -> None:
        """Finish the bar."""
        with self._terminal():
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    @contextlib.contextmanager
    def _terminal(self) -> Iterator[None]:
        """Let the run continue without output after its terminal or pipe was closed; the log files
        contain the same."""
        try:
            yield
        except OSError:
            if self._bar is not None:
                self._bar.disable = True
                self._bar = None
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # for the rest of the process

    # --- banner ---

    def _precision(self) -> str:
        optimizer = f"{self.config.optimizer.name}{' on the CPU' if self.config.optimizer.cpu_offload else ''}"
        return f"{self.layout.precision}, {optimizer}, peak lr {self.config.schedule.lr:g} ({self.config.schedule.decay_style})"

    def _training(self, part: int) -> str:
        plan, config = self.plan, self.config
        if config.validation.skip_train:
            return "evaluation only"
        tokens = config.training.global_batch_size * config.data.seq_length
        line = f"{plan.train_iters:,} steps of {config.training.global_batch_size} sequences x {config.data.seq_length:,} tokens ({tokens:,})"
        if plan.sequences_per_epoch:
            samples = plan.train_samples or plan.train_iters * config.training.global_batch_size
            line += f", {samples / plan.sequences_per_epoch:.2f} epochs of {plan.sequences_per_epoch:,} sequences"
        if plan.start_iteration:
            line += f"; {plan.start_iteration:,} done earlier (start {part + 1})"
        return line

    # --- the line of an interval of steps ---

    def _interval_line(self) -> str:
        """The columns, in order, as far as the most important of them fit the terminal."""
        columns = self._columns()
        room = line_width()
        shown: list[Column] = []
        for column in sorted(columns, key=lambda column: column.rank):
            if room >= len(column.text) or not shown:
                room -= len(column.text) + len(SEPARATOR)
                shown.append(column)
        return SEPARATOR.join(column.text for column in columns if column in shown)

    def _columns(self) -> list[Column]:
        steps, last, total = self._interval, self._interval[-1], self.plan.train_iters
        seconds = sum(record["step_seconds"] for record in steps)
        mean = {
            key: sum(values) / len(values)
            for key in ("loss", "grad_norm", "fill_rate")
            if (values := [record[key] for record in steps if record[key] is not None])
        }
        tokens, tflops = (
            sum(record[key] * record["step_seconds"] for record in steps) / seconds
            for key in ("tokens_per_second", "tflops_per_gpu")
        )
        positions = sum(record["global_batch_size"] for record in steps) * self.config.data.seq_length
        learned = sum(record["loss_tokens"] for record in steps) / positions
        columns = [
            Column(0, f"iteration {last['iteration']:>{len(f'{total:,}')},}/{total:,}"),
            Column(1, f"loss {mean['loss']:>7.4f}" if "loss" in mean else "loss    none"),
            Column(4, f"lr {last['lr']:.2e}"),
            Column(5, f"norm {mean['grad_norm']:>6.3f}" if "grad_norm" in mean else "norm   none"),
            Column(3, f"{tokens:>7,.0f} tok/s"),
        ]
        if self.gpu:
            columns.append(Column(7, f"MFU {100e12 * tflops / self.gpu.peak_flops(self.layout.precision):>4.1f}%"))
        elif self.plan.device_name:
            columns.append(Column(7, f"{tflops:>6.1f} TFLOP/s"))
        if self.config.precision.fp16:
            columns.append(Column(6, f"scale 2^{math.log2(last['loss_scale']):<2g}"))
        if last["memory_bytes"]:
            columns.append(Column(8, f"{last['memory_bytes'] / cost.GIB:>4.1f} GiB"))
        columns += [Column(9, f"fill {mean['fill_rate']:>4.0%}"), Column(10, f"in loss {learned:>4.0%}")]
        columns += [
            Column(2, f"{name.split('_')[0]} {last[name]}") for name in ("skipped_iterations", "spikes") if last[name]
        ]
        return [*columns, Column(2, f"ETA {clock((total - last['iteration']) * seconds / len(steps)):>8}")]


def line_width() -> int:
    """Characters of a log line: LINE_WIDTH, or those of a narrower terminal."""
    return min(LINE_WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else LINE_WIDTH


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, from a day on as days, hours and minutes.

    >>> clock(93784), clock(184)
    ('1d 02:03', '0:03:04')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}" if days else f"{hour}:{minute:02}:{second:02}"
