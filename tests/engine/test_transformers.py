"""Loss and gradients on packed sequences equal transformers' GPTBigCode with the same weights."""

import shutil

import pytest
import torch
from engine_runs import loss_and_gradient_error, random_batch
from ranks import run_ranks
from safetensors.torch import save_file

LAYOUTS = {
    "one rank": (1, "--micro-batch-size 1"),
    "one rank, two sequences": (1, "--micro-batch-size 2"),
    "TP2": (2, "--micro-batch-size 2 --tensor-model-parallel-size 2"),
    "TP2, sequence parallel": (2, "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
}


def transformers_loss_and_gradients(directory, num_sequences: int):
    """The mean loss over target tokens of GPTBigCodeForCausalLM, and its gradients, by name.

    Each document is a separate input; the softmax has no padding columns.
    """
    from transformers import GPTBigCodeForCausalLM

    model = GPTBigCodeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch = random_batch(7, num_sequences, 256, 6, 1000)
    total = batch.loss_mask.sum()
    loss_sum = 0.0
    bounds = batch.cu_seqlens.tolist()
    tokens, labels, mask = (x.flatten() for x in (batch.tokens, batch.labels, batch.loss_mask))
    for first, last in zip(bounds, bounds[1:], strict=False):
        if mask[first:last].any():
            logits = model(tokens[None, first:last]).logits[0, :, :1000]
            losses = torch.nn.functional.cross_entropy(logits, labels[first:last], reduction="none")
            loss = (losses * mask[first:last]).sum() / total
            loss.backward()
            loss_sum += loss.item()
    return loss_sum, {n: p.grad for n, p in model.named_parameters() if not n.startswith("lm_head")}


def check(directory, golden, tmp_path, layouts: dict) -> None:
    expected = {}
    for count in (1, 2):
        expected[count], gradients = transformers_loss_and_gradients(directory, count)
        shutil.copytree(directory, tmp_path / f"gradients_{count}", ignore=shutil.ignore_patterns("model*"))
        save_file(gradients, tmp_path / f"gradients_{count}/model.safetensors")
    for name, (ranks, flags) in layouts.items():
        count = int(flags.split()[1])
        arguments = (flags, directory, golden / "data/tokenizer.json", tmp_path / f"gradients_{count}", 7)
        for loss, gradient_error in run_ranks(loss_and_gradient_error, ranks, *arguments):
            assert loss == pytest.approx(expected[count], abs=1e-5), name
            assert gradient_error < 1e-5, name


def test_multi_query_equals_transformers_in_every_layout(golden, tmp_path):
    check(golden / "hf/hf_tiny", golden, tmp_path, LAYOUTS)


def test_multi_head_equals_transformers(golden, tmp_path):
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(3)
    config = GPTBigCodeConfig(
        vocab_size=1024, n_positions=256, n_embd=64, n_layer=2, n_head=4, multi_query=False, initializer_range=0.1
    )
    GPTBigCodeForCausalLM(config).save_pretrained(tmp_path / "multi_head")
    layouts = {name: LAYOUTS[name] for name in ("one rank", "TP2, sequence parallel")}
    check(tmp_path / "multi_head", golden, tmp_path, layouts)
