"""The alarm when no sample comes."""

import re
import time

from conftest import run_program
from failing_server import serving
from generate_program import GENERATE, write_data

from megatron_ft.evaluation.stall import StallAlarm


def test_each_period_without_progress_logs_one_line(capsys):
    with StallAlarm("fixtests-js", 0.5 / 60, "see the log"):
        time.sleep(1.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) in (2, 3)
    assert re.fullmatch(r"fixtests-js: no new sample for 0\.00\d+ minutes; see the log", lines[0])


def test_progress_and_zero_keep_it_quiet(capsys):
    with StallAlarm("fixtests-js", 2 / 60, "see the log") as alarm, StallAlarm("other", 0, "never"):
        for _ in range(25):
            time.sleep(0.1)
            alarm.progressed()
    assert capsys.readouterr().err == ""


def test_a_server_that_does_not_answer_is_logged(tmp_path):
    data = write_data(tmp_path / "data")
    with serving(["late"]) as server:
        flags = ("--engine", "endpoint", "--endpoint", server.url, "--data", data, "--languages", "js")
        more = ("--tasks", "fixdocs", "--style", "octocoder", "--samples", "1", "--stall-minutes", "0.01")
        done = run_program(GENERATE, "served", *flags, *more, "--output", tmp_path / "out")
    assert re.search(r"^fixdocs-js: no new sample for 0\.01\d* minutes; see whether the server", done.stderr, re.M)
