"""Loss, gradients and logits on packed sequences equal transformers' with the same weights."""

import shutil
from pathlib import Path

import pytest
import torch
from engine_runs import differences_from_transformers, logits_of_shapes, random_batch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

LAYOUTS = {
    "one rank": (1, "--micro-batch-size 1"),
    "one rank, two sequences": (1, "--micro-batch-size 2"),
    "TP2": (2, "--micro-batch-size 2 --tensor-model-parallel-size 2"),
    "TP2, sequence parallel": (2, "--micro-batch-size 2 --tensor-model-parallel-size 2 --sequence-parallel"),
    "PP2": (2, "--micro-batch-size 2 --pipeline-model-parallel-size 2"),
    "TP4, recompute": (4, "--micro-batch-size 2 --tensor-model-parallel-size 4 --recompute-granularity full"),
    "TP2 PP2": (4, "--micro-batch-size 2 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}
GPT_BIGCODE_LAYOUTS = ("one rank", "one rank, two sequences", "TP2", "TP2, sequence parallel", "PP2")
WINDOW = 16  # of the tiny StarCoder2s; the documents have up to 100 tokens


def write_reference(directory: Path, num_sequences: int, to: Path) -> float:
    """Write the gradients and logits of transformers' model into the directory `to`.

    Returns the mean loss over target tokens. Each document is a separate input; the softmax has no
    padding columns.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch = random_batch(7, num_sequences, 256, 6, 1000)
    total = batch.loss_mask.sum()
    loss_sum = 0.0
    bounds = batch.cu_seqlens.tolist()
    tokens, labels, mask = (x.flatten() for x in (batch.tokens, batch.labels, batch.loss_mask))
    seen = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        logits = model(tokens[None, first:last]).logits[0]
        seen.append(logits.detach().clone())
        losses = torch.nn.functional.cross_entropy(logits[:, :1000], labels[first:last], reduction="none")
        loss = (losses * mask[first:last]).sum() / total
        loss.backward()
        loss_sum += loss.item()
    shutil.copytree(directory, to, ignore=shutil.ignore_patterns("model*"))
    save_file({name: p.grad for name, p in model.named_parameters()}, to / "model.safetensors")
    save_file({"logits": torch.cat(seen)}, to / "logits.safetensors")
    return loss_sum


def check(directory, golden, tmp_path, layouts) -> None:
    expected: dict[int, float] = {}
    for name in layouts:
        ranks, flags = LAYOUTS[name]
        count = int(flags.split()[1])
        reference = tmp_path / f"reference_{count}"
        if count not in expected:
            expected[count] = write_reference(directory, count, reference)
        arguments = (flags, directory, golden / "data/tokenizer.json", reference, 7)
        for loss, gradient_error, logit_error in run_ranks(differences_from_transformers, ranks, *arguments):
            assert loss == pytest.approx(expected[count], abs=1e-5), name
            assert gradient_error < 1e-5, name
            assert logit_error < 1e-5, name


def test_multi_query_equals_transformers_in_every_layout(golden, tmp_path):
    check(golden / "hf/hf_tiny", golden, tmp_path, GPT_BIGCODE_LAYOUTS)


def test_multi_head_equals_transformers(golden, tmp_path):
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(3)
    config = GPTBigCodeConfig(
        vocab_size=1024, n_positions=256, n_embd=64, n_layer=2, n_head=4, multi_query=False, initializer_range=0.1
    )
    GPTBigCodeForCausalLM(config).save_pretrained(tmp_path / "multi_head")
    check(tmp_path / "multi_head", golden, tmp_path, ("one rank", "TP2, sequence parallel"))


@pytest.fixture(scope="module")
def starcoder2(tmp_path_factory) -> dict[str, Path]:
    """Two random StarCoder2s of two key/value heads, with tied embeddings and untied."""
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    found = {}
    for name in ("tied", "untied"):
        torch.manual_seed(3)
        config = Starcoder2Config(
            vocab_size=1024, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, sliding_window=WINDOW, initializer_range=0.1,
            rope_parameters={"rope_type": "default", "rope_theta": 12345.6}, tie_word_embeddings=name == "tied",
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = Starcoder2ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases would be 0
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        found[name] = tmp_path_factory.mktemp("starcoder2") / name
        model.save_pretrained(found[name])
    return found


@pytest.mark.parametrize(
    ("embeddings", "layouts"),
    [
        ("tied", ["one rank", "TP2, sequence parallel"]),
        ("untied", ["PP2"]),
        pytest.param("tied", ["PP2", "TP4, recompute"], marks=pytest.mark.slow),
        pytest.param("untied", ["one rank", "TP2, sequence parallel", "TP2 PP2"], marks=pytest.mark.slow),
    ],
)
def test_starcoder2_equals_transformers(starcoder2, golden, tmp_path, embeddings, layouts):
    check(starcoder2[embeddings], golden, tmp_path, layouts)


def test_starcoder2_with_another_window_or_base_differs(starcoder2, golden, tmp_path):
    write_reference(starcoder2["tied"], 1, tmp_path / "reference")
    expected = load_file(tmp_path / "reference/logits.safetensors")["logits"].numpy()
    others = [{"window_size": WINDOW - 1}, {"window_size": WINDOW + 1}, {"window_size": 0}, {"rotary_base": 10000.0}]
    arguments = (starcoder2["tied"], golden / "data/tokenizer.json", [{}, *others], 7)
    [(same, *different)] = run_ranks(logits_of_shapes, 1, *arguments)
    assert abs(same - expected).max() < 1e-5
    for changes, logits in zip(others, different, strict=True):
        assert abs(logits - expected).max() > 0.01, changes
