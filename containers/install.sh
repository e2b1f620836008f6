#!/usr/bin/env bash
# Install Megatron-FT and its dependencies into NVIDIA's PyTorch image, keeping what the image has.
#
#     bash containers/install.sh [WHEELS]
#
# The image's torch is built for its CUDA, NCCL and Transformer Engine; a wheel from PyPI in its
# place would break these. So torch and triton are never installed, torch's version is a constraint
# for everything else, next to the image's own (PIP_CONSTRAINT), and a change of it is an error.
# WHEELS is a wheelhouse, a folder of the checkout, for builds without network.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels="${1:-}"
pip=(python -m pip install --no-cache-dir --disable-pip-version-check)
if [ -n "$wheels" ]; then
  [ -d "$wheels" ] || { echo "error: $wheels: no such folder of wheels in $PWD" >&2; exit 2; }
  export PIP_NO_INDEX=1 PIP_FIND_LINKS="$wheels"
fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

version() { python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; }
version >"$scratch/image.txt"
"${pip[@]}" --constraint "$scratch/image.txt" setuptools wheel pybind11
"${pip[@]}" --no-deps --no-build-isolation .
python containers/requirements.py >"$scratch/requirements.txt"
# Dependencies that need torch find the image's; --no-deps for Megatron-Core, which asks for triton.
grep '^megatron-core' "$scratch/requirements.txt" >"$scratch/core.txt"
grep -v '^megatron-core' "$scratch/requirements.txt" >"$scratch/others.txt"
"${pip[@]}" --no-deps --requirement "$scratch/core.txt"
"${pip[@]}" --constraint "$scratch/image.txt" --requirement "$scratch/others.txt"
[ "$(version)" = "$(cat "$scratch/image.txt")" ] ||
  { echo "error: torch of the image was replaced by $(version), expected $(cat "$scratch/image.txt")" >&2; exit 1; }
megatron-ft --version
