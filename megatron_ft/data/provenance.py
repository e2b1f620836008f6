"""What a tokenized dataset was made from: `PREFIX_made_from.json`, next to the token files.

preprocess/tokenize.py and merge.py write it. merge.py reads it to refuse parts made with different
tokenizers and shards that are missing or duplicated; view.py and training warn if they are given
another tokenizer than the dataset's. Datasets without the file (the mtf branch's) are not checked.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.jsonl import STDIN, Source
from megatron_ft.files.output import OutputFile
from megatron_ft.tokenizer.files import vocabulary_digest

VERSION = 1

Inputs = tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Provenance:
    """The tokenizer, flags and input files of a dataset.

    `tokenizer` is a file name and `sha256` its `vocabulary_digest`, None if there is no single
    file. `shard` is (I, N): shard I of N of `inputs`, which are pairs of a name without folders and
    a size in bytes, None for standard input.
    """

    tokenizer: str
    sha256: str | None
    append_eod: bool
    literal_special_tokens: tuple[str, ...]
    shard: tuple[int, int]
    inputs: Inputs

    @classmethod
    def read(cls, prefix: str | Path) -> "Provenance | None":
        """The provenance of the dataset `prefix`; None if there is no file or it is of another
        version. UserError if it is damaged."""
        path = path_of(prefix)
        try:
            data = json.loads(path.read_bytes())
            if data["version"] != VERSION:
                return None
            index, count = data["shard"]
            return cls(
                tokenizer=data["tokenizer"],
                sha256=data["sha256"],
                append_eod=data["append_eod"],
                literal_special_tokens=tuple(data["literal_special_tokens"]),
                shard=(index, count),
                inputs=tuple((name, size) for name, size in data["inputs"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: damaged ({error}); tokenize this dataset again, or remove the file") from error

    def write(self, prefix: str | Path) -> None:
        """Write the file of the dataset `prefix`."""
        with OutputFile(path_of(prefix)) as output:
            output.write(json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode() + b"\n")
            output.commit()


def path_of(prefix: str | Path) -> Path:
    """The provenance file of the dataset `prefix`.

    >>> path_of("data/train").name
    'train_made_from.json'
    """
    return Path(f"{prefix}_made_from.json")


def inputs_of(sources: Sequence[Source]) -> Inputs:
    """Names and sizes of input files. Folders are left out: each task of a job array may have its
    own copy of the input."""
    return tuple((source.path.name, None if source.path == STDIN else source.size) for source in sources)


def tokenizer_warning(prefix: str | Path, tokenizer: str | Path) -> str | None:
    """A warning if the dataset was made with another tokenizer than `tokenizer`; None if not, or if
    it is unknown."""
    made, ours = Provenance.read(prefix), vocabulary_digest(Path(tokenizer))
    if made is None or made.sha256 is None or ours is None or made.sha256 == ours:
        return None
    return (
        f"{prefix}: made with another tokenizer ({made.tokenizer}, sha256 {made.sha256[:12]}) than {tokenizer} (sha256 {ours[:12]}); "
        "its token ids may mean different text"
    )


def join(parts: Mapping[str, Provenance | None]) -> Provenance | None:
    """The provenance of the concatenation of `parts`, given by prefix; None unless it is known for
    every part.

    UserError if two parts were made differently, or if a shard is missing or duplicated.
    """
    known = {prefix: made for prefix, made in parts.items() if made}
    if not known:
        return None
    (first, ours), *others = known.items()
    for prefix, theirs in others:
        if ours.sha256 != theirs.sha256:
            found = [f"{made.tokenizer}, sha256 {(made.sha256 or 'unknown')[:12]}" for made in (ours, theirs)]
            raise UserError(
                f"{first} and {prefix} were made with different tokenizers ({found[0]}; {found[1]}); "
                "tokenize all parts with the same one"
            )
        for flag in ("append_eod", "literal_special_tokens"):
            if getattr(ours, flag) != getattr(theirs, flag):
                raise UserError(
                    f"{first} and {prefix} were made with different --{flag.replace('_', '-')}; "
                    "tokenize all parts with the same flags"
                )
    if len(known) < len(parts):
        return None
    _check_shards(known)
    inputs = dict.fromkeys(made.inputs for made in known.values())
    return Provenance(
        ours.tokenizer,
        ours.sha256,
        ours.append_eod,
        ours.literal_special_tokens,
        (1, 1),
        tuple(file for files in inputs for file in files),
    )


def _check_shards(parts: Mapping[str, Provenance]) -> None:
    """UserError unless the parts of each input are all its shards, each exactly once."""
    shards: dict[tuple[int, Inputs], dict[int, str]] = defaultdict(dict)
    for prefix, made in parts.items():
        index, count = made.shard
        prefixes = shards[count, made.inputs]
        if any(size is None for _, size in made.inputs):  # standard input may differ each time
            index = len(prefixes) + 1
        if index in prefixes:
            raise UserError(
                f"{prefixes[index]} and {prefix} are both shard {index}/{count} of {_names(made.inputs)}; give one of them"
            )
        prefixes[index] = prefix
    for (count, inputs), prefixes in shards.items():
        if missing := [str(index) for index in range(1, count + 1) if index not in prefixes]:
            raise UserError(
                f"shard {', '.join(missing)} of {count} of {_names(inputs)} is missing; tokenize it, and give all parts"
            )


def _names(inputs: Inputs) -> str:
    return ", ".join(name for name, _ in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
