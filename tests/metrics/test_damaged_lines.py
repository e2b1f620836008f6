"""No line of a run's own files keeps it from resuming, or a finished run from ending well."""

import json
import os
from pathlib import Path

import pytest
from conftest import one_error_line, run_program
from test_metrics import record, run, training_config

from megatron_ft.errors import UserError
from megatron_ft.metrics.chart import nice_ticks
from megatron_ft.metrics.lines import EVENTS, METRICS, VALIDATION, read_log
from megatron_ft.metrics.metrics import MetricsLog
from megatron_ft.metrics.model_facts import ShapeFacts
from megatron_ft.metrics.report import write_report

DAMAGE = {
    "empty": b"\n",
    "null": b"null\n",
    "a number": b"5\n",
    "no keys": b"{}\n",
    "not UTF-8": b"\xff\xfe\n",
    "binary": bytes(range(256)) * 20 + b"\n",
    "nested": b'{"iteration": ' + b"[" * 50_000 + b"\n",
    "a long integer": b'{"iteration": ' + b"9" * 5000 + b"}\n",
    "NaN": b'{"iteration": NaN, "part": NaN, "time": NaN, "group": "all", "event": "start"}\n',
    "a string for a number": b'{"iteration": "3", "part": "1", "time": "now", "group": "all", "event": "start"}\n',
    "lists for numbers": b'{"iteration": 3, "loss": [], "part": [], "time": [], "group": [], "event": []}\n',
    "null for numbers": b'{"iteration": 3, "loss": null, "part": null, "time": null, "group": null, "event": null}\n',
    "true for numbers": b'{"iteration": 3, "loss": true, "part": true, "time": true, "group": "all", "event": "x"}\n',
    "few keys": b'{"iteration": 3, "group": "all", "event": "saved"}\n',
    "huge numbers": b'{"iteration": 3, "loss": 1e308, "lr": -1e308, "part": 1e300, "time": 1e300, "group": "g", "event": "e"}\n',
    "a negative iteration": b'{"iteration": -3, "loss": 1, "part": -1, "time": -1, "group": "all", "event": "start"}\n',
    "control characters": b'{"iteration": 3, "loss": 1, "part": 0, "time": 1, "group": "\\u001b[2J\\ud800", "event": "\\ud800\\n"}\n',
    "a very long line": b'{"iteration": 3, "event": "' + b"x" * (3 << 20) + b'"}\n',
    "truncated": b'{"iteration": 3, "lo',
}


@pytest.mark.parametrize("name", [METRICS, VALIDATION, EVENTS])
@pytest.mark.parametrize("line", DAMAGE.values(), ids=DAMAGE)
def test_a_run_resumes_and_reports_in_spite_of_a_damaged_line(tmp_path, name, line, capsys):
    config, save = training_config(tmp_path), tmp_path / "run"
    log = run(config, save, 1, 2)
    log.validation(2, "all", {"loss": 1.0})
    log.close()
    for path in (save / METRICS, save / VALIDATION, save / EVENTS):
        if path.name == name:
            path.write_bytes(line * line.endswith(b"\n") + path.read_bytes() + line)
    resumed = run(config, save, 3, 4)
    resumed.validation(4, "all", {"loss": 0.5})
    resumed.close()
    steps = [step for step in read_log(save, METRICS) if step["consumed_tokens"]]
    assert [step["iteration"] for step in steps] == [1, 2, 3, 4]
    assert [step["part"] for step in steps][-1] == 1 or name == EVENTS
    assert "warning" not in capsys.readouterr().out
    page = (save / "report.html").read_text("utf-8")
    assert "\x1b" not in page and "last 0.5000" in page


@pytest.mark.parametrize("name", [METRICS, VALIDATION, EVENTS])
def test_a_log_file_that_is_a_directory_stops_no_run(tmp_path, name, capsys):
    config, save = training_config(tmp_path), tmp_path / "run"
    (save / name).mkdir(parents=True)
    log = run(config, save, 1, 2)
    log.validation(2, "all", {"loss": 1.0})
    log.close()
    assert f"{name}: Is a directory" in capsys.readouterr().out
    assert read_log(save, name) == []


def test_a_report_that_cannot_be_written_is_one_warning_of_a_finished_run(tmp_path, capsys):
    config, save = training_config(tmp_path), tmp_path / "run \x1b[2J"
    (save / "report.html").mkdir(parents=True)
    run(config, save, 1, 2).close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "no report" in line]
    assert len(lines) == 1 and lines[0].isprintable()
    assert "Is a directory" in lines[0] and "python launch/report.py" in lines[0]
    line = one_error_line(run_program("launch/report.py", save, ok=False))
    assert "report.html: cannot be written" in line


def test_a_log_without_a_usable_line_gives_no_report_and_no_error(tmp_path, capsys):
    config, save = training_config(tmp_path), tmp_path / "run"
    log = MetricsLog(config, ShapeFacts(config, config.shape), run(config, None, 1, 0).plan, save)
    (save / METRICS).write_bytes(b"null\n{}\n")
    log.close()
    assert not (save / "report.html").exists()
    with pytest.raises(UserError, match="no metrics.jsonl with steps"):
        write_report(save)


def test_charts_have_ticks_for_every_range_of_numbers():
    for low, high in ((0.0, 5e-324), (-1e100, 1e100), (1.0, 1.0 + 2**-52), (0.0, 0.0)):
        assert 0 < len(nice_ticks(low, high)) < 50


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_at_the_report_is_one_warning(tmp_path, capsys):
    config, save = training_config(tmp_path), tmp_path / "run"
    log = run(config, save, 1, 2)
    os.symlink("/dev/full", save / ".report.html.new")
    log.close()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no report" in line]
    assert "No space left on device" in line and "free disk space" in line
    assert [json.loads(text)["iteration"] for text in (save / METRICS).read_text().splitlines()] == [1, 2]


def test_steps_after_a_damaged_last_step_are_counted_from_it(tmp_path):
    config, save = training_config(tmp_path), tmp_path / "run"
    run(config, save, 1, 2).close()
    lines = (save / METRICS).read_text().splitlines()
    changed = {**json.loads(lines[1]), "lr": "high", "loss": "low"}
    (save / METRICS).write_text(lines[0] + "\n" + json.dumps(changed) + "\n")
    log = MetricsLog(config, ShapeFacts(config, config.shape), run(config, None, 3, 2).plan, save)
    assert log.last_step and log.last_step["iteration"] == 2
    assert log.last_step["lr"] is None and log.last_step["loss"] is None
    log.step(record(3))
    log.close()
