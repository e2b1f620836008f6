"""A rank on the CPU trains without importing torch's compiler, which stays available."""

import subprocess
import sys

import torch
from conftest import ROOT

FIXTURES = ROOT / "tests/fixtures"
TRAIN = f"""
import sys
sys.path[0] = {str(ROOT)!r}
from megatron_ft.finetune import main
main(sys.argv[1:])
print("imported:", *sorted({{"torch._dynamo.eval_frame", "torch._inductor"}} & set(sys.modules)))
import torch
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert torch._dynamo.eval_frame is sys.modules["torch._dynamo.eval_frame"]
print("compiled")
"""


def test_rank_trains_and_saves_without_importing_the_compiler(tmp_path):
    flags = "--preset tiny --from-scratch --seq-length 256 --train-iters 2 --recompute-granularity full"
    files = {"data-prefix": FIXTURES / "data", "tokenizer-file": FIXTURES / "tokenizer.json"}
    files |= {"save": tmp_path / "run", "data-cache-path": tmp_path}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-c", TRAIN, *flags.split(), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["imported:", "compiled"]


def test_functions_are_not_compiled_within_the_block():
    from megatron_ft.engine.compiler import leave_functions_as_they_are

    before = torch.compile
    with leave_functions_as_they_are():

        @torch.compile(dynamic=True)
        def double(x):
            return 2 * x

        assert torch.compile(test_functions_are_not_compiled_within_the_block).__name__.startswith("test_functions")
        assert double.__module__ == __name__ and double(2) == 4
    assert torch.compile is before
