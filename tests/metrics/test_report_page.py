"""report.html tells what a run was, and one page compares several runs."""

import re

import pytest
from conftest import one_error_line, run_program
from test_metrics import run, training_config

from megatron_ft.metrics.chart import SMOOTHED, Curve, chart


@pytest.fixture
def two_runs(tmp_path):
    """Save directories of two finished runs with different learning rates."""
    saves = []
    for name, rate in (("slow <1>", "1e-5"), ("fast", "3e-5")):
        save = tmp_path / "runs" / name
        config = training_config(tmp_path, "--lr", rate)
        log = run(config, save, 1, 40, device_name="NVIDIA H100 80GB HBM3")
        log.validation(40, "valid", {"loss": 0.5})
        log.close()
        saves.append(save)
    return saves


def test_page_tells_model_flags_data_device_peak_rate_and_speed(two_runs):
    page = (two_runs[1] / "report.html").read_text()
    assert "<title>Training report: runs/fast</title>" in page
    rows = dict(re.findall(r"<tr><th>([^<]+)<td>([^<]+)", page))
    assert rows["Model"].startswith("tiny: 1,") and rows["Device"] == "NVIDIA H100 80GB HBM3"
    assert rows["Data"] == "two prefixes" and rows["Layout"].startswith("TP 1")
    assert rows["Peak learning rate"] == "0.0001"  # of the steps' records
    assert rows["Mean throughput"] == "800 tokens/s"
    flags = re.search(r"Flags that were set</summary><pre>(.*?)</pre>", page, re.DOTALL)[1]
    assert "lr: 3.0e-05" in flags and "preset: tiny" in flags
    assert page.count(">optimizer step</text>") == page.count('<svg viewBox="0 0 860')
    for unit in ("loss per token", "tokens/s", "norm before clipping"):
        assert f">{unit}</text>" in page


def test_several_runs_are_overlaid_with_the_flags_in_which_they_differ(two_runs, tmp_path):
    done = run_program("launch/report.py", *two_runs, "--output", tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text()
    assert done.stdout == f"{tmp_path / 'both.html'}\n" and "slow <1>" not in page
    assert "<title>2 runs: slow &lt;1&gt;, fast</title>" in page
    differ = page[page.index("Flags that differ") : page.index("<h2>Loss")]
    assert re.findall("<tr><th>([^<]+)<td>([^<]+)<td>([^<]+)", differ) == [("lr", "1.0e-05", "3.0e-05")]
    for title, curves in (("Loss", 4), ("Throughput", 2)):
        section = page.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]
        assert section.split('<svg viewBox="0 0 860')[1].count("<polyline class") == curves
    assert not re.search(r"https?://|src=|<link|<script", page)


def test_report_of_a_directory_that_is_not_a_run_names_it(two_runs, tmp_path):
    line = one_error_line(run_program("launch/report.py", two_runs[0], tmp_path, ok=False))
    assert f"{tmp_path}: no metrics.jsonl with steps" in line


def test_page_goes_to_a_pipe_or_a_new_folder_and_never_over_a_folder(two_runs, tmp_path):
    assert run_program("launch/report.py", two_runs[0], "--output", "-").stdout.endswith("</html>\n")
    page = tmp_path / "new/page.html"
    assert run_program("launch/report.py", two_runs[0], "--output", page).stdout == f"{page}\n" and page.is_file()
    line = one_error_line(run_program("launch/report.py", two_runs[0], "--output", tmp_path, ok=False))
    assert f"{tmp_path}: cannot be written (Is a directory); choose another path" in line


def test_noisy_curves_are_smoothed_and_rates_are_not():
    points = [(step, float(step % 2)) for step in range(SMOOTHED)]
    for noisy, lines in ((True, 2), (False, 1)):
        drawn = re.findall(r'points="([^"]+)"', chart("Loss", "loss", [Curve("", points, noisy=noisy)]))
        assert len(drawn) == lines
    heights = [[float(pair.split(",")[1]) for pair in line.split()] for line in drawn]
    assert max(heights[0]) - min(heights[0]) > 200, "an unsmoothed curve reaches both edges"


def test_a_run_without_its_events_and_settings_still_has_a_page(two_runs):
    for name in ("events.jsonl", "config.yaml"):
        (two_runs[0] / name).unlink()
    page = run_program("launch/report.py", two_runs[0]).stdout
    assert page.endswith("report.html\n")
    assert "Flags that were set" not in (two_runs[0] / "report.html").read_text()
