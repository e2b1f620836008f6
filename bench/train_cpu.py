"""Time a training step of a 60M-parameter StarCoder on the CPU, against transformers' GPTBigCode.

    python bench/train_cpu.py

Both start from the same weights, train on the same packed sequence and do the complete step in fp32
on one thread: forward, loss, backward, clipping, AdamW. They take turns, and the fastest step of
each is shown in CPU seconds, so that other work on the machine matters little. transformers is
timed twice: with the sequence as one document, which is faster but not the same computation, and
with document boundaries from position_ids, for which it builds a mask. Last comes the overhead of
the adapter that lets Megatron-Core run without a GPU.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's tokenize.py would hide Python's

import os
import random
import tempfile
import time
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from megatron_ft.checkpoint.load_weights import load_weights
from megatron_ft.config.arguments import parse_args
from megatron_ft.config.parser import Help, Parser
from megatron_ft.data.batch import Batch
from megatron_ft.engine import device
from megatron_ft.errors import run_program
from megatron_ft.weights.open import open_weights

SHAPE = "--num-layers 12 --hidden-size 512 --num-attention-heads 8 --max-position-embeddings 1024 --hidden-dropout 0 --attention-dropout 0"
VOCABULARY = 49152


def main() -> None:
    """Build both models, time them and print a table."""
    parser = Parser(prog="bench/train_cpu.py", description=__doc__, formatter_class=Help)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each, after one warm-up step")
    parser.add_argument("--seq-length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--document-tokens", type=int, default=250, help="mean document length in tokens")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    device.set_up_device()

    with tempfile.TemporaryDirectory() as folder:
        hugging_face = hugging_face_model(flags.seq_length)
        hugging_face.save_pretrained(folder)
        ours = MegatronStep(folder, flags.seq_length)
    row = packed_row(flags.seq_length, flags.document_tokens)
    documents = len(row.cu_seqlens) - 1
    print(
        f"{sum(p.numel() for p in hugging_face.parameters()):,} parameters, fp32, one thread; "
        f"sequence of {flags.seq_length} tokens, {documents} documents"
    )
    packed, unpacked = HuggingFaceStep(hugging_face, row.position_ids), HuggingFaceStep(hugging_face, None)
    ours_loss, theirs_loss = ours.loss(row), packed.loss(row)
    print(f"first loss: {ours_loss:.6f} Megatron-FT, {theirs_loss:.6f} transformers, documents separate")

    steps = {
        "Megatron-FT": ours.step,
        "transformers, one document": unpacked.step,
        "transformers, documents separate": packed.step,
    }
    seconds = time_in_turns(steps, row, flags.steps)
    fastest = {name: min(times) for name, times in seconds.items()}
    print(f"\n{'step':<32}{'seconds':>9}{'tokens/s':>10}{'ratio':>8}")
    for name, best in fastest.items():
        print(f"{name:<32}{best:>9.3f}{flags.seq_length / best:>10,.0f}{best / fastest['Megatron-FT']:>8.2f}")

    calls, cost = adapter_calls(ours, row), adapter_cost()
    with_it, without = adapter_on_and_off(ours, row, flags.steps)
    fraction = calls * cost / fastest["Megatron-FT"]
    print(f"\nCPU adapter: {calls:,} calls per step x {1e6 * cost:.1f} us = {fraction:.2%} of the step")
    print(f"forward and backward only: {with_it:.3f} s with it, {without:.3f} s without ({with_it / without - 1:+.1%})")


def hugging_face_model(seq_length: int) -> torch.nn.Module:
    """transformers' GPTBigCode of the benchmark's shape, random weights, SDPA attention."""
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=VOCABULARY, n_positions=seq_length, n_embd=512, n_layer=12, n_head=8, n_inner=2048,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    return GPTBigCodeForCausalLM(config)


def packed_row(seq_length: int, document_tokens: int) -> Batch:
    """One full sequence of documents of about `document_tokens` tokens, with loss everywhere."""
    draw, lengths = random.Random(0), []
    while (left := seq_length - sum(lengths)) > 0:
        lengths.append(min(left, max(8, int(draw.gauss(document_tokens, document_tokens / 3)))))
    segments = torch.cat([torch.full((n,), i + 1, dtype=torch.int32) for i, n in enumerate(lengths)])[None]
    tokens = torch.randint(VOCABULARY, (1, seq_length + 1), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        loss_mask=torch.ones(1, seq_length),
        segment_ids=segments,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
    )


class MegatronStep:
    """A training step of this package, as in finetune.py."""

    def __init__(self, weights: str, seq_length: int) -> None:
        from megatron_ft.engine.model import build_model, wrap_for_data_parallel
        from megatron_ft.engine.optimizer import build_optimizer
        from megatron_ft.engine.parallel import initialize

        words = f"{SHAPE} --seq-length {seq_length} --max-position-embeddings {seq_length} --train-iters 1 --data-prefix none"
        self.config = parse_args([*words.split(), "--tokenizer-file", weights])
        initialize(self.config)
        chunks = build_model(self.config, self.config.shape.with_vocab(VOCABULARY), VOCABULARY)
        load_weights(open_weights(weights), chunks)
        self.model = wrap_for_data_parallel(self.config, chunks)
        self.optimizer = build_optimizer(self.config, self.model)

    def step(self, row: Batch) -> None:
        """Forward, loss, backward, clipping, Adam."""
        from megatron_ft.engine.step import forward_backward

        micro = self._micro(row)
        forward_backward(self.config, self.model, self.optimizer, [micro], micro.weight, VOCABULARY)
        self.optimizer.step()

    def loss(self, row: Batch) -> float:
        """Mean loss, no step."""
        with torch.no_grad():
            return self._mean_loss(row).item()

    def forward_and_backward(self, row: Batch) -> None:
        """Only the two passes, without Megatron's schedule."""
        self._mean_loss(row).backward()

    def _mean_loss(self, row: Batch) -> torch.Tensor:
        from megatron_ft.engine.loss import token_losses
        from megatron_ft.engine.packed_attention import PackedSequences

        micro = self._micro(row)
        packed = PackedSequences.of(micro.cu_seqlens, micro.lengths)
        logits = self.model[0](micro.tokens, micro.position_ids, None, packed_seq_params=packed)
        return token_losses(logits, micro.labels, VOCABULARY).mean()

    def _micro(self, row: Batch):
        from megatron_ft.training.batches import micro_batch_from

        return micro_batch_from(row, row.loss_mask, "token", [0])


class HuggingFaceStep:
    """A training step of transformers' model; `position_ids` separate the documents."""

    def __init__(self, model: torch.nn.Module, position_ids: torch.Tensor | None) -> None:
        self.model, self.position_ids = model.train(), position_ids
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)

    def step(self, row: Batch) -> None:
        """Forward, loss, backward, clipping, AdamW, as in a plain training loop."""
        self._mean_loss(row).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self, row: Batch) -> float:
        """Mean loss, no step."""
        with torch.no_grad():
            return self._mean_loss(row).item()

    def _mean_loss(self, row: Batch) -> torch.Tensor:
        logits = self.model(row.tokens, position_ids=self.position_ids).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY), row.labels.view(-1))


def time_in_turns(steps: dict[str, Callable], row: Batch, count: int) -> dict[str, list[float]]:
    """Seconds of `count` steps of each, taken in turns, after one untimed round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(count + 1):
        for name, step in steps.items():
            if name != "Megatron-FT":  # plain PyTorch runs without the adapter
                with adapter_off():
                    elapsed = timed(step, row)
            else:
                elapsed = timed(step, row)
            if turn:
                seconds[name].append(elapsed)
    return seconds


def timed(step: Callable, row: Batch) -> float:
    """CPU seconds of one call."""
    begun = time.process_time()
    step(row)
    return time.process_time() - begun


class adapter_off:
    """Context without the mode that emulates CUDA on the CPU."""

    def __enter__(self) -> None:
        device._entered.__exit__(None, None, None)

    def __exit__(self, *exception) -> None:
        device._entered.__enter__()


def adapter_calls(ours: MegatronStep, row: Batch) -> int:
    """Number of calls per step that the adapter intercepts."""
    calls = 0
    original = device.CpuForCuda.__torch_function__

    def counting(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        return original(self, *args, **kwargs)

    device.CpuForCuda.__torch_function__ = counting
    try:
        ours.step(row)
    finally:
        device.CpuForCuda.__torch_function__ = original
    return calls


def adapter_cost(count: int = 50_000) -> float:
    """Seconds the adapter adds to one call."""

    def loop() -> float:
        number = torch.zeros(1)
        begun = time.process_time()
        for _ in range(count):
            number.add_(1)
        return (time.process_time() - begun) / count

    with adapter_off():
        without = min(loop() for _ in range(3))
    return min(loop() for _ in range(3)) - without


def adapter_on_and_off(ours: MegatronStep, row: Batch, count: int) -> tuple[float, float]:
    """Fastest forward and backward with and without the adapter, taken in turns."""
    with_it, without = [], []
    for _ in range(count):
        with_it.append(timed(ours.forward_and_backward, row))
        with adapter_off():
            without.append(timed(ours.forward_and_backward, row))
    return min(with_it), min(without)


if __name__ == "__main__":
    run_program(main)
