"""Runs the commands of a documentation page, so that no page can show one that fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commands_of(page: Path) -> list[str]:
    """The ```bash blocks of a Markdown page, in order."""
    return re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def run_page(name: str, directory: Path, *, timeout: float = 600, **env: str) -> str:
    """Run every bash block of docs/<name> in order in `directory`; `python` is the tests' own. Returns what was printed.

    A page that is read in the checkout writes paths like `preprocess/tokenize.py`: the programs' folders are linked there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for folder in ("dataset", "preprocess", "launch", "convert", "bench", "slurm", "examples"):
        link = directory / folder
        if not link.exists():
            link.symlink_to(ROOT / folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = ""
    blocks = commands_of(ROOT / "docs" / name)
    assert blocks, f"docs/{name} shows no command"
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
        assert done.returncode == 0, f"docs/{name}: this block ended with {done.returncode}:\n{block}\n{done.stdout}"
    return printed
