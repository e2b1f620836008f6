"""Complete runs on one GPU: the CPU's losses, resuming, and the optimizer in host memory."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_program
from token_files import write_documents

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.slow,
]
CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> list[str]:
    """Flags of all runs: a model of starcoderbase-1b's width with two layers, made-up documents."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    root = tmp_path_factory.mktemp("gpu")
    torch.manual_seed(0)
    config = GPTBigCodeConfig(n_layer=2, n_embd=2048, n_head=16, n_inner=8192, n_positions=8192, vocab_size=49152)
    GPTBigCodeForCausalLM(config).save_pretrained(root / "model")
    draw = np.random.default_rng(0)
    lengths = draw.integers(20, 400, (200, 2))
    prefix = write_documents(root / "rows", [tuple(list(draw.integers(1, 49152, n)) for n in pair) for pair in lengths])
    tokenizer = Path(__file__).parents[1] / "fixtures/tokenizer.json"
    return [
        *f"--load {root}/model --tokenizer-file {tokenizer} --data-prefix {prefix} --seq-length 1024".split(),
        *f"--data-cache-path {root}/cache --global-batch-size 4 --micro-batch-size 2 --lr 1e-4 --log-interval 1".split(),
        *"--hidden-dropout 0 --attention-dropout 0 --eval-interval 0".split(),
    ]


def steps(common: list[str], save: Path, flags: str, **kwargs) -> list[dict]:
    """The lines of metrics.jsonl after a run."""
    run_program("launch/finetune.py", *common, "--save", save, *flags.split(), timeout=900, **kwargs)
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines]


def test_losses_in_bf16_equal_the_cpus_in_fp32(common, tmp_path):
    """2e-2: bf16 keeps 8 bits of weights and activations, and a random model has losses of 11."""
    expected = steps(common, tmp_path / "cpu", "--train-iters 2", env=CPU)
    found = steps(common, tmp_path / "gpu", "--train-iters 2 --bf16")
    assert losses(found) == pytest.approx(losses(expected), abs=2e-2)
    in_fp32 = steps(common, tmp_path / "fp32", "--train-iters 2")
    assert losses(in_fp32) == pytest.approx(losses(expected), abs=2e-3)


def test_the_compiled_kernel_of_the_exact_gelu_has_the_cpus_losses(common, tmp_path):
    expected = steps(common, tmp_path / "cpu", "--train-iters 2 --activation gelu", env=CPU)
    found = steps(common, tmp_path / "gpu", "--train-iters 2 --activation gelu")
    assert losses(found) == pytest.approx(losses(expected), abs=2e-3)


def test_a_stopped_run_resumes(common, tmp_path):
    """1e-3: the backward pass of flash attention adds in no fixed order."""
    whole = steps(common, tmp_path / "whole", "--train-iters 6 --bf16")
    flags = "--train-iters 6 --bf16 --exit-interval 3"
    run_program("launch/finetune.py", *common, "--save", tmp_path / "stopped", *flags.split(), ok=False, timeout=900)
    resumed = steps(common, tmp_path / "stopped", "--train-iters 6 --bf16")
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-3)
    norms = [[line["grad_norm"] for line in lines] for lines in (resumed, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


def test_the_optimizer_may_live_in_host_memory(common, tmp_path):
    on_gpu = steps(common, tmp_path / "gpu", "--train-iters 3 --bf16")
    on_host = steps(common, tmp_path / "host", "--train-iters 3 --bf16 --optimizer-cpu-offload")
    assert losses(on_host) == pytest.approx(losses(on_gpu), abs=1e-3)
    assert on_host[-1]["memory_bytes"] < 0.7 * on_gpu[-1]["memory_bytes"]


def test_dropout_runs_in_flash_attention(common, tmp_path):
    found = steps(common, tmp_path / "dropout", "--train-iters 2 --bf16 --hidden-dropout 0.1 --attention-dropout 0.1")
    assert all(9 < loss < 13 for loss in losses(found))
