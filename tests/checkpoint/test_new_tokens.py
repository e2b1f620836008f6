"""Tokens added to the tokenizer: full training starts them at the mean row, LoRA refuses them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_runs import FLAGS, LAYOUTS, train, write_inputs
from conversions import convert, tiny_hf
from ranks import run_ranks

from megatron_ft.model.shape import ModelShape, padded_vocab_size
from megatron_ft.model.tensor_names import EMBEDDING, OUTPUT_LAYER, VOCABULARY, tensor_shape
from megatron_ft.weights.open import open_weights
from megatron_ft.weights.source import WeightSource

SHAPE = ModelShape(num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=64, vocab_size=40)
# Of the source's 40 rows, 3 are padding; the run has 10 tokens more than the source.
KNOWN, TOKENS = 37, 47


class Source(WeightSource):
    """A random model whose last rows are padding, to be left out of the mean."""

    kind, path, shape, vocab_size, dtype = "random", Path("random"), SHAPE, KNOWN, torch.float32

    def pieces(self, name: str) -> tuple[int, list[torch.Tensor]]:
        whole = torch.randn(tensor_shape(SHAPE, name), generator=torch.Generator().manual_seed(len(name)))
        if name in VOCABULARY:
            whole[KNOWN:] = 1000
        return 0, [whole]


class UntiedSource(Source):
    """One with an output layer of its own."""

    shape = replace(SHAPE, untie_embeddings_and_output_weights=True)


def fill(tp: int, pp: int, source: WeightSource) -> tuple[list, int, list[str]]:
    """This rank's last table of the vocabulary after loading, its tensor-parallel rank, the lines
    of the report."""
    from megatron.core import parallel_state

    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.config.config import Config
    from megatron_ft.config.flags import Parallel
    from megatron_ft.engine import device, parallel
    from megatron_ft.engine.model import build_model

    device.set_up_device()
    config = Config(parallel=Parallel(tensor=tp, pipeline=pp, world_size=tp * pp)).with_flags(global_batch_size=1)
    parallel.initialize(config)
    [model] = build_model(config, source.shape, padded_vocab_size(TOKENS, 16, tp))
    report = load_weights(source, [model], TOKENS)
    untied = source.shape.untie_embeddings_and_output_weights
    rows = model.output_layer.weight if untied else model.shared_embedding_or_output_weight()
    return rows.tolist(), parallel_state.get_tensor_model_parallel_rank(), report.lines()


def test_new_tokens_start_at_the_mean_row_in_every_layout():
    source = Source().read(EMBEDDING)
    for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2)):
        ranks = run_ranks(fill, tp * pp, tp, pp, Source())
        for stage in range(pp):
            found = torch.tensor(sum((rows for rows, _, _ in ranks[stage * tp : stage * tp + tp]), []))
            assert torch.equal(found[:KNOWN], source[:KNOWN])
            mean = source[:KNOWN].double().mean(0).float()
            torch.testing.assert_close(found[KNOWN:TOKENS], mean.expand(TOKENS - KNOWN, -1), atol=1e-7, rtol=1e-6)
            assert not found[TOKENS:].any()
            if (tp, pp, stage) == (1, 1, 0):
                expected = found[:TOKENS]
            assert torch.equal(found[:TOKENS], expected)  # bit for bit
        padding = padded_vocab_size(TOKENS, 16, tp) - TOKENS
        lines = ranks[0][2]
        assert lines[1].startswith("10 new tokens without weights in the checkpoint")
        assert lines[2].startswith(f"{padding} rows of vocabulary padding"), lines


def test_an_untied_output_layer_gets_the_new_tokens_as_well():
    source = UntiedSource().read(OUTPUT_LAYER)
    ranks = run_ranks(fill, 2, 2, 1, UntiedSource())
    found = torch.tensor(sum((rows for rows, _, _ in ranks), []))
    assert torch.equal(found[:KNOWN], source[:KNOWN]) and not found[TOKENS:].any()
    mean = source[:KNOWN].double().mean(0).float()
    torch.testing.assert_close(found[KNOWN:TOKENS], mean.expand(TOKENS - KNOWN, -1), atol=1e-7, rtol=1e-6)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> str:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def with_new_tokens(words: str, folder: Path, count: int) -> str:
    """The same flags with `count` tokens added to the tokenizer."""
    old = words.split("--tokenizer-file ")[1]
    spec = json.loads(Path(old).read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] += [{"id": 257 + i, "content": f"<new_{i}>", **flags} for i in range(count)]
    (folder / "more.json").write_text(json.dumps(spec))
    return words.replace(old, str(folder / "more.json"))


def start(words: str, load: Path, save: Path, more: str, layout: str = "1") -> tuple[int | str, str]:
    ranks, flags = LAYOUTS[layout]
    command = (
        f"{FLAGS.replace('--from-scratch', '')} {flags} {words} --load {load} --save {save} {more} --train-iters 2"
    )
    results = run_ranks(train, ranks, command.split())
    return results[0][0], "\n".join(results[0][1])


def test_lora_refuses_tokens_that_the_base_has_no_weights_for(inputs, tmp_path):
    more = with_new_tokens(inputs, tmp_path, 3)
    base = tmp_path / "base"
    [(ended, _)] = run_ranks(train, 1, f"{FLAGS} {inputs} --save {base} --train-iters 2".split())
    assert ended == 0 and open_weights(base).shape.vocab_size == 272  # the new ids would fit into the padding

    refused, _ = start(more, base, tmp_path / "lora", "--lora-rank 2")
    for part in ("--lora-rank 2", "has 260 tokens", "has weights for 257", "3 new tokens", "leave --lora-rank out"):
        assert part in refused, refused
    assert not list((tmp_path / "lora").glob("iter_*"))
    assert start(inputs, base, tmp_path / "same", "--lora-rank 2")[0] == 0

    ended, log = start(more, base, tmp_path / "full", "", "TP2")
    assert ended == 0 and ": 3 new tokens without weights in the checkpoint" in log
    convert("megatron_to_hf", "--load", tmp_path / "full", "--output", tmp_path / "hf")
    assert open_weights(tmp_path / "hf").shape.vocab_size == 260

    directory = tiny_hf(tmp_path / "small", vocab=250)
    narrow = "--preset tiny --num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 "
    words = FLAGS.replace(narrow, "").replace("--from-scratch", f"--load {directory}")
    command = f"{words} {inputs} --lora-rank 2 --train-iters 2 --save {tmp_path / 'x'}".split()
    [(refused, _)] = run_ranks(train, 1, command)
    assert "has 257 tokens" in refused and "has weights for 250" in refused
