"""What a conversion has written."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Converted:
    """A new checkpoint, Hugging Face directory or PEFT adapter.

    `format`: huggingface, peft, torch_dist or legacy. `nbytes`: size of the weights. `precision`:
    such as bfloat16. `vocab_size`: rows of the embedding, those that pad it included.
    """

    path: Path
    format: str
    tensors: int
    nbytes: int
    precision: str
    vocab_size: int
