"""A run's tokenizer as files: which files make it, how it is recognized, and the copy in --save.

    DIR/tokenizer.json      copy of a --tokenizer-file that is a file, under its own name
    DIR/tokenizer/          copy of one that is a Hugging Face directory: only its tokenizer files

Conversion takes the copy, so it does not need the path that the run was given. Two digests answer
two questions, and both are stored, so neither can replace the other:

- `vocabulary_digest`: do token ids mean the same? Covers only the file that maps text to ids, and
  tokens that other files add to it. Stored with a tokenized dataset (`data.provenance`), which has
  no use for the rest.
- `fingerprint`: is it the same tokenizer in every respect? Covers all its files, among them special
  tokens and the chat template. Stored in a checkpoint's manifest and compared on a resume.
"""

import errno
import hashlib
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.atomic import replace_file
from megatron_ft.files.checksum import file_checksum
from megatron_ft.files.hub_cache import leads_outside, resolve_hub_cache
from megatron_ft.tokenizer.declared import Declared, identity
from megatron_ft.tokenizer.spec import read_spec
from megatron_ft.tokenizer.tokenizer import SENTENCEPIECE_FILES, vocabulary_file

# The files that transformers reads a tokenizer from. What is in the first ones is checked: they
# hold a vocabulary. The others are copied as they are, and so must not link to any file there is.
VOCABULARIES = ("tokenizer.json", *SENTENCEPIECE_FILES)
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
TEMPLATES = "additional_chat_templates"


def files_of(path: Path) -> list[Path]:
    """`path` if it is a file, else the tokenizer files of the directory; [] if there are none.

    Raises UserError if one of them is a link to a file elsewhere: its content would be copied into
    what people publish.
    """
    if path.is_file():
        return [path]
    path, _ = resolve_hub_cache(path)
    templates = sorted(file for file in (path / TEMPLATES).glob("*.jinja") if not file.name.startswith("."))
    files = [file for file in (*(path / name for name in NAMES), *templates) if file.is_file()]
    for file in files:
        if file.name not in VOCABULARIES and leads_outside(file, path):
            raise UserError(
                f"{file}: a link to {file.resolve()}, outside of the tokenizer's directory; copy the file there if it belongs to it"
            )
    return files


def relative_name(file: Path, path: Path) -> str:
    """The name of one of `files_of(path)` within a copy: `additional_chat_templates/tool_use.jinja`
    or a plain name."""
    return f"{TEMPLATES}/{file.name}" if file != path and file.parent.name == TEMPLATES else file.name


def vocabulary_digest(path: Path) -> str | None:
    """sha256 of the file that maps text to ids: `path`, or in a Hugging Face directory its
    tokenizer.json or SentencePiece model. None if no single file does.

    Tokens that other files of the directory add change it. Raises UserError if those are damaged.
    """
    path, _ = resolve_hub_cache(path)
    if path.is_file():
        return file_checksum(path)
    file = vocabulary_file(path) if path.is_dir() else None
    if file is None:
        return None
    digest = file_checksum(file)
    new = Declared.read(path).beyond(read_spec(file)) if file.suffix == ".json" else []
    return hashlib.sha256(f"{digest}\n{identity(new)}".encode()).hexdigest() if new else digest


def fingerprint(path: Path) -> str | None:
    """Names and sha256 of all files of a tokenizer, like `tokenizer.json (sha256 0123456789ab)`;
    equal for all copies of it. None if there are no tokenizer files."""
    files = files_of(path)
    if not files:
        return None
    digests = [file_checksum(file) for file in files]
    if path.is_dir():  # also with one file: a directory's special tokens are found in another way
        digests = [hashlib.sha256("\n".join(digests).encode()).hexdigest()]
    names = ", ".join(relative_name(file, path) for file in files)
    return f"{'directory of ' * path.is_dir()}{names} (sha256 {digests[0][:12]})"


def keep(path: Path, save: Path) -> None:
    """Copy the tokenizer into the save directory, except files already there. Raises OSError, or
    UserError like `files_of`."""
    target = save
    files = {relative_name(file, path): file for file in files_of(path)}
    if path.is_dir():
        target = save / "tokenizer"
        target.mkdir(exist_ok=True)
        for stale in files_of(target):
            if files and relative_name(stale, target) not in files:
                stale.unlink()
    for name, file in files.items():
        content = file.read_bytes()
        if not (target / name).is_file() or (target / name).read_bytes() != content:
            (target / name).parent.mkdir(exist_ok=True)
            replace_file(target / name, content)


def find(checkpoint: Path, given: str | None, expected: str | None) -> Path | None:
    """The tokenizer of a checkpoint: in its directory `checkpoint`, in the save directory above it,
    or at the path `given` as --tokenizer-file. None if there is none.

    `expected` is the `fingerprint` stored in the manifest: a tokenizer with another one is not the
    run's. `given` and `expected` are None if unknown.
    """
    # An iteration may be a link: then its save directory is where the link is, or where it leads.
    saves = dict.fromkeys((checkpoint.absolute().parent, checkpoint.resolve().parent))
    candidates = [
        checkpoint,
        *(save / Path(given).name for save in saves if given),
        *(save / "tokenizer" for save in saves),
        *([Path(given)] if given else []),
    ]
    matching = (path for path in candidates if _has_files(path) and expected in (None, fingerprint(path)))
    return next(matching, None)


def _has_files(path: Path) -> bool:
    """Whether `files_of` finds any; a name in a manifest may be one that no file can have."""
    if "\0" in str(path):
        return False
    try:
        return bool(files_of(path))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False
