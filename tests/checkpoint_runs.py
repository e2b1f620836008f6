"""Tiny training runs for tests of checkpoints: data, flags, ranks to be killed, final bytes."""

import hashlib
import json
import os
import random
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch
from ranks import _context, _rank_main, free_port, run_ranks
from token_files import write_documents

FLAGS = (
    "--preset tiny --num-layers 2 --hidden-size 32 --num-attention-heads 4 --max-position-embeddings 64 --from-scratch "
    "--make-vocab-size-divisible-by 16 --seq-length 32 --global-batch-size 4 --lr 1e-3 --save-interval 2 --log-interval 1000 "
    "--eval-interval 0 --num-workers 1 --distributed-timeout-minutes 1 --watchdog-mins 2"
)
DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
LAYOUTS = {  # name: (ranks, flags)
    "1": (1, ""),
    "DP2": (2, ""),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "TP2 DP2": (4, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "TP2 PP2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
}


def write_inputs(folder: Path) -> str:
    """Write two small datasets, a blend of them, a byte-level tokenizer; the flags to use them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    draw = random.Random(7)
    for name in ("first", "second"):
        documents = [
            (
                [draw.randrange(1, 257) for _ in range(draw.randrange(1, 12))],
                [draw.randrange(1, 257) for _ in range(9)] + [0],
            )
            for _ in range(60)
        ]
        write_documents(folder / name, documents)
    (folder / "train.txt").write_text(f"train: 0.7 0:0.8 {folder / 'first'}, 0.3 0:0.8 {folder / 'second'}\n")
    (folder / "valid.txt").write_text(f"valid: 1.0 0.8:1 {folder / 'first'}\n")
    return (
        f"--train-weighted-split-paths-path {folder / 'train.txt'} --valid-weighted-split-paths-path {folder / 'valid.txt'} "
        f"--tokenizer-file {folder / 'tokenizer.json'}"
    )


def train(words: list[str]) -> tuple[int | str, list[str]]:
    """Run training on this rank; its exit status or error line, and the log of its start."""
    from megatron_ft.checkpoint.checkpointer import Checkpointer
    from megatron_ft.errors import UserError
    from megatron_ft.finetune import main

    reasons: list[str] = []
    began = Checkpointer.start

    def start(self, state):
        found = began(self, state)
        reasons.extend(found.reasons)
        return found

    Checkpointer.start = start
    try:
        return main(words), reasons
    except UserError as error:
        return f"error: {error}", reasons


def run(inputs: str, save: Path, more: str, layout: str = "1") -> tuple[int | str, str]:
    """Run training once; its exit status or error line, and the log of its start."""
    ranks, flags = LAYOUTS[layout]
    words = FLAGS.replace("--from-scratch", "") if "--load" in more else FLAGS
    results = run_ranks(train, ranks, f"{words} {flags} {inputs} --save {save} {more}".split())
    return results[0][0], "\n".join(results[0][1])


def state_and_checkpointer(words: list[str]):
    """What a run builds before training, without data: config, TrainState, new Checkpointer."""
    from megatron_ft.checkpoint.checkpointer import Checkpointer
    from megatron_ft.checkpoint.train_state import TrainState
    from megatron_ft.config.arguments import parse_args
    from megatron_ft.engine import parallel
    from megatron_ft.engine.device import set_up_device
    from megatron_ft.engine.model import build_model, wrap_for_data_parallel
    from megatron_ft.engine.optimizer import build_optimizer
    from megatron_ft.training.schedule import build_scheduler, plan_length

    config = parse_args(words, int(os.environ["WORLD_SIZE"]))
    set_up_device(config)
    parallel.initialize(config)
    shape = config.shape.with_vocab(257)
    model = wrap_for_data_parallel(config, build_model(config, shape, 272))
    optimizer = build_optimizer(config, model)
    state = TrainState(model, optimizer, build_scheduler(config, optimizer, plan_length(config, 100)))
    return config, state, Checkpointer(config, shape, {})


class FusedAdam(torch.optim.Optimizer):
    """Adam with the state of Transformer Engine's and apex's.

    Steps are counted in the parameter groups, moments are made at the first step.
    """

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode, **others):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            step = group["step"] = group.get("step", 0) + 1
            for main in group["params"]:
                state = self.state[main]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(main), "exp_avg_sq": torch.zeros_like(main)}
                for moment, beta, value in zip(state.values(), group["betas"], (main.grad, main.grad**2), strict=True):
                    moment.lerp_(value, 1 - beta)
                first, second = (m / (1 - beta**step) for m, beta in zip(state.values(), group["betas"], strict=True))
                main -= group["lr"] * (first / (second.sqrt() + group["eps"]) + group["weight_decay"] * main)


def replace_adam(optimizer: type) -> None:
    """Replace the Adam that Megatron-Core imports from Transformer Engine."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    optimizers.Adam = distrib_optimizer.Adam = optimizer
    optimizers.USING_PYTORCH_OPTIMIZER = False


def optimizer_steps(words: list[str], until: int, adam: str = "torch") -> dict:
    """Start or resume a run, take only optimizer steps up to iteration `until`, and save.

    Gradients are random, seeded by the iteration. With `adam` "offloaded" the CPU acts as host and
    GPU, "fused" uses `FusedAdam`. Returns the kind of start, the steps taken, the optimizer's count
    of them, digests of all weights after each, and the largest change of a weight in the first.
    """
    from engine_runs import tell_host_from_gpu

    from megatron_ft.checkpoint import optimizer_state

    if adam == "offloaded":
        tell_host_from_gpu()
    if adam == "fused":
        replace_adam(FusedAdam)
    # Without forward passes nothing gathers the weights.
    _, state, checkpointer = state_and_checkpointer([*words, "--no-overlap-param-gather"])
    (part,) = optimizer_state.parts(state.optimizer)
    taken: list[int] = []
    part.optimizer.register_step_post_hook(lambda *_: taken.append(state.iteration))
    kind = checkpointer.start(state).kind
    weights = list(state.model[0].parameters())
    mains = [main for _, main, _, _ in optimizer_state.owned(part)]
    before, digests, moved = [w.detach().float() for w in weights], [], None
    while state.iteration < until:
        draw = torch.Generator().manual_seed(state.iteration)
        for parameter in weights:
            parameter.main_grad.normal_(generator=draw)
        state.optimizer.step()
        state.scheduler.step(increment=4)
        state.iteration += 1
        digests.append(digest_of([*weights, *mains]))
        moved = moved or max((w - b).abs().max().item() for w, b in zip(weights, before, strict=True))
    checkpointer.save(state)
    checkpointer.finish()
    count = optimizer_state.get_step(state.optimizer)
    return {"kind": kind, "taken": taken, "count": count, "digests": digests, "moved": moved}


def digest_of(tensors: list[torch.Tensor]) -> str:
    """sha256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def wait_for_a_slow_rank(timeout_minutes: float, seconds: float) -> str:
    """ "met" if rank 0 waits for rank 1, which is `seconds` late; else "gave up"."""
    import torch.distributed as dist

    from megatron_ft.checkpoint import collective

    dist.init_process_group("gloo")
    collective.MINUTES = 0  # otherwise at least half an hour
    ranks = collective.Collective(timeout_minutes)
    ranks.all_of("ready")
    time.sleep(seconds * ranks.rank)
    try:
        ranks.all_of("done")
    except RuntimeError:
        return "gave up"
    return "met"


class Ranks:
    """Ranks that a test may send signals to.

    with Ranks(function, 2, words) as ranks:
        ranks.signal(signal.SIGTERM)
        ranks.results()
    """

    def __init__(self, function, world_size: int, *args) -> None:
        port = free_port()
        self.processes, self.connections = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank_main, args=(theirs, function, rank, world_size, port, {}, args))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def signal(self, number: int) -> None:
        """Send a signal to every running rank."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    @property
    def running(self) -> bool:
        """Whether any rank is running."""
        return any(process.is_alive() for process in self.processes)

    def results(self, timeout: float = 300) -> list:
        """What every rank returned, None for one that was killed. Raises if a rank raised."""
        found = []
        for connection in self.connections:
            assert wait([connection], timeout), "a rank has not ended"
            try:
                ok, value = connection.recv()
            except EOFError:
                ok, value = True, None
            assert ok, value
            found.append(value)
        for process in self.processes:
            process.join(10)
        return found


def iterations_done(save: Path) -> int:
    """Last iteration in a run's metrics file."""
    try:
        lines = (save / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["iteration"] if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


def wait_for_iteration(ranks: Ranks, save: Path, iteration: int, timeout: float = 300) -> None:
    """Return once the run has finished that iteration, or has ended."""
    until = time.monotonic() + timeout
    while ranks.running and iterations_done(save) < iteration:
        assert time.monotonic() < until, f"iteration {iteration} was not reached"
        time.sleep(0.01)


def full_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every full tensor of a checkpoint, weights and optimizer."""
    from megatron_ft.weights.torch_dist_reader import TorchDistFiles

    files, found = TorchDistFiles(directory), {}
    for key in sorted(files.tensors):
        full = torch.zeros(files.shape(key), dtype=files.tensors[key].properties.dtype)
        for chunk in files.chunks_of(key):
            full[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] = files.chunk(chunk)
        found[key] = full
    return found


def tensor_bytes(directory: Path) -> dict[str, str]:
    """Digests of all `full_tensors`."""
    tensors = full_tensors(directory)
    return {key: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for key, t in tensors.items()}


def steps(save: Path) -> list[dict]:
    """The metrics of every step, without those that depend on time."""
    timing = {
        "step_seconds",
        "tokens_per_second",
        "tflops_per_gpu",
        "mfu",
        "memory_bytes",
        "time",
        "part",
    }  # part: number of the start
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def final_state(save: Path) -> tuple:
    """What must be reproducible of a finished run: weights, optimizer, counters and metrics."""
    newest = max(save.glob("iter_*"))
    state = json.loads((newest / "manifest.json").read_text())["state"]
    return newest.name, tensor_bytes(newest), state, steps(save)
