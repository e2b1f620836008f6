#!/usr/bin/env bash
# Download the wheels that containers/install.sh installs, in NVIDIA's image on a machine with internet.
#
#     bash containers/download.sh WHEELS
set -euo pipefail
cd "$(dirname "$0")/.."
wheels="${1:?expected the folder for the wheels, like: bash containers/download.sh wheels}"
mkdir -p "$wheels"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$scratch/image.txt"
pip=(python -m pip download --disable-pip-version-check --dest "$wheels")
"${pip[@]}" --constraint "$scratch/image.txt" setuptools wheel pybind11
python -m pip install --disable-pip-version-check --constraint "$scratch/image.txt" setuptools wheel pybind11
python -m pip wheel --no-deps --no-build-isolation --wheel-dir "$scratch" .
python -m pip install --no-deps --disable-pip-version-check "$scratch"/megatron_ft-*.whl
python containers/requirements.py >"$scratch/requirements.txt"
grep '^megatron-core' "$scratch/requirements.txt" >"$scratch/core.txt"
grep -v '^megatron-core' "$scratch/requirements.txt" >"$scratch/others.txt"
"${pip[@]}" --no-deps --requirement "$scratch/core.txt"
"${pip[@]}" --constraint "$scratch/image.txt" --requirement "$scratch/others.txt"
