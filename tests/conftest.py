"""What many tests need: where the checkout and the reference data are, and how to run a program as a user does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # reference data made by the original branch; tests that need it skip without it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: programs under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of the branch's reference data."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("reference data of the mtf branch (../shared/golden) is not here")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory with StarCoder's tokenizer and real instruction rows."""
    if not (SHARED / "data").is_dir():
        pytest.skip("StarCoder's tokenizer and real rows (../shared/data) are not here")
    return SHARED / "data"


def run_program(*command: str | Path, ok: bool = True, cwd: Path | str = "/", **kwargs) -> subprocess.CompletedProcess:
    """Run `python <program> <args>` (program relative to the checkout) from another directory; text output captured."""
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
    """The single line that a user's mistake must end in: status not 0, no traceback."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]
