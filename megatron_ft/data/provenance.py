"""What a data set was made from: `PREFIX_made_from.json`, which tokenize.py and merge.py write beside the token files.

By it merge.py finds parts of another tokenizer and shards that are missing or doubled, and view.py and training say when they are given
another tokenizer. A data set without the file (the mtf branch's) is taken as it is.
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


@dataclass(frozen=True)
class MadeFrom:
    """`tokenizer` is its file's name and `sha256` that file's, None where it is several files; `shard` is (I, N) of `inputs`, which are
    [name without folders, bytes or None for standard input]."""

    tokenizer: str
    sha256: str | None
    append_eod: bool
    literal_special_tokens: tuple[str, ...]
    shard: tuple[int, int]
    inputs: tuple[tuple[str, int | None], ...]

    def write(self, prefix: str | Path) -> None:
        """Write the file of the data set `prefix`."""
        with OutputFile(path_of(prefix)) as output:
            output.write(json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode() + b"\n")
            output.commit()


def path_of(prefix: str | Path) -> Path:
    """Where it says what the data set `prefix` was made from."""
    return Path(f"{prefix}_made_from.json")


def inputs_of(sources: Sequence[Source]) -> tuple[tuple[str, int | None], ...]:
    """Names and sizes of input files. Folders are left out: tasks of a job array may have copies of the input in folders of their own."""
    return tuple((source.path.name, None if source.path == STDIN else source.size) for source in sources)


def read_made_from(prefix: str | Path) -> MadeFrom | None:
    """What the file says, None where there is none or it is of another version; UserError where it is damaged."""
    path = path_of(prefix)
    try:
        found = json.loads(path.read_bytes())
        if found.pop("version") != VERSION:
            return None
        found["inputs"] = tuple(map(tuple, found["inputs"]))
        return MadeFrom(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); tokenize this data set again, or remove the file") from error


def other_tokenizer(prefix: str | Path, tokenizer: str | Path) -> str | None:
    """A line where the data set was made with another tokenizer than `tokenizer`; None where not, or nobody knows."""
    made, ours = read_made_from(prefix), vocabulary_digest(Path(tokenizer))
    if made is None or None in (made.sha256, ours) or made.sha256 == ours:
        return None
    return (
        f"{prefix}: made with another tokenizer ({made.tokenizer}, sha256 {made.sha256[:12]}) than {tokenizer} (sha256 {ours[:12]}); "
        "its token ids may stand for other texts"
    )


def join(parts: Mapping[str, MadeFrom | None]) -> MadeFrom | None:
    """What the data set of all `parts`, named by their prefixes, is made from; None where that is not known of each.

    UserError where two parts were not made alike, or a shard is missing or there twice.
    """
    known = {prefix: made for prefix, made in parts.items() if made}
    if not known:
        return None
    (first, ours), *others = known.items()
    for prefix, theirs in others:
        if ours.sha256 != theirs.sha256:
            found = [f"{made.tokenizer}, sha256 {(made.sha256 or 'unknown')[:12]}" for made in (ours, theirs)]
            raise UserError(
                f"{first} and {prefix} were made with different tokenizers ({found[0]}; {found[1]}); tokenize all parts alike"
            )
        for flag in ("append_eod", "literal_special_tokens"):
            if getattr(ours, flag) != getattr(theirs, flag):
                raise UserError(
                    f"{first} and {prefix} were made with different --{flag.replace('_', '-')}; tokenize all parts alike"
                )
    if len(known) < len(parts):
        return None
    _check_shards(known)
    inputs = dict.fromkeys(made.inputs for made in known.values())
    return MadeFrom(
        ours.tokenizer, ours.sha256, ours.append_eod, ours.literal_special_tokens, (1, 1), sum(inputs, start=())
    )


def _check_shards(parts: Mapping[str, MadeFrom]) -> None:
    """UserError unless the parts of each input are all its shards, once each."""
    shards: dict = defaultdict(dict)  # of each number of shards and inputs
    for prefix, made in parts.items():
        index, count = made.shard
        there = shards[count, made.inputs]
        if any(size is None for _, size in made.inputs):  # standard input, which may be anything each time
            index = len(there) + 1
        if index in there:
            raise UserError(
                f"{there[index]} and {prefix} are both shard {index}/{count} of {_names(made.inputs)}; name one of them"
            )
        there[index] = prefix
    for (count, inputs), there in shards.items():
        if missing := [str(index) for index in range(1, count + 1) if index not in there]:
            raise UserError(
                f"shard {', '.join(missing)} of {count} of {_names(inputs)} is missing; tokenize it, and name all parts"
            )


def _names(inputs: tuple[tuple[str, int | None], ...]) -> str:
    return ", ".join(name for name, _ in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
