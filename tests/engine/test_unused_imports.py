"""A rank on the CPU trains without importing what it does not use, which stays available."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from conftest import ROOT

FIXTURES = ROOT / "tests/fixtures"
TRAIN = f"""
import sys
sys.path[0] = {str(ROOT)!r}
from megatron_ft.finetune import main
main(sys.argv[2:])
print("imported:", *sorted(set(sys.argv[1].split(",")) & set(sys.modules)))
import torch
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert torch._dynamo.eval_frame is sys.modules["torch._dynamo.eval_frame"]
from torch.distributed.checkpoint import default_planner
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.cpp_extension import load_inline
assert default_planner and fully_shard and load_inline
print("available")
"""
COMPILER = ("torch._dynamo.eval_frame", "torch._inductor")
OTHERS = ("sympy", "tensorboard", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor")


def train(tmp_path, unused, flags):
    """The last lines of a rank that trains the preset tiny: what it imported of `unused`."""
    flags = f"--preset tiny --from-scratch --seq-length 256 --train-iters 2 {flags}"
    files = {"data-prefix": FIXTURES / "data", "tokenizer-file": FIXTURES / "tokenizer.json"}
    files |= {"data-cache-path": tmp_path}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-c", TRAIN, ",".join(unused), *flags.split(), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


def test_rank_trains_and_saves_without_importing_the_compiler(tmp_path):
    flags = f"--recompute-granularity full --save {tmp_path / 'run'}"
    assert train(tmp_path, COMPILER, flags) == ["imported:", "available"]


@pytest.mark.skipif(not version("megatron-core").startswith("0.16."), reason="newer Megatron-Core needs them")
def test_rank_trains_without_importing_unused_features(tmp_path):
    assert train(tmp_path, (*COMPILER, *OTHERS, "torch.utils.cpp_extension"), "") == ["imported:", "available"]


def test_functions_are_not_compiled_within_the_block():
    from megatron_ft.engine.unused_imports import leave_functions_as_they_are

    before = torch.compile
    with leave_functions_as_they_are():

        @torch.compile(dynamic=True)
        def double(x):
            return 2 * x

        assert torch.compile(test_functions_are_not_compiled_within_the_block).__name__.startswith("test_functions")
        assert double.__module__ == __name__ and double(2) == 4
    assert torch.compile is before
