"""The tokenizer of a run as files: what of a path makes it, its digest, the copy that the save directory keeps.

    DIR/tokenizer.json      kept of a --tokenizer-file that is a file, under its own name
    DIR/tokenizer/          kept of one that is a Hugging Face directory: those of its files that make the tokenizer

A resume compares the digest, conversion takes the copy: neither needs the path that the run was given.
"""

import hashlib
from pathlib import Path

from megatron_ft.files.atomic import replace_file
from megatron_ft.files.checksum import file_checksum
from megatron_ft.tokenizer.tokenizer import SENTENCEPIECE_FILES

# What transformers reads a tokenizer from.
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    *SENTENCEPIECE_FILES,
)


def files_of(path: Path) -> list[Path]:
    """The file, or those of a directory that make a tokenizer; none where there is neither."""
    if path.is_file():
        return [path]
    return [path / name for name in NAMES if (path / name).is_file()]


def digest_of(tokenizer: Path) -> str | None:
    """sha256 of a tokenizer's file; of the one in a Hugging Face directory; None where there is no single file."""
    if tokenizer.is_dir():
        files = [tokenizer / name for name in ("tokenizer.json", *SENTENCEPIECE_FILES)]
        tokenizer = next((file for file in files if file.is_file()), tokenizer)
    return hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None


def describe(path: Path) -> str | None:
    """Names and sha256 of the content, wherever it lies: `tokenizer.json (sha256 0123456789ab)`. None where there is none."""
    files = files_of(path)
    if not files:
        return None
    digests = [file_checksum(file) for file in files]
    if path.is_dir():  # a directory with one file is not that file: its special tokens are found another way
        digests = [hashlib.sha256("\n".join(digests).encode()).hexdigest()]
    return f"{'directory of ' * path.is_dir()}{', '.join(file.name for file in files)} (sha256 {digests[0][:12]})"


def keep(path: Path, save: Path) -> None:
    """Make the save directory hold this tokenizer; what it holds already is left alone. Raises OSError."""
    target = save
    if path.is_dir():
        target = save / "tokenizer"
        target.mkdir(exist_ok=True)
        kept = {file.name for file in files_of(path)}
        for stale in files_of(target):
            if kept and stale.name not in kept:
                stale.unlink()
    for file in files_of(path):
        content = file.read_bytes()
        if not (target / file.name).is_file() or (target / file.name).read_bytes() != content:
            replace_file(target / file.name, content)


def find(checkpoint: Path, given: str | None, digest: str | None) -> Path | None:
    """The tokenizer of a checkpoint, `checkpoint` being an iteration's directory: in it, kept beside it, or where the run had it.

    `given` is the run's --tokenizer-file. `digest` is what `describe` said when the checkpoint was saved: a tokenizer of other content
    is not the run's. Both are None where they are not known.
    """
    save = checkpoint.resolve().parent
    places = [
        checkpoint,
        *([save / Path(given).name] if given else []),
        save / "tokenizer",
        *([Path(given)] if given else []),
    ]
    return next((place for place in places if files_of(place) and digest in (None, describe(place))), None)
