"""containers/: hadolint finds nothing, both recipes use one pinned image and keep its torch."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CONTAINERS = ROOT / "containers"
DOCKERFILE = (CONTAINERS / "Dockerfile").read_text()
PINNED = r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3"


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_hadolint_finds_nothing():
    done = subprocess.run([tool("hadolint"), CONTAINERS / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck_finds_nothing():
    done = subprocess.run([tool("shellcheck"), CONTAINERS / "install.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_both_recipes_start_from_the_same_pinned_image():
    [base] = re.findall(r"^FROM (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    [other] = re.findall(r"^From: (\S+)$", (CONTAINERS / "megatron-ft.def").read_text(), flags=re.MULTILINE)
    assert re.fullmatch(PINNED, base) and other == base
    assert base in (ROOT / "docs/containers.md").read_text()


FAKE_PYTHON = """#!/usr/bin/env bash
# Records what pip is asked for; every other call is the real Python's.
if [ "$1 $2" = "-m pip" ]; then
  echo "$* ${PIP_NO_INDEX:+from $PIP_FIND_LINKS}" >>"$PIP_LOG"
  for word in "$@"; do [[ $word == */others.txt ]] && cp "$word" "$PIP_LOG.requirements"; done
  [[ "$*" == *"$BREAK_AT"* ]] && echo 9.9.9 >"$PIP_LOG.torch"
  exit 0
fi
if [[ "$*" == *'version("torch")'* ]]; then
  echo "torch==$(cat "$PIP_LOG.torch")"
  exit 0
fi
exec {python} "$@"
"""


def install(tmp_path, *words, break_at="nothing does"):
    """Run install.sh with a pip that only records; the words of each call of pip."""
    for name, text in (("python", FAKE_PYTHON.replace("{python}", sys.executable)), ("megatron-ft", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    (tmp_path / "log.torch").write_text("2.8.0a0+image\n")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PIP_LOG": str(log), "BREAK_AT": break_at}
    done = subprocess.run(
        ["bash", CONTAINERS / "install.sh", *words], env=env, capture_output=True, text=True, timeout=60
    )
    return done, log.read_text().splitlines() if log.exists() else []


def test_torch_of_the_image_is_neither_asked_for_nor_replaced(tmp_path):
    done, calls = install(tmp_path)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "log.requirements").read_text().split()
    assert {"transformers>=5", "matplotlib"} <= set(asked), "the second is of an extra"
    assert not {re.match(r"[\w-]+", line)[0] for line in asked} & {"torch", "triton", "megatron-core", "pytest"}
    for call in calls:
        assert "--no-deps" in call or "--constraint" in call, call
        assert "--no-cache-dir" in call
    done, _ = install(tmp_path, break_at="others.txt")
    assert done.returncode == 1 and "torch of the image was replaced by torch==9.9.9" in done.stderr


def test_with_a_wheelhouse_nothing_is_downloaded(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    done, calls = install(tmp_path, wheels)
    assert done.returncode == 0, done.stderr
    assert len(calls) == 4 and all(call.endswith(f" from {wheels}") for call in calls)
    assert not any(" from " in call for call in install(tmp_path)[1][4:])


def test_a_wheelhouse_that_does_not_exist_is_refused(tmp_path):
    done, calls = install(tmp_path, "no-wheels")
    assert done.returncode == 2 and "no-wheels: no such folder of wheels" in done.stderr and calls == []
