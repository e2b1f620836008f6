"""model/cost.py against Megatron-Core: parameters, state, activations, FLOPs by torch's counter."""

import collections
import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch.overrides import TorchFunctionMode

from megatron_ft.config.arguments import parse_args
from megatron_ft.model import cost
from megatron_ft.model.families import PRESETS
from megatron_ft.model.shape import padded_vocab_size


def args_for(tmp_path, *words, world_size=1):
    (tmp_path / "tokenizer.json").write_text("{}")
    fixed = ["--data-prefix", "none", "--tokenizer-file", str(tmp_path / "tokenizer.json"), "--train-iters", "1"]
    return parse_args([*fixed, *words], world_size)


def meta_parameters(config, rank, world_size):
    """Parameters (all, trainable) and bytes of a rank's model, built on the meta device.

    The process group is a fake one that does not communicate.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_ft.engine.device import set_up_device
    from megatron_ft.engine.lora import add_lora
    from megatron_ft.engine.model import build_model

    set_up_device(config)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        config.parallel.tensor, config.parallel.pipeline, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1)
    torch.cuda.current_device = lambda: torch.device("meta")
    padded = padded_vocab_size(config.shape.vocab_size, 128, config.parallel.tensor)
    with torch.device("meta"):
        chunks = build_model(config, config.shape, padded)
        if config.lora.rank:
            add_lora(chunks, config)
    parameters = list(chunks[0].parameters())
    assert all(p.is_meta for p in parameters)
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() * p.element_size() for p in parameters),
    )


def meta_ranks(args_of_layouts):
    """(all, trainable, bytes) for each (config, world size, rank), a process each, no weights."""
    (results,) = run_ranks(_meta_in_children, 1, args_of_layouts)
    return results


def _meta_in_children(args_of_layouts):
    import os

    results = []
    for config, world_size, rank in args_of_layouts:
        reading, writing = os.pipe()
        child = os.fork()  # each has its own process group and patched functions
        if not child:
            import traceback

            try:
                os.write(writing, repr(meta_parameters(config, rank, world_size)).encode())
            except BaseException:
                os.write(writing, traceback.format_exc().encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        assert text.startswith("("), text
        results.append(tuple(int(n) for n in text.strip("()").split(",")))
    return results


LAYOUTS = [
    ("starcoderbase", 4, 4, "--bf16 --sequence-parallel"),
    ("starcoderbase", 1, 1, ""),
    ("starcoderbase-7b", 8, 1, "--bf16"),
    ("starcoderbase-3b", 2, 2, "--fp16"),
    ("starcoderbase-1b", 1, 1, "--bf16"),
    ("santacoder", 1, 2, "--attention-head-type multihead"),
    ("starcoderbase", 4, 2, "--bf16 --lora-rank 16"),
    ("starcoder2-15b", 4, 2, "--bf16 --sequence-parallel"),
    ("starcoder2-7b", 4, 1, "--bf16 --lora-rank 16"),
    ("starcoder2-3b", 4, 2, "--bf16"),
]


def test_parameters_and_weights_are_those_of_megatron_core_on_every_stage(tmp_path):
    ranks, expected = [], []
    for preset, tp, pp, flags in LAYOUTS:
        words = (
            f"--preset {preset} --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} {flags}".split()
        )
        config = args_for(tmp_path, *words, world_size=tp * pp)
        layout = config.layout()
        padded = padded_vocab_size(config.shape.vocab_size, 128, tp)
        adapters = cost.adapter_parameters_on_rank(config.shape, layout)
        for stage in {0, pp // 2, pp - 1}:
            ranks.append((config, tp * pp, stage * tp))
            base = cost.parameters_on_rank(config.shape, padded, layout, stage)
            weights, _, _ = cost.state_bytes(config.shape, padded, layout, stage)
            expected.append((base + adapters, adapters or base, weights))
    assert meta_ranks(ranks) == expected


def test_one_rank_has_as_many_parameters_as_the_preset():
    for shape in PRESETS.values():
        assert cost.parameters_on_rank(shape, shape.vocab_size, cost.Layout(), 0) == shape.num_parameters()


def model_of(config):
    """This rank's part of the model, and the same wrapped for data parallelism."""
    from megatron_ft.engine.device import set_up_device
    from megatron_ft.engine.lora import add_lora
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.parallel import initialize

    set_up_device(config)
    initialize(config)
    chunks = build_model(config, config.shape, config.shape.vocab_size)
    if config.lora.rank:
        add_lora(chunks, config)
    return chunks, wrap_for_data_parallel(config, chunks)


def state_bytes_of_run(config):
    """Bytes of weights, gradients and optimizer state of a rank after a step, and on the host."""
    from engine_runs import tell_host_from_gpu

    from megatron_ft.engine.optimizer import build_optimizer

    chunks, wrapped = model_of(config)
    if config.optimizer.cpu_offload:
        tell_host_from_gpu()
    optimizer = build_optimizer(config, wrapped)
    for parameter in chunks[0].parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(1e-3)
    optimizer.step()
    weights = {p.untyped_storage().data_ptr() for p in chunks[0].parameters()}
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in wrapped[0].buffers)
    held, pinned, host = {}, [], 0
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        moments = [
            t for state in inner.optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")
        ]
        if config.optimizer.cpu_offload:
            host += sum(moment.nbytes for moment in moments)
            pinned += [*inner.optimizer.gpu_params_map_cpu_copy.values(), *inner.optimizer.cpu_copy_map_grad.values()]
            moments = []
        for tensor in [*moments, *(master for group in inner.optimizer.param_groups for master in group["params"])]:
            if tensor.untyped_storage().data_ptr() not in weights:
                held[tensor.data_ptr()] = tensor.nbytes
    host += sum(2 ** math.ceil(math.log2(tensor.nbytes)) for tensor in pinned)  # as torch's pinned allocator
    return sum(p.numel() * p.element_size() for p in chunks[0].parameters()), gradients, sum(held.values()), host


@pytest.mark.parametrize(
    "flags, world_size",
    [
        ("--bf16", 2),
        ("--no-use-distributed-optimizer", 1),
        ("--bf16 --no-accumulate-allreduce-grads-in-fp32 --tensor-model-parallel-size 2", 2),
        ("--bf16 --lora-rank 8", 1),
        ("--bf16 --optimizer-cpu-offload", 1),
        ("--bf16 --optimizer-cpu-offload", 2),
    ],
)
def test_state_bytes_are_those_of_a_run_after_a_step(tmp_path, flags, world_size):
    config = args_for(tmp_path, "--preset", "tiny", *flags.split(), world_size=world_size)
    ranks = run_ranks(state_bytes_of_run, world_size, config)
    layout = config.layout()
    expected = cost.state_bytes(config.shape, config.shape.vocab_size, layout, 0)
    weights, gradients, _, _ = ranks[0]
    assert weights == expected[0]
    assert gradients == pytest.approx(expected[1], rel=0.02)
    host = cost.host_bytes(config.shape, config.shape.vocab_size, layout, 0)
    assert sum(r[3] for r in ranks) / world_size == pytest.approx(host, rel=0.02)
    assert sum(r[2] for r in ranks) / world_size == pytest.approx(expected[2], rel=0.02)


def bytes_to_save(config):
    """Bytes that a run's ranks would write into a checkpoint."""
    from megatron_ft.checkpoint import optimizer_state, sharded_state
    from megatron_ft.checkpoint.collective import Collective
    from megatron_ft.engine.optimizer import build_optimizer

    _, wrapped = model_of(config)
    optimizer = build_optimizer(config, wrapped)
    optimizer_state.initialize(optimizer)
    return Collective(config.parallel.timeout_minutes).total(
        sharded_state.bytes_to_save(wrapped, optimizer, bool(config.lora.rank))
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--bf16 --pipeline-model-parallel-size 2",
        "--optimizer sgd",
        "--bf16 --lora-rank 8 --tensor-model-parallel-size 2",
    ],
)
def test_checkpoint_bytes_are_those_that_ranks_save(tmp_path, flags):
    config = args_for(tmp_path, "--preset", "tiny", *flags.split(), world_size=2)
    sizes = run_ranks(bytes_to_save, 2, config)
    expected = cost.checkpoint_bytes(config.shape, config.shape.vocab_size, config.layout())
    assert sizes == [expected, expected]


def activations_of_run(config, vocab, count_flops=False):
    """Bytes that autograd keeps after forward and loss, without weights, by what kept them first.

    {layer number or "outside": bytes}, every storage once. With `count_flops`, the FLOPs of forward
    and backward instead.
    """
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_ft.engine.device import set_up_device
    from megatron_ft.engine.lora import add_lora
    from megatron_ft.engine.loss import token_losses
    from megatron_ft.engine.model import build_model
    from megatron_ft.engine.packed_attention import PackedSequences
    from megatron_ft.engine.parallel import initialize

    set_up_device(config)
    initialize(config)
    chunks = build_model(config, config.shape.with_vocab(vocab), vocab)
    if config.lora.rank:
        add_lora(chunks, config)
    model = chunks[0]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, where = {}, ["outside"]
    for layer in (module for module in model.modules() if isinstance(module, TransformerLayer)):
        layer.register_forward_pre_hook(lambda layer, inputs: where.append(layer.layer_number))
        layer.register_forward_hook(lambda layer, inputs, outputs: where.pop() and None)

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.setdefault(storage.data_ptr(), (where[-1], storage))  # held, so that no address is used twice
        return tensor

    tokens, length = config.training.micro_batch_size * config.data.seq_length, config.data.seq_length
    bounds = torch.arange(0, tokens + 1, length).int()
    inputs = torch.randint(vocab, (1, tokens)), torch.arange(length).repeat(tokens // length)[None]
    kernel = sdpa_kernel(SDPBackend.MATH) if count_flops else contextlib.nullcontext()  # the fused one is not counted
    with FlopCounterMode(display=False) as counter, kernel, DropoutOfGpus():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            precision = {"fp32_output": False} if config.precision.bf16 else {}
            packed = PackedSequences.of(bounds, bounds.diff().tolist(), inputs[1])
            logits = model(*inputs, None, packed_seq_params=packed, **precision)
            loss = token_losses(logits, inputs[0], vocab).mean()
        if count_flops:
            loss.backward()
            return counter.get_total_flops()
    total = collections.Counter()
    for place, storage in kept.values():
        total[place] += storage.nbytes()
    return total


class DropoutOfGpus(TorchFunctionMode):
    """Dropout whose mask is one byte per element, as on CUDA; on the CPU it has their dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.dropout:
            rate = (args[1:2] or [(kwargs or {}).get("p")])[0]
            training = (args[2:3] or [(kwargs or {}).get("training", True)])[0]
            return torch.native_dropout(args[0], rate, True)[0] if rate and training else args[0]
        return func(*args, **(kwargs or {}))


SMALL = "--num-layers 3 --hidden-size 256 --num-attention-heads 4 --attention-head-type multihead"
LIKE_1B = "--num-layers 2 --hidden-size 2048 --num-attention-heads 16 --bf16"  # starcoderbase-1b with fewer layers
ROTARY = SMALL.replace("--attention-head-type multihead", "--num-query-groups 2 --position-embedding-type rope --bf16")
TP2 = "--tensor-model-parallel-size 2"


@pytest.mark.parametrize(
    "flags",
    [
        f"{SMALL}",
        f"{SMALL} --bf16 --hidden-dropout 0.1 {TP2} --sequence-parallel",
        f"{SMALL} --bf16 --lora-rank 16 {TP2} --sequence-parallel",
        f"{SMALL} --bf16 --lora-rank 16 --lora-targets linear_fc1,linear_proj {TP2}",
        f"{ROTARY} --window-size 256 --untie-embeddings-and-output-weights",
        f"{LIKE_1B} --hidden-dropout 0.1",
        f"{LIKE_1B} --hidden-dropout 0.1 --lora-rank 16",
        f"{LIKE_1B} --lora-rank 16 --lora-dropout 0 --lora-targets linear_qkv,linear_proj",
        f"{LIKE_1B} --lora-rank 16 --lora-targets linear_fc2",
    ],
)
def test_activation_bytes_are_those_that_autograd_keeps(tmp_path, flags):
    kept, config, layout = activations_of(tmp_path, flags)
    hidden = 512 * config.shape.hidden_size  # elements
    # On the CPU, attention runs per document, so linear_proj, or its adapter without dropout, keeps
    # a concatenated copy of its output.
    again = not config.lora.rank or ("linear_proj" in layout.lora_targets and not layout.lora_dropout)
    copy = again * hidden // layout.tensor_parallel * layout.element_bytes
    if 1 < config.shape.num_query_groups < config.shape.num_attention_heads:
        # There, keys and values are also copied for each of a group's query heads.
        shared = 512 * config.shape.num_query_groups * config.shape.kv_channels
        copy += 2 * (hidden - shared) // layout.tensor_parallel * layout.element_bytes
    for number in range(2, config.shape.num_layers + 1):  # with LoRA the first layer's input needs no gradient
        expected = cost.layer_activation_bytes(config.shape, layout, 512)
        assert kept[number] - copy == pytest.approx(expected, rel=0.005)
    outside = cost.kept_by_head(config.shape, 512, layout, 512) + 20 * 512  # four numbers per token for the loss
    if config.model.hidden_dropout and not config.lora.rank:
        outside += hidden // (
            layout.tensor_parallel if config.parallel.sequence else 1
        )  # mask of the embedding's dropout
    if config.parallel.sequence and not config.lora.rank:
        outside -= hidden * layout.element_bytes  # gathered into a buffer that autograd does not see
    assert kept["outside"] == pytest.approx(outside, rel=0.02)


@pytest.mark.parametrize("more", ["", "--lora-rank 16", "--recompute-method block --recompute-num-layers 2"])
def test_recomputed_layers_keep_only_their_inputs(tmp_path, more):
    kept, config, layout = activations_of(tmp_path, f"{SMALL} --bf16 --recompute-granularity full {more}")
    expected = cost.kept_by_layers(config.shape, layout, 512, 3) + cost.kept_by_head(config.shape, 512, layout, 512)
    copy = 512 * 256 * 2 * ("block" in more)
    assert sum(kept.values()) - copy == pytest.approx(expected, rel=0.03)


def activations_of(tmp_path, flags):
    """What a run with `flags` keeps, on two documents of 256 tokens and 512 vocabulary entries."""
    words = (
        f"--hidden-dropout 0 --attention-dropout 0 --max-position-embeddings 256 --micro-batch-size 2 {flags}".split()
    )
    world_size = 2 if TP2 in flags else 1
    config = args_for(tmp_path, *words, world_size=world_size)
    return run_ranks(activations_of_run, world_size, config, 512)[0], config, config.layout()


def test_flops_are_those_that_torch_counts(tmp_path):
    words = """--num-layers 4 --hidden-size 256 --num-attention-heads 4 --max-position-embeddings 256 --micro-batch-size 2
        --hidden-dropout 0 --attention-dropout 0""".split()
    config = args_for(tmp_path, *words)
    (counted,) = run_ranks(activations_of_run, 1, config, 512, True)
    linear = cost.flops_per_token(config.shape.with_vocab(512), 0) * 512
    attention = cost.flops_per_token(config.shape.with_vocab(512), 256) * 512 - linear
    assert counted == linear + 2 * attention  # the math kernel computes all of s x s, twice what is causal


def test_every_flag_that_saves_memory_lowers_the_estimate():
    shape = PRESETS["starcoderbase"]

    def total(**layout):
        return cost.estimate(shape, 49152, cost.Layout(**{"num_microbatches": 8, **layout}), 8192).total

    assert total(tensor_parallel=2) < total()
    assert total(tensor_parallel=4, sequence_parallel=True) < total(tensor_parallel=4)
    assert total(data_parallel=8) < total() == total(data_parallel=8, distributed_optimizer=False)
    assert total(recompute="full") < total()
    assert total(recompute="full") < total(recompute="full", recompute_method="block", recompute_num_layers=10)
    assert total(optimizer_cpu_offload=True) < total()
    assert total(fp32_gradients=False) < total()
    assert total(lora_rank=16, lora_targets=("linear_qkv",)) < total() / 2
    assert total(pipeline_parallel=4) < total()


def test_known_gpus_are_found_and_unknown_ones_are_not_guessed():
    names = {
        "NVIDIA H100 80GB HBM3": "h100-80gb",
        "NVIDIA H100 PCIe": "h100-pcie-80gb",
        "NVIDIA H100 NVL": "h100-nvl-94gb",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA GH200 480GB": "gh200-96gb",
        "NVIDIA H200": "h200-141gb",
        "Tesla V100-SXM2-32GB": "v100-32gb",
        "NVIDIA L40S": "l40s-48gb",
        "NVIDIA A40": "a40-48gb",
    }
    assert {name: cost.find_gpu(name).name for name in names} == names
    assert cost.find_gpu("NVIDIA GeForce RTX 3090") is None
    assert cost.find_gpu("NVIDIA A10G") is None


def test_some_gpu_memory_is_left_free():
    gpu = cost.GPUS["a100-40gb"]
    sizes = [cost.Memory(gib * cost.GIB, 0, 0, 0) for gib in range(30, 41)]
    fits = [size.fits(gpu) for size in sizes]
    assert fits[0] and not fits[-1]
    assert all(a >= b for a, b in itertools.pairwise(fits))
