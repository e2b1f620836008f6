"""What the engine's tests run on ranks: flags to a model, optimizer and batches, without files of a run."""

import re
from pathlib import Path

import numpy as np
import torch

from megatron_ft.config.config import Config
from megatron_ft.errors import EXIT_USER_ERROR, UserError

GOLDEN_FLAGS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 256 --seq-length 256 "
    "--hidden-dropout 0 --attention-dropout 0 --micro-batch-size 2 --global-batch-size 4 --train-iters 8 --lr 1e-3 --min-lr 1e-4 "
    "--lr-warmup-fraction 0.25 --weight-decay 0.05 --norm-target-loss --loss-average microbatch --softmax-over-padding "
    "--eval-interval 0 --data-prefix unused"
)


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


def branch_weights(path: Path):
    """The branch's flat weights (npz by legacy names, 4 layers, 64 wide, 1024 rows) as a WeightSource."""
    from megatron_ft.model.shape import ModelShape
    from megatron_ft.model.tensor_names import layer_of, weight_of
    from megatron_ft.weights.source import WeightSource

    arrays = np.load(path)

    class BranchWeights(WeightSource):
        shape = ModelShape(
            num_layers=4, hidden_size=64, num_attention_heads=4, max_position_embeddings=256, vocab_size=1024
        )
        dtype = torch.float32
        kind = "npz"

        def __init__(self) -> None:
            self.path = path

        def pieces(self, name: str):
            layer, legacy = layer_of(name), "language_model." + weight_of(name).legacy
            if layer is not None:
                legacy = f"language_model.encoder.layers.{layer}.{weight_of(name).legacy}"
            if "query_key_value" in legacy:
                parts = [re.sub("query_key_value", part, legacy) for part in ("query", "key_value")]
                return 0, [torch.from_numpy(np.concatenate([arrays[part] for part in parts]))]
            return 0, [torch.from_numpy(arrays[legacy])]

    return BranchWeights()


def branch_micro_batch(batches, number: int, average: str = "microbatch"):
    """Micro-batch `number` of the branch's run; document bounds are where its positions restart."""
    from megatron_ft.engine.batches import MicroBatch
    from megatron_ft.engine.loss import loss_weights
    from megatron_ft.engine.packed_attention import PackedSequences

    arrays = {
        name: torch.from_numpy(batches[f"{number:03d}_{name}"])
        for name in ("tokens", "labels", "position_ids", "loss_mask")
    }
    flat = {name: array.reshape(1, -1) for name, array in arrays.items()}
    starts = torch.nonzero(flat["position_ids"][0] == 0).flatten()
    bounds = torch.cat([starts, torch.tensor([flat["tokens"].numel()])]).int()
    weights = loss_weights(flat["loss_mask"], average)
    return MicroBatch(
        **flat,
        weights=weights,
        packed_seq_params=PackedSequences.from_cu_seqlens(bounds),
        samples=[],
        weight=weights.sum(dtype=torch.float64).item(),
        loss_tokens=0,
        document_tokens=0,
        squared_lengths=0,
    )


def largest_weight_difference(model: list, config: Config, expected) -> float:
    """Over this rank's parameters, against a WeightSource's."""
    from megatron_ft.checkpoint.load_weights import load_weights, unwrap
    from megatron_ft.engine.model import build_model

    reference = build_model(config, config.shape, expected.shape.vocab_size)
    load_weights(expected, reference)
    pairs = zip(unwrap(model[0]).named_parameters(), unwrap(reference[0]).named_parameters(), strict=True)
    return max((ours - theirs).abs().max().item() for (_, ours), (_, theirs) in pairs)


def golden_steps(flags: str, golden: Path) -> dict:
    """The branch's eight steps on its own batches: losses, gradient norms, learning rates, largest difference of final weights."""
    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.engine import parallel
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer, learning_rate
    from megatron_ft.engine.schedule import build_scheduler, plan_length
    from megatron_ft.engine.train import forward_backward

    config = start(f"{GOLDEN_FLAGS} {flags}", golden / "data/tokenizer.json")
    chunks = build_model(config, config.shape, 1024)
    load_weights(branch_weights(golden / "train/weights_after_step0.npz"), chunks)
    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    scheduler = build_scheduler(config, optimizer, plan_length(config))
    batches = np.load(golden / "train/tp1pp1_batches.npz")
    training = [n for n in range(len(batches.files) // 5) if batches[f"{n:03d}_train"]]
    ranks, rank = parallel.data_parallel_size(), parallel.data_parallel_rank()
    result = {"loss": [], "grad_norm": [], "lr": []}
    for first in range(0, len(training), 2):
        ours = [branch_micro_batch(batches, n) for n in training[first : first + 2][rank::ranks]]
        (weight,) = parallel.sum_over_data_parallel([sum(m.weight for m in ours)])
        losses = forward_backward(config, model, optimizer, ours, weight, None)
        (loss,) = parallel.sum_over_all([sum(losses) if parallel.counts_here() else 0.0])
        result["lr"].append(learning_rate(optimizer))
        _, grad_norm, _ = optimizer.step()
        scheduler.step(increment=4)
        result["loss"].append(loss)
        result["grad_norm"].append(grad_norm)
    for chunk in model if config.parallel.overlap_param_gather else []:
        chunk.disable_forward_pre_hook()
    result["weights"] = largest_weight_difference(model, config, branch_weights(golden / "train/weights_after_step8.npz"))
    return result


def golden_steps_offloaded(flags: str, golden: Path) -> dict:
    """`golden_steps` with the optimizer's state kept apart on the "host"."""
    on_host = tell_host_from_gpu()
    result = golden_steps(flags, golden)
    return {**result, "tensors on the host": len(on_host)}


def tell_host_from_gpu() -> list[torch.Tensor]:
    """Let Megatron's HybridDeviceOptimizer work on a machine where host and GPU are both the CPU: tensors pass for the GPU's until
    `.cpu()` copies them, which is all that it goes by. Returns those copies, as they are made."""
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


def packed_rows(seed: int, rows: int, length: int, documents: int, vocab_size: int):
    """A collated Batch of random rows, each of about `documents` documents of random lengths, some of them short of the row's end."""
    from megatron_ft.data.batch import collate
    from megatron_ft.data.packed_dataset import PackedSample

    random = np.random.default_rng(seed)
    samples = []
    for row in range(rows):
        tail = 0 if row % 2 == 0 else random.integers(1, max(2, length // 8))
        cuts = np.sort(random.choice(np.arange(1, length - tail), documents - 1, replace=False))
        lengths = np.diff([0, *cuts, length + 1 - tail])
        segments = np.repeat([*range(1, documents + 1), 0], [*lengths, tail]).astype(np.int32)
        within = np.concatenate([np.arange(n) for n in [*lengths, tail]])
        inputs = within < np.repeat([*(lengths // 2), 0], [*lengths, tail])
        tokens = np.where(segments > 0, random.integers(0, vocab_size, length + 1), 0)
        samples.append(PackedSample(tokens.astype(np.int64), segments, inputs))
    return collate(samples, eod=0)


def loss_and_gradient_error(
    flags: str, weights: Path, tokenizer: Path, gradients: Path, seed: int
) -> tuple[float, float]:
    """Loss of one step on `packed_rows(seed, ...)` from the weights of a HF directory, and the largest difference of its gradients
    from the HF model's, saved as {name: tensor} in `gradients`."""
    from megatron_ft.checkpoint.load_weights import load_weights, unwrap
    from megatron_ft.engine import parallel
    from megatron_ft.engine.batches import micro_batch_from
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.engine.train import forward_backward
    from megatron_ft.weights.open import open_weights
    from megatron_ft.weights.source import WeightSource

    source = open_weights(weights)
    flags += f" --num-layers {source.shape.num_layers} --hidden-size {source.shape.hidden_size} --num-attention-heads 4"
    flags += " --max-position-embeddings 256 --seq-length 256 --hidden-dropout 0 --attention-dropout 0 --data-prefix unused --train-iters 1"
    flags += f" --attention-head-type {'multiquery' if source.shape.multi_query else 'multihead'}"
    config = start(flags, tokenizer)
    chunks = build_model(config, config.shape, source.shape.vocab_size)
    load_weights(source, chunks)
    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    batch = packed_rows(seed, config.training.micro_batch_size, 256, 6, 1000)
    micro = micro_batch_from(batch, batch.loss_mask, "token", [0])
    losses = forward_backward(config, model, optimizer, [micro], micro.weight, 1000)
    (loss,) = parallel.sum_over_all([sum(losses) if parallel.counts_here() else 0.0])

    stored = torch.load(gradients)

    class Gradients(WeightSource):
        shape, path, kind, dtype = source.shape, gradients, "gradients", torch.float32

        def pieces(self, name: str):
            return 0, [stored[name]]

    reference = build_model(config, config.shape, source.shape.vocab_size)
    load_weights(Gradients(), reference)
    pairs = zip(unwrap(model[0]).parameters(), unwrap(reference[0]).parameters(), strict=True)
    return loss, max((ours.main_grad - theirs).abs().max().item() for ours, theirs in pairs)


def dense_attention(query, key, value, lengths: list[int], scale=None, dropout=0.0):
    """What packed attention must equal: all scores, a [t, t] mask, softmax in fp32."""
    n, g, d = query.shape[1], key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(n // g, dim=1) for x in (key, value))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    mask = (document[:, None] == document[None]).tril()
    scores = torch.einsum("qnd,knd->nqk", query.float(), key.float()) * d**-0.5
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("nqk,knd->qnd", probabilities, value.float()).to(query.dtype).flatten(1)


def difference_from_dense_model(flags: str, golden: Path) -> dict[str, float]:
    """Relative difference, in norm, of the logits or the gradient (the larger), of the model with packed and with dense attention."""
    import megatron_ft.engine.packed_attention as packed_attention
    from megatron_ft.engine import parallel
    from megatron_ft.engine.batches import micro_batch_from
    from megatron_ft.engine.model import build_model
    from megatron_ft.model.shape import padded_vocab_size

    flags = f"{flags} --preset tiny --num-layers 2 --seq-length 256 --data-prefix unused --train-iters 1"
    config = start(flags, golden / "data/tokenizer.json")
    by_document = packed_attention.attend_by_document
    errors = {}
    for precision, documents in (("fp32", 1), ("fp32", 100), ("bf16", 1), ("bf16", 100)):
        config = config.with_flags(bf16=precision == "bf16")
        batch = packed_rows(5, config.training.micro_batch_size, 256, documents, 1000)
        micro = micro_batch_from(batch, batch.loss_mask, "token", [0])
        results = []
        for attention in (by_document, dense_attention):
            packed_attention.attend_by_document = attention
            parallel.seed_start(1)
            (model,) = build_model(config, config.shape, padded_vocab_size(1000, 128, config.parallel.tensor))
            logits = model(micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed_seq_params)
            logits.float().square().mean().backward()
            gradient = torch.cat([p.grad.float().flatten() for p in model.parameters()])
            results.append([logits.detach().float(), gradient])
        packed_attention.attend_by_document = by_document
        worst = max(((ours - dense).norm() / dense.norm()).item() for ours, dense in zip(*results, strict=True))
        errors[precision] = max(errors.get(precision, 0.0), worst)
    return errors


def golden_logits_error(flags: str, golden: Path) -> float:
    """Largest difference of this rank's logit columns from the branch's at the documents' positions of packed rows.

    At a row's padding the branch attends to nothing, which its softmax turns into everything; no loss is there.
    """
    from megatron.core import parallel_state

    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.engine.model import build_model
    from megatron_ft.engine.packed_attention import PackedSequences

    config = start(f"{GOLDEN_FLAGS} {flags}", golden / "data/tokenizer.json")
    (model,) = build_model(config, config.shape, 1024)
    load_weights(branch_weights(golden / "train/weights_after_step0.npz"), [model])
    reference = {name: torch.from_numpy(array) for name, array in np.load(golden / "train/ref_short_s257.npz").items()}
    tokens, positions = (reference[name].reshape(1, -1) for name in ("tokens", "position_ids"))
    bounds = torch.cat([torch.nonzero(positions[0] == 0).flatten(), torch.tensor([tokens.numel()])]).int()
    logits = model.eval()(tokens, positions, None, packed_seq_params=PackedSequences.from_cu_seqlens(bounds))
    columns = logits.shape[-1]
    first = columns * parallel_state.get_tensor_model_parallel_rank()
    expected = reference["logits"].reshape(1, -1, 1024)[..., first : first + columns]
    documents = reference["segment_ids"].reshape(1, -1) > 0
    return (logits - expected)[documents].abs().max().item()


def finetune(flags: list[str], during: str = "") -> int:
    """`python -m megatron_ft.finetune FLAGS` on this rank; `during` names something that happens meanwhile (see below)."""
    import os
    import signal
    import time

    from megatron_ft import finetune
    from megatron_ft.engine import signals, train, validation

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
        module, function = (train, "forward_backward") if where == "step" else (validation, "_count")
        number = signal.Signals[name]
        setattr(module, function, after(getattr(module, function), lambda: os.kill(os.getpid(), number)))
    if what == "tear-in-step":
        log = Path(flags[flags.index("--save") + 1]) / "validation.jsonl"
        train.forward_backward = after(train.forward_backward, lambda: log.write_text('{"iteration": 2, "gro\n'))
    if what == "hang-in-step":
        train.forward_backward = after(train.forward_backward, lambda: time.sleep(60))
    try:
        return finetune.main(flags)
    except UserError:
        return EXIT_USER_ERROR


def finetune_error(flags: list[str]) -> str:
    """The line that a user's mistake ends in."""
    from megatron_ft.finetune import main

    try:
        return f"no error, status {main(flags)}"
    except UserError as error:
        return str(error)


def losses_of_splits(golden: Path) -> dict:
    """One step on the same four rows with micro-batches of 2 and of 1: {average: [(loss, gradient norm), ...]}, and by hand."""
    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.data.batch import Batch
    from megatron_ft.engine import parallel
    from megatron_ft.engine.batches import micro_batch_from
    from megatron_ft.engine.loss import token_losses
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.engine.train import forward_backward
    from megatron_ft.weights.open import open_weights

    flags = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 256 --seq-length 256"
    flags += " --hidden-dropout 0 --attention-dropout 0 --data-prefix unused --train-iters 1 --global-batch-size 4"
    config = start(flags, golden / "data/tokenizer.json")
    rows = packed_rows(11, 4, 256, 5, 1000)
    rows.loss_mask[0, 20:] = 0  # few output tokens
    rows.loss_mask[2] = 0  # none

    def micro_batches(size: int, average: str):
        ranks, rank = parallel.data_parallel_size(), parallel.data_parallel_rank()
        result = []
        for first in range(rank * size, 4, size * ranks):
            pieces = [getattr(rows, n)[first : first + size] for n in ("tokens", "labels", "position_ids", "loss_mask")]
            bounds = rows.cu_seqlens - first * 256
            bounds = bounds[(bounds >= 0) & (bounds <= size * 256)]
            batch = Batch(*pieces, rows.segment_ids[first : first + size], bounds, 256)
            result.append(micro_batch_from(batch, batch.loss_mask, average, []))
        return result

    results: dict = {"token": [], "microbatch": [], "by hand": {}}
    chunks = build_model(config, config.shape, 1024)
    load_weights(open_weights(golden / "hf/hf_tiny"), chunks)
    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    for average in ("token", "microbatch"):
        for size in (2, 1):
            config = config.with_flags(micro_batch_size=size)
            ours = micro_batches(size, average)
            (weight,) = parallel.sum_over_data_parallel([sum(m.weight for m in ours)])
            shares = forward_backward(config, model, optimizer, ours, weight, 1000)
            (loss,) = parallel.sum_over_all([sum(shares) if parallel.counts_here() else 0.0])
            optimizer.prepare_grads()
            results[average].append((loss, float(optimizer.get_grad_norm())))
    if parallel.data_parallel_size() == 1:
        with torch.no_grad():
            per_row = []
            for micro in micro_batches(1, "token"):
                logits = model[0](micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed_seq_params)
                losses = token_losses(logits, micro.labels, 1000) * micro.loss_mask
                per_row.append((losses.sum().item(), micro.loss_mask.sum().item()))
        results["by hand"]["token"] = sum(loss for loss, _ in per_row) / sum(n for _, n in per_row)
        results["by hand"]["microbatch"] = sum(loss / n for loss, n in per_row if n) / 3
    return results


def padding_probability(golden: Path) -> tuple[float, float, float, list[float]]:
    """Probability of the 24 padding columns when masked and when not, their largest gradient, and two tokens' hits."""
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
