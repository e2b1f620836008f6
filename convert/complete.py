"""Complete a prompt with a converted model in plain transformers, to check it before publishing.

    python convert/complete.py runs/first-hf --prompt "def print_hello_world():"

Prints the prompt and the completion after it. Decoding is greedy unless --temperature is above 0.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its files would hide others'

import argparse

from megatron_ft.config.parser import Help, Parser
from megatron_ft.conversion.load_model import check_directory, load_transformers
from megatron_ft.errors import UserError, run_program
from megatron_ft.files.hub_cache import resolve_hub_cache


def main() -> None:
    """Parse the flags, check them and the model's directory, complete the prompt."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face directory with tokenizer files")
    add("--prompt", help="text to complete (default: def print_hello_world():)")
    add("--prompt-file", metavar="FILE", help="file with the text to complete")
    add("--max-new-tokens", type=int, default=64, help="longest completion; it ends earlier at end-of-text")
    add("--temperature", type=float, default=0.0, help="0 always takes the likeliest token; above 0 samples")
    add("--top-p", type=float, default=0.95, help="nucleus sampling: cumulative probability to sample from")
    add("--seed", type=int, default=1234, help="seed of sampling")
    args = parser.parse_args()
    if args.prompt is not None and args.prompt_file:
        raise UserError("--prompt and --prompt-file exclude each other; keep one")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature {args.temperature:g}: must be 0 (greedy) or above, like 0.2")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p:g}: must be above 0 and at most 1")
    directory, notice = resolve_hub_cache(Path(args.model))
    if notice:
        print(notice, file=sys.stderr)
    check_directory(directory)
    prompt = "def print_hello_world():" if args.prompt is None else args.prompt
    if args.prompt_file:
        prompt = read_prompt(Path(args.prompt_file))
    complete(directory, prompt, args)


def read_prompt(path: Path) -> str:
    """The prompt in a file. Raises UserError when it is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path}: cannot be read as text ({error})") from None


def complete(directory: Path, prompt: str, args: argparse.Namespace) -> None:
    """Print the prompt and its completion, token by token. Raises UserError if there is no room."""
    import torch
    from transformers import TextStreamer

    loaded = load_transformers(directory)
    model, tokenizer = loaded.model, loaded.tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    positions = model.config.max_position_embeddings
    room = positions - args.max_new_tokens
    if room < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: the model has {positions} positions; use fewer")
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty; give some text to complete")
    if ids.shape[1] > room:
        print(
            f"dropping the prompt's first {ids.shape[1] - room} tokens: the model has {positions} positions",
            file=sys.stderr,
        )
        ids = ids[:, -room:]
    torch.manual_seed(args.seed)
    sampling = (
        {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        if args.temperature > 0
        else {"do_sample": False}
    )
    model.generate(
        ids.to(device),
        attention_mask=torch.ones_like(ids, device=device),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=model.config.pad_token_id if model.config.pad_token_id is not None else model.config.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        **sampling,
    )


if __name__ == "__main__":
    run_program(main)
