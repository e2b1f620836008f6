"""How transformers loads a tokenizer directory: a program of its own that `transformers_view` runs.

It reads {"directory": ..., "texts": [...], "spec": bool} from stdin and writes one JSON object to
stdout: the attributes of `transformers_view.TransformersView`, or {"error": reason}. As a process
it needs no torch, which takes most of the time to import, and neither messages nor crashes of
foreign tokenizers reach the caller. Nothing is downloaded and no code of the directory runs.
"""

import json
import sys
from typing import Any


def main() -> None:
    request = json.load(sys.stdin)
    output, sys.stdout = sys.stdout, sys.stderr
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python marks a module as not installed
    try:
        answer = view(request["directory"], request["texts"], request["spec"])
    except BaseException as error:  # many types, and that of a panic in Rust
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        answer = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
    json.dump(answer, output)
    output.flush()


def view(directory: str, texts: list[str], with_spec: bool) -> dict[str, Any]:
    import transformers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    vocab = tokenizer.get_vocab()
    return {
        "version": transformers.__version__,
        "class_name": type(tokenizer).__name__,
        "count": len(tokenizer),
        "last_id": max(vocab.values(), default=-1),
        "pad": tokenizer.pad_token_id,
        "eos": tokenizer.eos_token_id,
        "named": {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        "added_tokens": [
            {**token.__getstate__(), "id": i} for i, token in sorted(tokenizer.added_tokens_decoder.items())
        ],
        "ids": [encode(tokenizer, text) for text in texts],
        "spec": json.loads(tokenizer.backend_tokenizer.to_str()) if with_spec else None,
    }


def encode(tokenizer: Any, text: str) -> list[int] | None:
    """The ids of a text, None if it has a character that the tokenizer does not know."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception:  # the tokenizers library raises bare Exception
        return None


if __name__ == "__main__":
    main()
