"""The log of a run: each iteration once across resumes, aligned lines, sinks, and the report."""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import termios
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import ROOT

from megatron_ft.config.arguments import parse_args
from megatron_ft.errors import UserError
from megatron_ft.files.log_lines import read_lines
from megatron_ft.metrics.chart import POINTS, thin
from megatron_ft.metrics.console import RunPlan, clock
from megatron_ft.metrics.metrics import DETERMINISTIC_KEYS, TIMING_KEYS, MetricsLog, Spikes
from megatron_ft.metrics.model_facts import ShapeFacts
from megatron_ft.metrics.report import write_report
from megatron_ft.model.cost import flops_per_token


def training_config(tmp_path, *flags):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    words = (
        "--preset tiny --data-prefix d --train-iters 40 --global-batch-size 4 --log-interval 5 --seq-length 100".split()
    )
    return parse_args([*words, "--tokenizer-file", str(tokenizer), *flags])


def record(iteration, loss=None):
    return {
        "iteration": iteration,
        "consumed_samples": 4 * iteration,
        "consumed_tokens": 390 * iteration,
        "loss": 2.0 / iteration if loss is None else loss,
        "lr": 1e-4,
        "grad_norm": 1.5,
        "loss_scale": 1.0,
        "global_batch_size": 4,
        "loss_tokens": 100,
        "fill_rate": 0.975,
        "skipped_iterations": 0,
        "squared_lengths": 40_000,
        "step_seconds": 0.5,
    }


def run(config, save, first, last, **plan):
    log = MetricsLog(
        config, ShapeFacts(config, config.shape), RunPlan(train_iters=40, start_iteration=first - 1, **plan), save
    )
    log.banner(data="two prefixes", start="resume: iter_0000012\nlayout: was TP1, is TP2")
    for iteration in range(first, last + 1):
        log.step(record(iteration))
    return log


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def resumed(tmp_path, capsys):
    """(config, save directory, console output) of a run that was killed after step 17 and resumed
    from its checkpoint of step 12."""
    config, save = training_config(tmp_path), tmp_path / "run"
    killed = run(config, save, 1, 17)
    killed.validation(15, "all", {"loss": 1.0, "perplexity": 2.7, "token_accuracy": 0.5})
    with (save / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 18, "los')
    log = run(config, save, 13, 40)
    log.validation(40, "all", {"loss": 0.5, "perplexity": 1.6, "token_accuracy": 0.75})
    log.close()
    log.close()
    return config, save, capsys.readouterr().out


def test_resume_logs_every_iteration_once(resumed):
    _, save, _ = resumed
    steps = lines(save / "metrics.jsonl")
    assert [step["iteration"] for step in steps] == list(range(1, 41))
    assert [step["part"] for step in steps] == [0] * 12 + [1] * 28
    assert all(tuple(step) == DETERMINISTIC_KEYS + TIMING_KEYS for step in steps)
    assert [line["iteration"] for line in lines(save / "validation.jsonl")] == [40]
    assert [line["event"] for line in lines(save / "events.jsonl")] == ["start", "start"]


def test_resumed_run_logs_the_numbers_of_an_uninterrupted_one(resumed, tmp_path):
    config, save, _ = resumed
    run(config, tmp_path / "uninterrupted", 1, 40).close()
    ours, theirs = (
        [[step[key] for key in DETERMINISTIC_KEYS] for step in lines(directory / "metrics.jsonl")]
        for directory in (save, tmp_path / "uninterrupted")
    )
    assert ours == theirs


def test_throughput_counts_all_positions_and_the_flops_of_attention(resumed):
    config, save, _ = resumed
    step = lines(save / "metrics.jsonl")[0]
    assert step["tokens_per_second"] == 800
    assert step["tflops_per_gpu"] == pytest.approx(400 * flops_per_token(config.shape, 100.0) / 0.5 / 1e12)


def test_console_lines_are_aligned(resumed):
    _, _, shown = resumed
    assert "    start | resume: iter_0000012\n          | layout: was TP1, is TP2\n" in shown
    intervals = [line for line in shown.splitlines() if line.startswith("iteration")]
    assert len({len(line) for line in intervals}) == 1
    columns = [[match.start() for match in re.finditer(r"\|", line)] for line in intervals]
    assert all(positions == columns[0] for positions in columns)
    last = intervals[-1]
    assert "fill  98%" in last and "in loss  25%" in last and "ETA  0:00:00" in last and "scale" not in last


GPU = {"device_name": "NVIDIA H100 80GB HBM3"}
LARGE = {"iteration": 1_000, "memory_bytes": 41 << 30, "step_seconds": 0.001, "loss": 0.8123}


@pytest.mark.parametrize(
    ("terminal", "flags", "plan", "shown", "hidden"),
    [
        (None, (), GPU, "| loss 0.8123 | lr 1.00e-04 | norm 1.500 | 400,000 tok/s | MFU 3.6% | 41.0 GiB | ETA", "fill"),
        (None, ("--fp16",), GPU, "MFU 0.2% | scale 2^0 | ETA", "GiB"),
        (None, (), {}, "| 41.0 GiB | fill 98% | ETA", "MFU"),
        (80, (), GPU, "iteration 1,000/2,000 | loss 0.8123 | 400,000 tok/s | MFU 3.6% | ETA 0:00:01", "norm"),
        (20, (), GPU, "iteration 1,000/2,000", "loss"),
    ],
)
def test_log_lines_fit_the_terminal(tmp_path, monkeypatch, capsys, terminal, flags, plan, shown, hidden):
    if terminal:
        monkeypatch.setenv("COLUMNS", str(terminal))
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    config = training_config(tmp_path, *flags)
    log = MetricsLog(config, ShapeFacts(config, config.shape), RunPlan(train_iters=2_000, **plan), None)
    log.step({**record(1_000), **LARGE})
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= max(terminal or 120, len(shown))
    words = " ".join(line.replace("|", " | ").split())
    assert shown in words and hidden not in words


@pytest.mark.parametrize(
    ("flags", "name"), [("", "tiny"), ("--num-layers 2", "GPTBigCode"), ("--max-position-embeddings 200", "GPTBigCode")]
)
def test_banner_names_a_preset_only_for_its_shape(tmp_path, flags, name):
    config = training_config(tmp_path, *flags.split())
    counted = config.shape.num_parameters(2_048)
    assert ShapeFacts(config, config.shape).summary().startswith(f"{name}: {counted:,} parameters")


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, save = training_config(tmp_path, "--tensorboard-dir", str(tmp_path / "tb")), tmp_path / "run"
    run(config, save, 1, 17).close()
    log = run(config, save, 13, 40)
    log.validation(40, "all", {"loss": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tb"), purge_orphaned_data=True).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 41))
    assert [event.value for event in events.Scalars("validation/all/loss")] == [0.5]


def test_validation_replaces_one_of_the_same_group_and_iteration(tmp_path):
    config, save = training_config(tmp_path), tmp_path / "run"
    for loss in (1.0, 0.5):
        log = run(config, save, 13, 12)
        log.validation(12, "all", {"loss": 2 * loss})
        log.validation(12, "all", {"loss": loss})
        log.validation(12, "other", {"loss": loss})
        log.close()
    found = [(line["iteration"], line["group"], line["loss"]) for line in lines(save / "validation.jsonl")]
    assert found == [(12, "all", 0.5), (12, "other", 0.5)]


def test_report_draws_all_parts_without_external_resources(tmp_path):
    config, save = training_config(tmp_path), tmp_path / "run <1>"
    run(config, save, 1, 20)
    log = run(config, save, 11, 40, device_name="NVIDIA H100 80GB HBM3")
    log.validation(20, "held <out>", {"loss": 1.0})
    log.validation(40, "held <out>", {"loss": 0.25})
    log.close()
    page = (save / "report.html").read_text()

    class Reader(HTMLParser):
        curves, resumes = 0, 0

        def handle_starttag(self, tag, attrs):
            attrs = dict(attrs)
            assert tag not in ("script", "link", "img", "iframe")
            assert not {"src", "href", "onclick"} & set(attrs)
            if tag == "polyline":
                self.curves += 1
                xs = [float(pair.split(",")[0]) for pair in attrs["points"].split()]
                assert xs == sorted(xs)
            self.resumes += attrs.get("class") == "resume"

    reader = Reader()
    reader.feed(page)
    assert reader.curves == 6  # loss, its validation, lr, gradient norm, throughput, MFU
    assert reader.resumes == 5
    assert "http" not in page
    assert "held &lt;out&gt;" in page and "best 0.2500 at 40" in page and "40 in 2 parts" in page


def test_report_of_a_directory_without_steps_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no metrics.jsonl"):
        write_report(tmp_path)


def test_thinned_curves_keep_spikes_and_bounds():
    points = [(i, 1.0) for i in range(100_000)]
    points[54_321] = (54_321, 99.0)
    kept = thin(points)
    assert len(kept) <= POINTS and (54_321, 99.0) in kept
    assert kept == sorted(kept)


def test_nonfinite_losses_are_null_in_json(tmp_path, capsys):
    config, save = training_config(tmp_path), tmp_path / "run"
    log = MetricsLog(config, ShapeFacts(config, config.shape), RunPlan(train_iters=40), save)
    for iteration in range(1, 6):
        log.step({**record(iteration), "loss": None if iteration == 1 else float("nan"), "grad_norm": float("inf")})
    log.close()
    steps = [
        json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in (save / "metrics.jsonl").open()
    ]
    assert all(step["loss"] is None and step["grad_norm"] is None for step in steps)
    assert "loss    none" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_loses_lines_but_does_not_stop_the_run(tmp_path, capsys):
    config, save = training_config(tmp_path), tmp_path / "run"
    save.mkdir()
    log = MetricsLog(config, ShapeFacts(config, config.shape), RunPlan(train_iters=40), save)
    log.step(record(1))
    log.close()
    (save / "metrics.jsonl").rename(save / "real")
    (save / "metrics.jsonl").symlink_to("/dev/full")
    for iteration in range(2, 5):
        log.step(record(iteration))
    (save / "metrics.jsonl").unlink()
    with (save / "real").open("a") as file:
        file.write('{"iteration": 2, "cons')  # a line written in part
    (save / "real").rename(save / "metrics.jsonl")
    log.step(record(5))
    log.close()
    assert capsys.readouterr().out.count("lines are lost until there is free space again") == 1
    assert [step["iteration"] for step in read_lines(save / "metrics.jsonl")] == [1, 5]
    assert "5 in 1 part" in (save / "report.html").read_text()


def test_other_ranks_neither_write_nor_print(tmp_path, capsys):
    config = training_config(tmp_path)
    log = MetricsLog(config, ShapeFacts(config, config.shape), RunPlan(train_iters=40), tmp_path / "run", writes=False)
    log.banner(data="d")
    log.step(record(1))
    log.event("saved")
    log.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_spikes_are_counted_and_noise_is_not():
    spikes = Spikes()
    for i in range(100):
        spikes.add(2.0 + 0.05 * (i % 3))
    assert spikes.count == 0
    assert spikes.add(5.0) == 1
    assert spikes.add(2.05) == 1


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_continues_the_same_run_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, save = training_config(tmp_path, "--wandb-project", "p"), tmp_path / "run"
    run(config, save, 1, 10).close()
    first = (save / "wandb_run_id").read_text()
    run(config, save, 6, 12).close()
    assert (save / "wandb_run_id").read_text() == first
    assert len(list(save.glob(f"wandb/offline-run-*/run-{first}.wandb"))) == 2


def test_docs_list_every_key_in_order():
    keys = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/logs.md").read_text(), flags=re.MULTILINE)
    assert tuple(keys) == DETERMINISTIC_KEYS + TIMING_KEYS


ON_A_TERMINAL = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/metrics"]
from pathlib import Path
import test_metrics
test_metrics.run(test_metrics.training_config(Path({folder!r})), None, 1, 40).close()
"""


def test_progress_bar_on_a_terminal_shows_loss_speed_and_time_left(tmp_path):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    script = ON_A_TERMINAL.format(root=str(ROOT), folder=str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "120"}
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the child has closed the terminal
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert child.wait() == 0
    bar = shown.decode().replace("\r", "\n")
    assert re.search(r"100%\|.*40/40 \[\d\d:\d\d<\d\d:\d\d.*loss 0\.0500, 800 tokens/s", bar), bar
    assert len(re.findall("^iteration ", bar, re.MULTILINE)) == 8


def test_clock_counts_days_and_hours():
    assert clock(59) == "0:00:59" and clock(3723) == "1:02:03" and clock(90061) == "1d 01:01"
