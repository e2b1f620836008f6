"""What many tests need: the reference data, and a program run as a user runs it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # data of others that may not be shipped; tests/fixtures holds what may
KEPT_BY_MAINTAINERS = "kept by the maintainers; nothing to do"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# In the background SIGINT is ignored, after nohup SIGHUP; programs under test would inherit that.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, default)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of what the mtf branch computed: data, checkpoints, training steps."""
    return reference_data("golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory with StarCoder's tokenizer and real instruction rows."""
    return reference_data("data")


def reference_data(folder: str) -> Path:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"../shared/{folder} is {KEPT_BY_MAINTAINERS}")
    return SHARED / folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests were skipped because their reference data is not shipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(KEPT_BY_MAINTAINERS in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} tests skipped: they need reference data that is {KEPT_BY_MAINTAINERS}")


def run_program(*command: str | Path, ok: bool = True, cwd: Path | str = "/", **kwargs) -> subprocess.CompletedProcess:
    """Run a program from another directory and capture its output as text.

    `command`: the program, a path in the checkout or a module's name, and its arguments.
    `ok`: the exit status must be 0.
    """
    program, *args = map(str, command)
    where = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    done = subprocess.run(
        [sys.executable, *where, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=kwargs.pop("timeout", 300),
        **kwargs,
    )
    if ok:
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def one_error_line(done: subprocess.CompletedProcess) -> str:
    """The single line a usage error must end with: status not 0, no traceback."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]
