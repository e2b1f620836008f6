"""LoRA: equal to PEFT, the same in every layout; only adapters are trained and saved."""

import json
import math

import numpy as np
import pytest
import torch
from checkpoint_runs import full_tensors
from ranks import run_ranks
from safetensors.torch import save_file

from megatron_ft.config.arguments import parse_args
from megatron_ft.errors import UserError
from megatron_ft.model.gpt_bigcode import GPT_BIGCODE
from megatron_ft.model.hf_names import hf_name
from megatron_ft.model.lora import AdapterConfig, merged, stacked_name
from megatron_ft.model.peft_tensors import hf_targets, to_peft
from megatron_ft.model.tensor_names import LORA_TARGETS
from megatron_ft.weights.open import open_weights

LENGTHS = [7, 20, 1, 12, 24]  # documents of two packed sequences, of 64 tokens together
FLAGS = """--num-layers 4 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 32 --seq-length 32
--micro-batch-size 2 --lora-rank 4 --lora-alpha 8 --lora-dropout 0 --train-iters 4 --data-prefix none --lr 0.02 --make-vocab-size-divisible-by 16"""
LAYOUTS = {
    "TP1": "",
    "TP2": "--tensor-model-parallel-size 2",
    "TP2 SP": "--tensor-model-parallel-size 2 --sequence-parallel",
    "TP4 recompute": "--tensor-model-parallel-size 4 --recompute-granularity full",
    "PP2 SP recompute": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --recompute-granularity full",
    "DP2": "--global-batch-size 4 --no-overlap-param-gather",  # `train_adapters` does not wait for it
}
WORLD = {"TP1": 1, "TP2": 2, "TP2 SP": 2, "TP4 recompute": 4, "PP2 SP recompute": 4, "DP2": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A saved random GPTBigCode of transformers, with a tokenizer file that is not read."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=4, n_head=4, n_inner=128,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.2,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("base")
    GPTBigCodeForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def flags_for(base, more):
    words = [*FLAGS.split(), "--hidden-dropout", "0", "--attention-dropout", "0", *more.split()]
    return [*words, "--tokenizer-file", str(base / "tokenizer.json")]


def start(words, base, world_size):
    """A frozen model with adapters on this rank; (config, chunks)."""
    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.engine.device import set_up_device
    from megatron_ft.engine.lora import add_lora
    from megatron_ft.engine.model import build_model
    from megatron_ft.engine.parallel import initialize
    from megatron_ft.weights.open import open_weights

    config = parse_args(words, world_size)
    set_up_device(config)
    initialize(config)
    chunks = build_model(config, config.shape.with_vocab(64), 64)
    add_lora(chunks, config)
    load_weights(open_weights(base), chunks)
    return config, chunks


def micro_batch(seed):
    """One micro-batch: tokens, labels, positions [1, 64], and the documents' bounds."""
    from megatron_ft.engine.packed_attention import PackedSequences

    tokens = torch.randint(64, (1, 65), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return tokens[:, :-1], tokens[:, 1:], positions, PackedSequences.from_cu_seqlens(bounds)


def train_adapters(words, base, world_size, save):
    """Four steps on every rank, then a checkpoint in `save`: losses and gradient norms."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ft.checkpoint.checkpointer import Checkpointer
    from megatron_ft.checkpoint.train_state import TrainState
    from megatron_ft.engine.model import wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.training.schedule import build_scheduler, plan_length

    config, chunks = start([*words, "--load", str(base), "--save", save], base, world_size)
    frozen = {name: p.detach().clone() for name, p in chunks[0].named_parameters() if not p.requires_grad}
    wrapped = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, wrapped)
    state = TrainState(wrapped, optimizer, build_scheduler(config, optimizer, plan_length(config)))
    checkpointer = Checkpointer(config, config.shape.with_vocab(64), {})
    checkpointer.start(state)
    log = []

    def forward(data, model):
        tokens, labels, positions, packed = micro_batch(next(data))
        output = model(tokens, positions, None, labels=labels, packed_seq_params=packed)
        return output, lambda losses: (losses.mean(), {"loss": losses.mean().item()})

    for step in range(4):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        numbers = [step]
        losses = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter(numbers), model=wrapped, num_microbatches=1,
            seq_length=64, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        _, norm, _ = optimizer.step()
        log.append((losses[0]["loss"] if losses else None, float(norm)))
    assert all(torch.equal(p, frozen[n]) for n, p in chunks[0].named_parameters() if n in frozen)
    state.iteration = 4
    assert checkpointer.save(state)
    checkpointer.finish()
    return log


def model_tensors(save):
    """The model's unsharded stacked tensors in a run's checkpoint, without the optimizer's."""
    found = full_tensors(save / "iter_0000004")
    return {name: tensor for name, tensor in found.items() if not name.startswith("optimizer.")}


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Losses, norms and adapters of the same run in every layout."""
    done = {}
    for name, flags in LAYOUTS.items():
        save = tmp_path_factory.mktemp("adapters")
        ranks = run_ranks(train_adapters, WORLD[name], flags_for(base, flags), base, WORLD[name], str(save))
        done[name] = ranks[-1], model_tensors(save)
    return done


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "TP1"])
def test_every_layout_trains_the_same_adapters(runs, layout):
    (log, adapters), (expected, whole) = runs[layout], runs["TP1"]
    assert math.isclose(expected[0][0], 4.2, abs_tol=2.0) and expected[-1][1] > 0
    for (loss, norm), (expected_loss, expected_norm) in zip(log, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=2e-5)
        assert norm == pytest.approx(expected_norm, rel=2e-4)
    assert set(adapters) == set(whole)
    for name, tensor in whole.items():
        assert tensor.abs().max() > 0, name
        torch.testing.assert_close(
            adapters[name], tensor, atol=5e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_checkpoint_contains_only_adapters(runs):
    _, adapters = runs["PP2 SP recompute"]
    assert set(adapters) == {stacked_name(target, part) for target in LORA_TARGETS for part in ("lora_a", "lora_b")}
    assert adapters[stacked_name("linear_qkv", "lora_a")].shape == (4, 4, 32)
    assert adapters[stacked_name("linear_qkv", "lora_b")].shape == (4, 48, 4)
    assert adapters[stacked_name("linear_fc2", "lora_a")].shape == (4, 4, 128)


def logits_of_core(words, base, adapters):
    """Logits [1, 64, 64] of a Megatron-Core model with `adapters`."""
    config, chunks = start(words, base, 1)
    model = chunks[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_a", "lora_b")):
                _, _, layer, *rest = name.split(".")
                parameter.copy_(adapters[".".join(["decoder", "layers", *rest])][int(layer)])
        tokens, _, positions, packed = micro_batch(99)
        return model.eval()(tokens, positions, None, packed_seq_params=packed).numpy()


def test_logits_equal_peft_with_the_same_adapter(runs, base, tmp_path):
    from peft import PeftModel
    from transformers import GPTBigCodeForCausalLM

    _, adapters = runs["TP2 SP"]
    words = flags_for(base, "--lora-targets linear_qkv,linear_proj,linear_fc1,linear_fc2")
    (ours,) = run_ranks(logits_of_core, 1, words, base, adapters)

    config = AdapterConfig.from_flags(parse_args(words).values())
    save_file(to_peft(adapters, open_weights(base).shape), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_peft(hf_targets(GPT_BIGCODE), str(base))))
    plain = GPTBigCodeForCausalLM.from_pretrained(base)
    without = document_logits(plain)
    peft = PeftModel.from_pretrained(plain, tmp_path).eval()
    expected = document_logits(peft)
    assert (expected - without).abs().max() > 0.1, "the adapter must matter"
    torch.testing.assert_close(torch.from_numpy(ours), expected, atol=1e-5, rtol=1e-5)

    source = open_weights(base)
    changed = {
        hf_name(source.shape, name): merged(name, source.read(name), adapters, config) for name in source.names()
    }
    whole = GPTBigCodeForCausalLM.from_pretrained(base)
    whole.load_state_dict(changed, strict=False)
    torch.testing.assert_close(document_logits(whole), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def document_logits(model):
    """Logits of the same documents from transformers, each a separate input."""
    tokens = micro_batch(99)[0][0]
    return torch.cat([model.eval()(part[None]).logits for part in tokens.split(LENGTHS)], dim=1)


def masks(words, base, world_size):
    """The dropout masks of all adapters in order, recorded on this rank from the real modules."""
    import torch.nn.functional as F

    from megatron_ft.engine import lora

    config, chunks = start(words, base, world_size)
    seen = []

    class Recording:
        linear = staticmethod(F.linear)

        @staticmethod
        def dropout(x, p, training):
            out = F.dropout(x, p, training)
            seen.append((out == 0).numpy())
            return out

    lora.F = Recording
    tokens, labels, positions, packed = micro_batch(5)
    chunks[0].train()(tokens, positions, None, labels=labels, packed_seq_params=packed)
    return seen


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_masks_agree_for_replicated_inputs_and_differ_for_sharded_ones(base, sequence_parallel):
    more = "--tensor-model-parallel-size 2 --lora-dropout 0.5" + " --sequence-parallel" * sequence_parallel
    first, second = run_ranks(masks, 2, flags_for(base, more), base, 2)
    assert len(first) == 16
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert 0.4 < a.mean() < 0.6
        column = list(LORA_TARGETS)[i % 4] in ("linear_qkv", "linear_fc1")
        assert np.array_equal(a, b) == (column and not sequence_parallel)
    for i in range(4, 16):  # layers have different masks
        assert not np.array_equal(first[i], first[i - 4])


def test_lora_targets_are_gptbigcode_modules_and_unknown_ones_are_refused(base):
    assert [*hf_targets(GPT_BIGCODE).values()] == [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]
    config = parse_args(flags_for(base, "--lora-targets linear_fc1,linear_fc1 --transformer-impl auto"))
    assert AdapterConfig.from_flags(config.values()).targets == ("linear_fc1",)
    assert config.memory.transformer_impl == "local"  # Transformer Engine's layers cannot have adapters
    words = flags_for(base, "--lora-targets linear_qkv,c_attn")
    with pytest.raises(UserError, match="'c_attn' is not one of linear_qkv, linear_proj"):
        parse_args(words)
