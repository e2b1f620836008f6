"""Functions that tests run on ranks to compare training with the mtf branch's golden run."""

import re
from pathlib import Path

import numpy as np
import torch
from engine_runs import start, tell_host_from_gpu

from megatron_ft.config.config import Config

GOLDEN_FLAGS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 256 --seq-length 256 "
    "--hidden-dropout 0 --attention-dropout 0 --micro-batch-size 2 --global-batch-size 4 --train-iters 8 --lr 1e-3 --min-lr 1e-4 "
    "--lr-warmup-fraction 0.25 --weight-decay 0.05 --norm-target-loss --loss-average microbatch --softmax-over-padding "
    "--eval-interval 0 --data-prefix unused"
)


def branch_weights(path: Path):
    """The mtf branch's weights, an npz with legacy names, as a WeightSource.

    4 layers, hidden size 64, vocabulary 1024.
    """
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
    """Micro-batch `number` of the mtf branch's run; documents start where positions restart."""
    from megatron_ft.training.batches import MicroBatch, loss_weights

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
        cu_seqlens=bounds,
        lengths=bounds.diff().tolist(),
        samples=[],
        weight=weights.sum(dtype=torch.float64).item(),
        loss_tokens=0,
        document_tokens=0,
        squared_lengths=0,
    )


def largest_weight_difference(model: list, config: Config, expected) -> float:
    """The largest difference of this rank's parameters from those of a WeightSource."""
    from megatron_ft.checkpoint.load_weights import load_weights, unwrap
    from megatron_ft.engine.model import build_model

    reference = build_model(config, config.shape, expected.shape.vocab_size)
    load_weights(expected, reference)
    pairs = zip(unwrap(model[0]).named_parameters(), unwrap(reference[0]).named_parameters(), strict=True)
    return max((ours - theirs).abs().max().item() for (_, ours), (_, theirs) in pairs)


def golden_steps(flags: str, golden: Path) -> dict:
    """The mtf branch's eight steps on its own batches.

    Returns losses, gradient norms, learning rates, and the largest difference of final weights.
    """
    from megatron_ft.checkpoint.load_weights import load_weights
    from megatron_ft.engine import parallel
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.engine.step import forward_backward
    from megatron_ft.training.schedule import build_scheduler, learning_rate, plan_length
    from megatron_ft.training.step import local_sums
    from megatron_ft.training.sums import sum_over_all

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
        (weight,) = sum_over_all(local_sums(ours, parallel.counts_here())[:1])
        losses = forward_backward(config, model, optimizer, ours, weight, None)
        (loss,) = sum_over_all([losses.double().sum().item() if parallel.counts_here() else 0.0])
        result["lr"].append(learning_rate(optimizer))
        _, grad_norm, _ = optimizer.step()
        scheduler.step(increment=4)
        result["loss"].append(loss)
        result["grad_norm"].append(grad_norm)
    for chunk in model if config.parallel.overlap_param_gather else []:
        chunk.disable_forward_pre_hook()
    final = branch_weights(golden / "train/weights_after_step8.npz")
    result["weights"] = largest_weight_difference(model, config, final)
    return result


def golden_steps_offloaded(flags: str, golden: Path) -> dict:
    """`golden_steps` with the optimizer's state on a "host" that differs from the "GPU"."""
    on_host = tell_host_from_gpu()
    result = golden_steps(flags, golden)
    return {**result, "tensors on the host": len(on_host)}


def golden_logits_error(flags: str, golden: Path) -> float:
    """Largest difference of this rank's logit columns from the mtf branch's, without padding.

    At padding the branch attends to nothing, which its softmax turns into everything; padding has
    no loss.
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
