"""What names and config.json tell is reported before torch is imported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MODEL = ROOT / "tests/fixtures/model"
RUN = """
import runpy, sys
sys.path[0], sys.argv = "", sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code, *sorted({"torch", "transformers", "safetensors"} & set(sys.modules)))
"""


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A model whose config.json is of another kind of model."""
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "bert"}')
    return tmp_path / "model"


TO_MEGATRON = "convert/hf_to_megatron.py --format torch_dist --save NEW --load"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{TO_MEGATRON} nowhere", "nowhere: no such directory"),
        (f"{TO_MEGATRON} DAMAGED", "bert"),
        (f"{TO_MEGATRON} {MODEL} --tensor-parallel 3", "--tensor-parallel 3"),
        (f"{TO_MEGATRON.replace('NEW', 'DAMAGED')} {MODEL}", "is not empty"),
        (f"convert/megatron_to_hf.py --output NEW --load {MODEL}", "a Hugging Face model already"),
        (f"convert/reshard.py --save NEW --tensor-parallel 2 --load {MODEL}", "use convert/hf_to_megatron.py"),
        (f"convert/verify.py {MODEL} DAMAGED", "bert"),
        ("convert/complete.py nowhere", "nowhere: no such directory"),
    ],
)
def test_error_is_reported_without_torch(command, message, damaged, tmp_path):
    words = command.replace("DAMAGED", str(damaged)).replace("NEW", str(tmp_path / "new")).split()
    done = subprocess.run([sys.executable, "-c", RUN, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == "2\n"  # the exit status, and no module
