"""Functions that tests of the engine run on ranks: from flags to model, optimizer and batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megatron_ft.config.config import Config
from megatron_ft.errors import EXIT_USER_ERROR, UserError


def start(flags: str, tokenizer: Path) -> Config:
    """Parsed flags, with device and process groups set up as finetune.py does."""
    import os

    from megatron_ft.config.arguments import parse_args
    from megatron_ft.engine import parallel
    from megatron_ft.engine.device import set_up_device

    config = parse_args([*flags.split(), "--tokenizer-file", str(tokenizer)], int(os.environ["WORLD_SIZE"]))
    set_up_device(config)
    parallel.initialize(config)
    return config


def tell_host_from_gpu() -> list[torch.Tensor]:
    """Let Megatron's HybridDeviceOptimizer work where host and GPU are both the CPU.

    Tensors count as the GPU's until `.cpu()` copies them. Returns the list of those copies, which
    grows.
    """
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
    from torch.overrides import TorchFunctionMode

    on_host = []

    class TwoDevices(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
            if func == torch.Tensor.is_cuda.__get__:
                return not any(args[0] is tensor for tensor in on_host)
            if func is torch.Tensor.cpu:
                on_host.append(args[0].clone())
                return on_host[-1]
            return args[0] if func is torch.Tensor.pin_memory else func(*args, **kwargs)

    def on_two_devices(method):
        def wrapped(*args, **kwargs):
            with TwoDevices():
                return method(*args, **kwargs)

        return wrapped

    for name in ("_get_sub_optimizer_param_groups", "step"):
        setattr(HybridDeviceOptimizer, name, on_two_devices(getattr(HybridDeviceOptimizer, name)))
    return on_host


def random_batch(seed: int, num_sequences: int, length: int, documents: int, vocab_size: int):
    """A collated Batch of random packed sequences, every second one with padding at its end.

    Each has `documents` documents of random lengths.
    """
    from megatron_ft.data.batch import collate
    from megatron_ft.data.packed_dataset import PackedSample

    random = np.random.default_rng(seed)
    samples = []
    for i in range(num_sequences):
        tail = 0 if i % 2 == 0 else random.integers(1, max(2, length // 8))
        cuts = np.sort(random.choice(np.arange(1, length - tail), documents - 1, replace=False))
        lengths = np.diff([0, *cuts, length + 1 - tail])
        segments = np.repeat([*range(1, documents + 1), 0], [*lengths, tail]).astype(np.int32)
        within = np.concatenate([np.arange(n) for n in [*lengths, tail]])
        inputs = within < np.repeat([*(lengths // 2), 0], [*lengths, tail])
        tokens = np.where(segments > 0, random.integers(0, vocab_size, length + 1), 0)
        samples.append(PackedSample(tokens.astype(np.int64), segments, inputs))
    return collate(samples, eod=0)


def differences_from_transformers(
    flags: str, weights: Path, tokenizer: Path, reference: Path, seed: int
) -> tuple[float, float, float]:
    """Loss of one step on `random_batch(seed, ...)` with a HF model's weights, and the largest
    differences of gradients and logits.

    `reference` has the HF model's gradients, as if they were a model's weights, and its logits.
    """
    from megatron.core import parallel_state
    from safetensors.torch import load_file

    from megatron_ft.checkpoint.load_weights import load_weights, unwrap
    from megatron_ft.engine import parallel
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.engine.pipeline import run_micro_batches
    from megatron_ft.engine.step import forward_backward
    from megatron_ft.training.batches import micro_batch_from
    from megatron_ft.training.sums import sum_over_all
    from megatron_ft.weights.open import open_weights

    source = open_weights(weights)
    flags += " --preset tiny --seq-length 256 --data-prefix unused --train-iters 1"
    config = start(flags, tokenizer)
    config = replace(config, shape=replace(source.shape, hidden_dropout=0.0, attention_dropout=0.0))
    chunks = build_model(config, config.shape, source.shape.vocab_size)
    load_weights(source, chunks)
    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    batch = random_batch(seed, config.training.micro_batch_size, 256, 6, 1000)
    micro = micro_batch_from(batch, batch.loss_mask, "token", [0])
    seen: list[torch.Tensor] = []

    def keep(micro, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(logits.detach().clone())
        return logits.new_zeros(()), logits.new_zeros(1)

    run_micro_batches(config, model, [micro], keep, forward_only=True)
    losses = forward_backward(config, model, optimizer, [micro], micro.weight, 1000)
    (loss,) = sum_over_all([losses.double().sum().item() if parallel.counts_here() else 0.0])

    gradients = build_model(config, config.shape, source.shape.vocab_size)
    load_weights(open_weights(reference), gradients)
    pairs = zip(unwrap(model[0]).parameters(), unwrap(gradients[0]).parameters(), strict=True)
    gradient = max((ours.main_grad - theirs).abs().max().item() for ours, theirs in pairs)
    expected = load_file(reference / "logits.safetensors")["logits"]
    logits = 0.0
    for ours in seen:
        columns = ours.shape[-1]
        first = columns * parallel_state.get_tensor_model_parallel_rank()
        logits = (ours[0] - expected[:, first : first + columns]).abs().max().item()
    return loss, gradient, logits


def packed_rows(micro):
    """A MicroBatch's documents, as Megatron-Core's layers take them."""
    from megatron_ft.engine.packed_attention import PackedSequences

    return PackedSequences.of(micro.cu_seqlens, micro.lengths, micro.position_ids)


def logits_of_shapes(weights: Path, tokenizer: Path, shapes: list[dict], seed: int) -> list[np.ndarray]:
    """Logits on `random_batch(seed, 1, ...)` of a HF model's weights in models whose shapes differ
    from its own in some fields."""
    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.engine.model import build_model
    from megatron_ft.training.batches import micro_batch_from
    from megatron_ft.weights.open import open_weights

    source = open_weights(weights)
    config = start("--preset tiny --seq-length 256 --data-prefix unused --train-iters 1", tokenizer)
    batch = random_batch(seed, 1, 256, 6, 1000)
    micro = micro_batch_from(batch, batch.loss_mask, "token", [0])
    found = []
    for changes in shapes:
        (model,) = build_model(config, replace(source.shape, **changes), source.shape.vocab_size)
        load_weights(source, [model])
        with torch.no_grad():
            logits = model.eval()(micro.tokens, micro.position_ids, None, packed_seq_params=packed_rows(micro))
        found.append(logits[0].numpy())
    return found


def dense_attention(query, key, value, lengths: list[int], scale=None, dropout=0.0, window=0):
    """The reference for packed attention: all scores, a [t, t] mask, softmax in fp32."""
    n, g, d = query.shape[1], key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(n // g, dim=1) for x in (key, value))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    mask = (document[:, None] == document[None]).tril()
    mask = mask.triu(1 - window) if window else mask
    scores = torch.einsum("qnd,knd->nqk", query.float(), key.float()) * d**-0.5
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("nqk,knd->qnd", probabilities, value.float()).to(query.dtype).flatten(1)


def difference_from_dense_model(flags: str, golden: Path) -> dict[str, float]:
    """Difference of the models with packed and with dense attention, by precision.

    It is the larger relative difference, in norm, of logits and gradient.
    """
    import megatron_ft.engine.packed_attention as packed_attention
    from megatron_ft.engine import parallel
    from megatron_ft.engine.model import build_model
    from megatron_ft.model.shape import padded_vocab_size
    from megatron_ft.training.batches import micro_batch_from

    flags = f"{flags} --preset tiny --num-layers 2 --seq-length 256 --data-prefix unused --train-iters 1"
    config = start(flags, golden / "data/tokenizer.json")
    by_document = packed_attention.attend_by_document
    errors = {}
    for precision, documents in (("fp32", 1), ("fp32", 100), ("bf16", 1), ("bf16", 100)):
        config = config.with_flags(bf16=precision == "bf16")
        batch = random_batch(5, config.training.micro_batch_size, 256, documents, 1000)
        micro = micro_batch_from(batch, batch.loss_mask, "token", [0])
        results = []
        for attention in (by_document, dense_attention):
            packed_attention.attend_by_document = attention
            parallel.seed_start(1)
            (model,) = build_model(config, config.shape, padded_vocab_size(1000, 128, config.parallel.tensor))
            logits = model(micro.tokens, micro.position_ids, None, packed_seq_params=packed_rows(micro))
            logits.float().square().mean().backward()
            gradient = torch.cat([p.grad.float().flatten() for p in model.parameters()])
            results.append([logits.detach().float(), gradient])
        packed_attention.attend_by_document = by_document
        worst = max(((ours - dense).norm() / dense.norm()).item() for ours, dense in zip(*results, strict=True))
        errors[precision] = max(errors.get(precision, 0.0), worst)
    return errors


def finetune(flags: list[str], during: str = "") -> int:
    """`python -m megatron_ft.finetune FLAGS` on this rank.

    `during` is an event during the run and the call at which it happens: "SIGTERM-in-step 3",
    "SIGTERM-in-validation 1", "truncate-in-step 2" or "hang-in-step 3".
    """
    import os
    import signal
    import time

    from megatron_ft.engine import step
    from megatron_ft.finetune import main
    from megatron_ft.training import signals

    signals.forget()
    what, _, when = during.partition(" ")
    calls = 0

    def after(function, act):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == int(when or 1):
                act()
            return function(*args, **kwargs)

        return wrapped

    last_rank = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    name, _, where = what.partition("-in-")
    if name.startswith("SIG") and last_rank:
        function = "forward_backward" if where == "step" else "count_losses"
        number = signal.Signals[name]
        setattr(step, function, after(getattr(step, function), lambda: os.kill(os.getpid(), number)))
    if what == "truncate-in-step":
        log = Path(flags[flags.index("--save") + 1]) / "validation.jsonl"
        step.forward_backward = after(step.forward_backward, lambda: log.write_text('{"iteration": 2, "gro\n'))
    if what == "hang-in-step":
        step.forward_backward = after(step.forward_backward, lambda: time.sleep(60))
    try:
        return main(flags)
    except UserError:
        return EXIT_USER_ERROR


def finetune_error(flags: list[str]) -> str:
    """The message of the user error that the run ends with."""
    from megatron_ft.finetune import main

    try:
        return f"no error, status {main(flags)}"
    except UserError as error:
        return str(error)


def losses_of_splits(golden: Path) -> dict:
    """One step on the same four sequences with micro-batches of 2 and of 1.

    Returns {average: [(loss, gradient norm), ...]}, and the losses computed directly.
    """
    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.data.batch import Batch
    from megatron_ft.engine import parallel
    from megatron_ft.engine.loss import token_losses
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.engine.step import forward_backward
    from megatron_ft.training.batches import micro_batch_from
    from megatron_ft.training.step import local_sums
    from megatron_ft.training.sums import sum_over_all
    from megatron_ft.weights.open import open_weights

    flags = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 256 --seq-length 256"
    flags += " --hidden-dropout 0 --attention-dropout 0 --data-prefix unused --train-iters 1 --global-batch-size 4"
    config = start(flags, golden / "data/tokenizer.json")
    sequences = random_batch(11, 4, 256, 5, 1000)
    sequences.loss_mask[0, 20:] = 0  # few target tokens
    sequences.loss_mask[2] = 0  # none

    def micro_batches(size: int, average: str):
        ranks, rank = parallel.data_parallel_size(), parallel.data_parallel_rank()
        result = []
        for first in range(rank * size, 4, size * ranks):
            names = ("tokens", "labels", "position_ids", "loss_mask")
            pieces = [getattr(sequences, name)[first : first + size] for name in names]
            bounds = sequences.cu_seqlens - first * 256
            bounds = bounds[(bounds >= 0) & (bounds <= size * 256)]
            batch = Batch(*pieces, sequences.segment_ids[first : first + size], bounds, 256)
            result.append(micro_batch_from(batch, batch.loss_mask, average, []))
        return result

    results: dict = {"token": [], "microbatch": [], "direct": {}}
    chunks = build_model(config, config.shape, 1024)
    load_weights(open_weights(golden / "hf/hf_tiny"), chunks)
    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    for average in ("token", "microbatch"):
        for size in (2, 1):
            config = config.with_flags(micro_batch_size=size)
            ours = micro_batches(size, average)
            (weight,) = sum_over_all(local_sums(ours, parallel.counts_here())[:1])
            losses = forward_backward(config, model, optimizer, ours, weight, 1000)
            (loss,) = sum_over_all([losses.double().sum().item() if parallel.counts_here() else 0.0])
            optimizer.prepare_grads()
            results[average].append((loss, float(optimizer.get_grad_norm())))
    if parallel.data_parallel_size() == 1:
        with torch.no_grad():
            per_sequence = []
            for micro in micro_batches(1, "token"):
                logits = model[0](micro.tokens, micro.position_ids, None, packed_seq_params=packed_rows(micro))
                losses = token_losses(logits, micro.labels, 1000) * micro.loss_mask
                per_sequence.append((losses.sum().item(), micro.loss_mask.sum().item()))
        results["direct"]["token"] = sum(loss for loss, _ in per_sequence) / sum(n for _, n in per_sequence)
        results["direct"]["microbatch"] = sum(loss / n for loss, n in per_sequence if n) / 3
    return results


def padding_probability(golden: Path) -> tuple[float, float, float, list[float]]:
    """Errors of the loss with the 24 padding columns masked and unmasked, the largest gradient of
    these columns, and the hits of two tokens."""
    import os

    from megatron.core import parallel_state

    from megatron_ft.engine.loss import token_hits, token_losses

    ranks = int(os.environ["WORLD_SIZE"])
    flags = f"--preset tiny --data-prefix unused --train-iters 1 --tensor-model-parallel-size {ranks}"
    start(flags, golden / "data/tokenizer.json")
    torch.manual_seed(0)
    whole = torch.randn(1, 2, 1024)
    whole[..., 1000:] += 5
    labels = torch.tensor([[whole[0, 0, :1000].argmax().item(), 999]])
    rank = parallel_state.get_tensor_model_parallel_rank()
    columns = 1024 // ranks
    part = whole[..., rank * columns : (rank + 1) * columns].clone()
    exact = -torch.log_softmax(whole[..., :1000], -1).gather(-1, labels[..., None])[..., 0]
    hits = token_hits(part.clone(), labels, 1000)[0].tolist()
    logits = part.clone().requires_grad_()
    losses = token_losses(logits * 1, labels, 1000)
    losses.sum().backward()
    unmasked = token_losses(part.clone(), labels, None)
    padding = logits.grad[..., max(0, 1000 - rank * columns) :]
    gradient = padding.abs().max().item() if padding.numel() else 0.0
    return (losses - exact).abs().max().item(), (unmasked - exact).min().item(), gradient, hits
