"""Shared by the tests of conversion: run a program in a process with torch loaded, tiny models."""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import torch
from ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]


def _run(program: str, argv: list[str]) -> tuple[int, str, str]:
    from megatron_ft.errors import run_program

    sys.argv = [program, *argv]
    spec = importlib.util.spec_from_file_location("program", ROOT / program)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            spec.loader.exec_module(module)
            run_program(module.main)
        except SystemExit as exit:
            status = int(exit.code or 0)
    return status, out.getvalue(), err.getvalue()


def convert(program: str, *argv: str | Path, status: int = 0) -> str:
    """Run convert/<program>.py and return its output; it must exit with `status`."""
    [(ended, out, err)] = run_ranks(_run, 1, f"convert/{program}.py", [str(word) for word in argv])
    assert ended == status, f"{program} {argv} ended with {ended}\n{out}\n{err}"
    return out + err


def refusal(program: str, *argv: str | Path) -> str:
    """The one line that a usage error must print."""
    printed = convert(program, *argv, status=2)
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in printed, printed
    return lines[0]


def tiny_hf(directory: Path, *, dtype: torch.dtype = torch.float32, multi_query: bool = True, vocab: int = 300) -> Path:
    """A random GPTBigCode of 4 layers and 8 heads as transformers saves it, with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(1)
    config = GPTBigCodeConfig(
        n_layer=4, n_head=8, n_embd=64, n_inner=256, n_positions=64, vocab_size=vocab, multi_query=multi_query,
        bos_token_id=0, eos_token_id=0, initializer_range=0.5, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    GPTBigCodeForCausalLM(config).to(dtype).save_pretrained(directory)
    words = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return directory
