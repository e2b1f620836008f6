"""A run's tokenizer as files: which files make it, how it is recognized, and the copy in --save.

    DIR/tokenizer.json      copy of a --tokenizer-file that is a file, under its own name
    DIR/tokenizer/          copy of one that is a Hugging Face directory: only its tokenizer files

Conversion takes the copy, so it does not need the path that the run was given. Two digests answer
two questions, and both are stored, so neither can replace the other:

- `vocabulary_digest`: do token ids mean the same? Covers only the file that maps text to ids.
  Stored with a tokenized dataset (`data.provenance`), which has no use for the other files.
- `fingerprint`: is it the same tokenizer in every respect? Covers all its files, among them special
  tokens and the chat template. Stored in a checkpoint's manifest and compared on a resume.
"""

import hashlib
from pathlib import Path

from megatron_ft.files.atomic import replace_file
from megatron_ft.files.checksum import file_checksum
from megatron_ft.tokenizer.tokenizer import SENTENCEPIECE_FILES

# The files that transformers reads a tokenizer from.
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
    """`path` if it is a file, else the tokenizer files of the directory; [] if there are none."""
    if path.is_file():
        return [path]
    return [path / name for name in NAMES if (path / name).is_file()]


def vocabulary_digest(path: Path) -> str | None:
    """sha256 of the file that maps text to ids: `path`, or in a Hugging Face directory its
    tokenizer.json or SentencePiece model. None if no single file does."""
    if path.is_dir():
        files = [path / name for name in ("tokenizer.json", *SENTENCEPIECE_FILES)]
        path = next((file for file in files if file.is_file()), path)
    return file_checksum(path) if path.is_file() else None


def fingerprint(path: Path) -> str | None:
    """Names and sha256 of all files of a tokenizer, like `tokenizer.json (sha256 0123456789ab)`;
    equal for all copies of it. None if there are no tokenizer files."""
    files = files_of(path)
    if not files:
        return None
    digests = [file_checksum(file) for file in files]
    if path.is_dir():  # also with one file: a directory's special tokens are found in another way
        digests = [hashlib.sha256("\n".join(digests).encode()).hexdigest()]
    names = ", ".join(file.name for file in files)
    return f"{'directory of ' * path.is_dir()}{names} (sha256 {digests[0][:12]})"


def keep(path: Path, save: Path) -> None:
    """Copy the tokenizer into the save directory, except files already there. Raises OSError."""
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


def find(checkpoint: Path, given: str | None, expected: str | None) -> Path | None:
    """The tokenizer of a checkpoint: in its directory `checkpoint`, in the save directory above it,
    or at the path `given` as --tokenizer-file. None if there is none.

    `expected` is the `fingerprint` stored in the manifest: a tokenizer with another one is not the
    run's. `given` and `expected` are None if unknown.
    """
    save = checkpoint.resolve().parent
    candidates = [
        checkpoint,
        *([save / Path(given).name] if given else []),
        save / "tokenizer",
        *([Path(given)] if given else []),
    ]
    matching = (path for path in candidates if files_of(path) and expected in (None, fingerprint(path)))
    return next(matching, None)
