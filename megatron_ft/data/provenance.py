"""What a tokenized dataset was made from: `PREFIX_made_from.json`, next to the token files.

preprocess/tokenize.py and merge.py write it. merge.py reads it to refuse parts made with different
tokenizers and shards that are missing or duplicated; the launcher does not start training with
another tokenizer than the dataset's, and view.py warns about one. Datasets without the file (the
mtf branch's) are not checked.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import kind_of, optional, parse_json, read_small_file, require
from megatron_ft.files.jsonl import STDIN, Source
from megatron_ft.files.output import OutputFile
from megatron_ft.printable import printable
from megatron_ft.tokenizer.files import vocabulary_digest

VERSION = 1
MAX_SHARDS = 10**6
NAMED_SHARDS = 10  # of the missing ones, in messages

TRAIN_ON_FLAG = "--train-on"  # in the flags of conversations

Inputs = tuple[tuple[str, int | None], ...]
Keys = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Provenance:
    """The tokenizer, flags and input files of a dataset.

    `tokenizer` is a file name and `sha256` its `vocabulary_digest`, None if there is no single
    file. `shard` is (I, N): shard I of N of `inputs`, which are pairs of a name without folders and
    a size in bytes, None for standard input. `keys` are the names that the key of the inputs, and
    that of the outputs, may have in a row; None if unknown. `flags` are the others that change
    tokens, with their values as text; empty for rows of inputs and outputs.
    """

    tokenizer: str
    sha256: str | None
    append_eod: bool
    literal_special_tokens: tuple[str, ...]
    shard: tuple[int, int]
    inputs: Inputs
    keys: Keys | None = None
    flags: Mapping[str, str] = field(default_factory=dict)

    @property
    def marks_learned(self) -> bool:
        """Whether the dataset has marks of the tokens that are learned, as conversations have."""
        return TRAIN_ON_FLAG in self.flags

    @classmethod
    def read(cls, prefix: str | Path) -> "Provenance | None":
        """The provenance of the dataset `prefix`; None if there is no file or it is of another
        version. UserError if it is damaged."""
        path = path_of(prefix)
        if not path.exists():
            return None
        content = read_small_file(path)
        where = str(path)
        try:
            data = parse_json(content, where)
            if require(data, "version", int, where) != VERSION:
                return None
            index, count = require(data, "shard", list, where, low=2, high=2, of=int)
            if not 1 <= index <= count <= MAX_SHARDS:
                raise UserError(
                    f'{where}: "shard" is {[index, count]}, expected [I, N] with 1 <= I <= N <= {MAX_SHARDS}'
                )
            return cls(
                tokenizer=require(data, "tokenizer", str, where),
                sha256=optional(data, "sha256", str, where, None, low=64, high=64),
                append_eod=require(data, "append_eod", bool, where),
                literal_special_tokens=tuple(require(data, "literal_special_tokens", list, where, of=str)),
                shard=(index, count),
                inputs=tuple(_input(file, where) for file in require(data, "inputs", list, where)),
                keys=_keys(optional(data, "keys", list, where, None, of=list), where),
                flags=_flags(optional(data, "flags", dict, where, {}), where),
            )
        except UserError as error:
            reason = str(error).removeprefix(f"{where}: ")
            raise UserError(f"{where}: damaged ({reason}); tokenize this dataset again, or remove the file") from None

    def write(self, prefix: str | Path) -> None:
        """Write the file of the dataset `prefix`."""
        content = {"version": VERSION, **asdict(self)}
        if not self.flags:
            del content["flags"]
        with OutputFile(path_of(prefix)) as output:
            output.write(json.dumps(content, indent=1).encode() + b"\n")
            output.commit()


def path_of(prefix: str | Path) -> Path:
    """The provenance file of the dataset `prefix`.

    >>> path_of("data/train").name
    'train_made_from.json'
    """
    return Path(f"{prefix}_made_from.json")


def _input(file: object, where: str) -> tuple[str, int | None]:
    """A pair of a name and a size in "inputs"."""
    if isinstance(file, list) and len(file) == 2:
        name, size = file
        if type(name) is str and (size is None or (type(size) is int and size >= 0)):
            return name, size
    raise UserError(f'{where}: "inputs" has {kind_of(file)} that is not a name and a size in bytes')


def _keys(found: list[list] | None, where: str) -> Keys | None:
    if found is not None and not all(type(name) is str for names in found for name in names):
        raise UserError(f'{where}: "keys" has a name that is not a string')
    return None if found is None else tuple(map(tuple, found))


def _flags(found: dict, where: str) -> dict[str, str]:
    if not all(type(value) is str for value in found.values()):
        raise UserError(f'{where}: "flags" has a value that is not a string')
    return found


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
        f"{prefix}: made with another tokenizer ({printable(made.tokenizer, 100)}, sha256 {made.sha256[:12]}) "
        f"than {tokenizer} (sha256 {ours[:12]}); "
        "its token ids may mean different text"
    )


def difference(expected: Provenance, found: Provenance) -> str | None:
    """How a dataset differs from one that a command would make: `found ..., expected ...`; None if
    it does not, as far as both are known."""
    if expected.sha256 != found.sha256:
        return f"made with the tokenizer {_tokenizer(found)}, expected {_tokenizer(expected)}"
    for flag in ("append_eod", "literal_special_tokens"):
        ours, theirs = getattr(expected, flag), getattr(found, flag)
        if ours != theirs:
            return f"made with another --{flag.replace('_', '-')} ({_shown(theirs)}), expected {_shown(ours)}"
    if other := _different_flag(expected, found):
        ours, theirs = expected.flags.get(other), found.flags.get(other)
        return f"made with another {printable(other, 100)} ({_shown(theirs)}), expected {_shown(ours)}"
    if None not in (expected.keys, found.keys) and expected.keys != found.keys:
        return f"made from the keys {_shown(found.keys)} of each row, expected {_shown(expected.keys)}"
    if expected.inputs != found.inputs:
        changed = [
            (theirs, ours) for theirs, ours in zip(found.inputs, expected.inputs, strict=False) if theirs != ours
        ]
        if len(found.inputs) != len(expected.inputs):
            return f"made from {len(found.inputs)} files ({_names(found.inputs)}), expected {len(expected.inputs)}"
        (theirs, their_size), (ours, our_size) = changed[0]
        return f"made from {printable(theirs, 100)} of {their_size} bytes, expected {printable(ours, 100)} of {our_size} bytes"
    if expected.shard != found.shard:
        return f"shard {found.shard[0]} of {found.shard[1]}, expected shard {expected.shard[0]} of {expected.shard[1]}"
    return None


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
            raise UserError(
                f"{first} and {prefix} were made with different tokenizers ({_tokenizer(ours)}; {_tokenizer(theirs)}); "
                "tokenize all parts with the same one"
            )
        for flag in ("append_eod", "literal_special_tokens"):
            if getattr(ours, flag) != getattr(theirs, flag):
                raise UserError(
                    f"{first} and {prefix} were made with different --{flag.replace('_', '-')}; "
                    "tokenize all parts with the same flags"
                )
        if other := _different_flag(ours, theirs):
            raise UserError(
                f"{first} and {prefix} were made with different {printable(other, 100)}; "
                "tokenize all parts with the same flags"
            )
    if len(known) < len(parts):
        return None
    _check_shards(known)
    inputs = dict.fromkeys(made.inputs for made in known.values())
    keys = {made.keys for made in known.values()}
    return Provenance(
        ours.tokenizer,
        ours.sha256,
        ours.append_eod,
        ours.literal_special_tokens,
        (1, 1),
        tuple(file for files in inputs for file in files),
        keys.pop() if len(keys) == 1 else None,
        ours.flags,
    )


def _different_flag(ours: Provenance, theirs: Provenance) -> str | None:
    """One of `flags` that differs; None if none does."""
    names = sorted({*ours.flags, *theirs.flags})
    return next((name for name in names if ours.flags.get(name) != theirs.flags.get(name)), None)


def _check_shards(parts: Mapping[str, Provenance]) -> None:
    """UserError unless the parts of each input are all its shards, each exactly once."""
    shards: dict[tuple[int, Inputs, Keys | None], dict[int, str]] = defaultdict(dict)
    for prefix, made in parts.items():
        index, count = made.shard
        prefixes = shards[count, made.inputs, made.keys]
        if any(size is None for _, size in made.inputs):  # standard input may differ each time
            index = len(prefixes) + 1
        if index in prefixes:
            raise UserError(
                f"{prefixes[index]} and {prefix} are both shard {index}/{count} of {_names(made.inputs)}; give one of them"
            )
        prefixes[index] = prefix
    for (count, inputs, _), prefixes in shards.items():
        if len(prefixes) < count:
            missing = list(islice((index for index in range(1, count + 1) if index not in prefixes), NAMED_SHARDS))
            numbers = ", ".join(map(str, missing)) + (", ..." if count - len(prefixes) > len(missing) else "")
            example = parts[next(iter(prefixes.values()))]
            others = [(prefix, made) for prefix, made in parts.items() if made.shard in [(i, count) for i in missing]]
            why = (f" ({prefix} was {text})" for prefix, made in others if (text := difference(example, made)))
            raise UserError(
                f"shard {numbers} of {count} of {_names(inputs)} is missing{next(why, '')}; tokenize it, and give all parts"
            )


def _shown(value: object) -> str:
    return printable(json.dumps(value), 200)


def _tokenizer(made: Provenance) -> str:
    return f"{printable(made.tokenizer, 100)}, sha256 {(made.sha256 or 'unknown')[:12]}"


def _names(inputs: Inputs) -> str:
    return ", ".join(printable(name, 100) for name, _ in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
