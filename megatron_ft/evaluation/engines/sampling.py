"""Samples from a model of transformers: each depends on its own seed only.

The noise of a sample comes from its own generator, so it is the same in any batch, any shard and
after any restart, as far as the model's arithmetic is.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, StoppingCriteria
from transformers.utils.logging import disable_progress_bar

from megatron_ft.errors import UserError
from megatron_ft.evaluation.engines.engine import LEAST_NEW_TOKENS, Request, Sample
from megatron_ft.evaluation.stopping import StopRule


class SeededSampling(LogitsProcessor):
    """Temperature, nucleus, and one Gumbel draw per token: the largest score is a sample.

    `generate` must then be greedy. Source: Gumbel-max (Maddison et al., arXiv 1411.0030).
    """

    def __init__(self, seeds: list[int], temperature: float, top_p: float, device: torch.device):
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` [b, v] of the next token."""
        logits = scores.float() / self._temperature
        if self._top_p < 1:
            ordered, order = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            logits = logits.masked_fill((before >= self._top_p).gather(1, order.argsort()), -math.inf)
        noise = torch.stack([torch.rand(logits.shape[1], generator=g, device=g.device) for g in self._generators])
        return logits - torch.log(-torch.log(noise.clamp_min(1e-20)))  # type: ignore[return-value]


class RowsFinish(StoppingCriteria):
    """Ends each row of a batch by a `StopRule` over its new text."""

    def __init__(self, rule: StopRule, tokenizer: Any, prompt_tokens: int):
        self._rule, self._tokenizer, self._start = rule, tokenizer, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """bool [b]: which rows are finished."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], clean_up_tokenization_spaces=False)
        return torch.tensor([self._rule.finished(text) for text in texts], device=input_ids.device)


class LocalModel:
    """A Hugging Face directory, loaded for generation on the GPU, or the CPU without one.

    Raises UserError if transformers cannot load it, or `max_length` exceeds its positions.
    """

    at_once = 1

    def __init__(self, directory: Path, temperature: float, top_p: float, max_length: int):
        disable_progress_bar()
        self._directory = directory
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True).eval()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{directory}: transformers cannot load it ({reason}); see convert/verify.py") from None
        positions = getattr(model.config, "n_positions", None) or model.config.max_position_embeddings
        if max_length > positions:
            raise UserError(f"--max-length {max_length}: the model has {positions} positions; use at most as many")
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._temperature, self._top_p, self._max_length = temperature, top_p, max_length
        self.eos: str | None = self.tokenizer.eos_token
        self._ends = {self.tokenizer.eos_token_id, model.config.eos_token_id} - {None}

    def identity(self) -> dict[str, Any]:
        """The directory, the sizes of its weights, and a digest of its configuration."""
        names = ("config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json")
        files = [self._directory / name for name in names]
        return {
            "model": str(self._directory.resolve()),
            "model_files": {path.name: path.stat().st_size for path in files if path.is_file()},
            "config_sha256": hashlib.sha256(files[0].read_bytes()).hexdigest(),
        }

    def sample(self, request: Request) -> list[Sample]:
        """One sample per number, in one batch."""
        return self._sample_or_halve(request.prompt, list(map(request.seed_of, request.numbers)), request.rule)

    @torch.inference_mode()
    def _sample_or_halve(self, prompt: str, seeds: list[int], rule: StopRule) -> list[Sample]:
        """One sample per seed. The batch is halved where memory does not suffice."""
        try:
            return self._sample(prompt, seeds, rule)
        except torch.cuda.OutOfMemoryError:
            if len(seeds) == 1:
                raise UserError(
                    f"one sample of {self._max_length} tokens exceeds GPU memory; use a smaller --max-length"
                ) from None
        torch.cuda.empty_cache()
        half = len(seeds) // 2
        return self._sample_or_halve(prompt, seeds[:half], rule) + self._sample_or_halve(prompt, seeds[half:], rule)

    def _sample(self, prompt: str, seeds: list[int], rule: StopRule) -> list[Sample]:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        cut = 0
        if ids.shape[1] >= self._max_length:
            cut = ids.shape[1] - self._max_length + min(LEAST_NEW_TOKENS, self._max_length // 2)
        ids = ids[:, cut:].to(self._model.device).repeat(len(seeds), 1)
        processors: list[LogitsProcessor] = []
        if self._temperature > 0:
            processors.append(SeededSampling(seeds, self._temperature, self._top_p, self._model.device))
        rows = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_length=self._max_length,
            pad_token_id=min(self._ends, default=0),
            logits_processor=processors,
            stopping_criteria=[RowsFinish(rule, self.tokenizer, ids.shape[1])],
        )[:, ids.shape[1] :].tolist()
        return [self._finished(row, rule, cut, seed) for row, seed in zip(rows, seeds, strict=True)]

    def _finished(self, row: list[int], rule: StopRule, cut: int, seed: int) -> Sample:
        """The sample in a row of tokens, without end of text and what was padded after it."""
        end = next((i for i, token in enumerate(row) if token in self._ends), len(row))
        text = str(self.tokenizer.decode(row[:end], clean_up_tokenization_spaces=False))
        finish = "stop" if rule.finished(text) else "eos" if end < len(row) else "length"
        return Sample(text, end, finish, seed, cut)
