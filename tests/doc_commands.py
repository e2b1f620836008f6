"""Runs the commands of a documentation page, so that every command shown is known to work."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("dataset", "preprocess", "launch", "convert", "evaluation", "bench", "slurm", "examples")


def commands_of(page: Path) -> list[str]:
    """The ```bash blocks of a Markdown page, in order."""
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def run_page(name: str, directory: Path, *, timeout: float = 600, **env: str) -> str:
    """Run every bash block of docs/<name> in `directory`, in order, and return the output.

    `python` is the interpreter of the tests. The programs' folders are linked into `directory`,
    since pages refer to programs by their path in the checkout, like `preprocess/tokenize.py`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for folder in LINKED:
        link = directory / folder
        if not link.exists():
            link.symlink_to(ROOT / folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = ""
    blocks = commands_of(ROOT / "docs" / name)
    assert blocks, f"docs/{name} has no commands"
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=directory,
            env={**os.environ, "PATH": path, "ROOT": str(ROOT), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        printed += done.stdout
        assert done.returncode == 0, f"docs/{name}: this block exited with {done.returncode}:\n{block}\n{done.stdout}"
    return printed
