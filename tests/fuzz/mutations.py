"""Seeded mutations of files: what a crash, a bad copy or an attacker leaves behind.

A mutator is a function of (random, content) that returns the mutated content and a short
description. `mutators(*names)` combines those of a format with those that fit any file. The same
seed gives the same mutation on every machine.
"""

import bz2
import copy
import io
import json
import lzma
import pickletools
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from minimal import FOREIGN, MINIMAL_JSON, MINIMAL_PICKLES

Mutator = Callable[[Random, bytes], tuple[bytes, str]]

INTEGERS = (0, 1, -1, 2, 127, 255, 32767, 65535, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63))  # fmt: skip
FORGED = "\x1b]0;owned\x07\x1b[2J\r\nerror: forged\x00\x9b31m"
DEEP_LIST, DEEP_OBJECT, LONG_INTEGER, HUGE_FLOAT = "@deep list@", "@deep object@", "@long integer@", "@huge float@"
RAW = {  # placeholders in a JSON tree: text that json.dumps cannot write
    DEEP_LIST: "[" * 100_000 + "]" * 100_000,
    DEEP_OBJECT: '{"a":' * 100_000 + "1" + "}" * 100_000,
    LONG_INTEGER: "9" * 5000,
    HUGE_FLOAT: "1e99999",
}
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1.5, -0.0, 1e308, 2**31, 2**32, 2**40, 2**63, -(2**63), 10**8, float("nan"), float("inf"),
    "", "x", " ", "0", "-1", "³", "1e3", FORGED, "\ud800", "a\nb", "../outside", "/etc/hostname", "..", "\x00", "é" * 300,
    "x" * 100_000, [], {}, [[]], [None], [1, 2**40], {"a": None}, DEEP_LIST, DEEP_OBJECT, LONG_INTEGER, HUGE_FLOAT,
)  # fmt: skip


def show(value: Any) -> str:
    """A short form of a value for descriptions."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} characters)"


# Any file


def flip(random: Random, data: bytes) -> tuple[bytes, str]:
    changed = bytearray(data)
    offsets = sorted(random.randrange(len(data)) for _ in range(random.choice((1, 1, 1, 4, 32)))) if data else []
    for offset in offsets:
        changed[offset] ^= 1 << random.randrange(8)
    return bytes(changed), f"flip a bit at {offsets[:4]}{'...' * (len(offsets) > 4)}"


def overwrite(random: Random, data: bytes) -> tuple[bytes, str]:
    start, size = random.randrange(len(data) + 1), random.choice((1, 2, 8, 64))
    new = random.choice((b"\0" * size, b"\xff" * size, random.randbytes(size)))
    return data[:start] + new + data[start + size :], f"overwrite {size} bytes at {start} by {new[:8].hex()}"


def truncate(random: Random, data: bytes) -> tuple[bytes, str]:
    length = random.choice((0, 1, len(data) // 2, max(0, len(data) - 1), random.randrange(len(data) + 1)))
    return data[:length], f"truncate to {length} of {len(data)} bytes"


def insert(random: Random, data: bytes) -> tuple[bytes, str]:
    at, new = (
        random.randrange(len(data) + 1),
        random.choice((b"\0", b"\n", b"\xff", b"\xef\xbb\xbf", random.randbytes(7))),
    )
    return data[:at] + new + data[at:], f"insert {new.hex()} at {at}"


def delete(random: Random, data: bytes) -> tuple[bytes, str]:
    start, size = random.randrange(len(data) + 1), random.choice((1, 2, 8, 100))
    return data[:start] + data[start + size :], f"delete {size} bytes at {start}"


def duplicate(random: Random, data: bytes) -> tuple[bytes, str]:
    start, size, times = random.randrange(len(data) + 1), random.choice((1, 8, 100, 1000)), random.choice((1, 1, 50))
    part = data[start : start + size]
    return data[:start] + part * times + data[start:], f"insert bytes {start}:{start + size} {times} more times"


def extend(random: Random, data: bytes) -> tuple[bytes, str]:
    tail = random.choice((b"\0", b"\0" * 4096, b"\n", b"garbage", b"{}", data[:100]))
    return data + tail, f"append {len(tail)} bytes {tail[:8].hex()}"


def integer(random: Random, data: bytes) -> tuple[bytes, str]:
    """Overwrite an integer of 1 to 8 bytes, aligned or not."""
    size, value, order = random.choice((1, 2, 4, 8)), random.choice(INTEGERS), random.choice(("little", "big"))
    at = random.randrange(max(1, len(data) - size + 1))
    at = at - at % size if random.random() < 0.5 else at
    new = (value % (1 << 8 * size)).to_bytes(size, order)
    return data[:at] + new + data[at + size :], f"int{8 * size} at {at} = {value} ({order} endian)"


def nul_padding(random: Random, data: bytes) -> tuple[bytes, str]:
    """What a file system that lost blocks returns."""
    start = random.randrange(len(data) + 1)
    return data[:start] + b"\0" * (len(data) - start), f"NUL from byte {start}"


def foreign(random: Random, data: bytes) -> tuple[bytes, str]:
    """A file of another kind under the same name."""
    name = random.choice([*FOREIGN, "bz2", "xz", "UTF-16"])
    if name == "bz2":
        return bz2.compress(data[:10_000]), "bz2 of the file"
    if name == "xz":
        return lzma.compress(data[:10_000]), "xz of the file"
    if name == "UTF-16":
        return data.decode("latin-1").encode("utf-16"), "UTF-16"
    return FOREIGN[name], f"content: {name}"


ANY: tuple[Mutator, ...] = (flip, overwrite, truncate, insert, delete, duplicate, extend, integer, nul_padding, foreign)


# JSON


def dump_json(tree: Any, **options: Any) -> bytes:
    """A tree with the placeholders of RAW as text; lone surrogates stay escapes."""
    text = json.dumps(tree, **options)
    for placeholder, raw in RAW.items():
        text = text.replace(json.dumps(placeholder), raw)
    return text.encode()


def _odd_value(random: Random) -> Any:
    """One of ODD_VALUES, as a copy, which later mutations may change."""
    return copy.deepcopy(random.choice(ODD_VALUES))


def mutate_tree(random: Random, tree: Any) -> tuple[Any, str]:
    """Change one random entry of a parsed JSON document."""
    parents = [(parent, key, path) for parent, key, path in _entries(tree) if len(path) < 200]
    if not parents:
        value = _odd_value(random)
        return value, f"$ = {show(value)}"
    # Entries near the root are as likely as the many leaves of a long list.
    depth = random.choice(sorted({path.count("\t") for _, _, path in parents}))
    parent, key, path = random.choice([entry for entry in parents if entry[2].count("\t") == depth])
    path = "$" + path.replace("\t", "")
    old = parent[key]
    match random.randrange(10):
        case 0:
            del parent[key]
            return tree, f"delete {path}"
        case 1 if isinstance(parent, dict):
            renamed = random.choice((str(key) + "x", str(key).upper(), "", FORGED, "__class__", "\ud800", "../outside"))
            parent[renamed] = parent.pop(key)
            return tree, f"rename {path} to {show(renamed)}"
        case 1:
            parent[:] = parent * random.choice((2, 300))
            return tree, f"repeat the list of {path}"
        case 2 if isinstance(old, int | float) and not isinstance(old, bool):
            factor = random.choice((-1, 2, 0.5, 10**3, 10**6, 10**8, 10**15, 0))
            parent[key] = old * factor
            return tree, f"{path} times {factor}"
        case 2 if isinstance(old, str):
            parent[key] = random.choice((old + "\n", old[:-1], old + FORGED, old.upper(), old * 1000, "../" + old))
            return tree, f"{path} = {show(parent[key])}"
        case 3:
            parent[key] = random.choice(([old], {"content": old}, str(old), [old] * 3))
            return tree, f"{path} = {show(parent[key])}"
        case 4:
            other, other_key, other_path = random.choice(parents)
            parent[key] = json.loads(json.dumps(other[other_key]))
            return tree, f"{path} = ${other_path.replace(chr(9), '')}"
        case 5 if isinstance(parent, dict):
            extra, value = random.choice(("extra", FORGED, "")), _odd_value(random)
            parent[extra] = value
            return tree, f"add {show(extra)} = {show(value)} next to {path}"
    value = _odd_value(random)
    parent[key] = value
    return tree, f"{path} = {show(value)}"


def _entries(tree: Any, path: str = "") -> list[tuple[Any, Any, str]]:
    """(container, key, path with a tab per level) of every value in it, at most a few thousand."""
    found: list[tuple[Any, Any, str]] = []
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items[:2000]:
        here = f"{path}\t[{key!a}]"
        found.append((tree, key, here))
        if len(found) < 4000:
            found += _entries(value, here)
    return found


def json_tree(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change one to three entries of a JSON document; a quarter begins at a minimal document."""
    if random.random() < 0.1:
        name = random.choice(list(MINIMAL_JSON))
        return MINIMAL_JSON[name], f"content: {name}"
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return flip(random, data)
    descriptions = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        tree, description = mutate_tree(random, tree)
        descriptions.append(description)
    return dump_json(tree, indent=random.choice((None, 1))), "; ".join(descriptions)


def json_lines(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change one line of a JSONL file: its object, or the text around it."""
    lines = data.split(b"\n")
    i = random.randrange(max(1, len(lines) - 1))
    match random.randrange(8):
        case 0 | 1 | 2 | 3:
            lines[i], description = json_tree(random, lines[i])
        case 4:
            lines[i] = lines[i] + lines[(i + 1) % len(lines)]
            description = "two objects"
        case 5:
            lines[i] = random.choice(
                (b"", b"\r", b" ", b"null", b"[]", b"{", b"\xff\xfe", b"\0" * 100, b'"a"', b"1e999", b"\x85")
            )
            description = f"= {lines[i][:20]!r}"
        case 6:
            lines[i] = lines[i][: random.randrange(len(lines[i]) + 1)]
            description = f"truncated to {len(lines[i])} bytes"
        case _:
            end = random.choice((b"\r", b"\r\n", b"\n\n", b"\0\n", b"\xe2\x80\xa8"))
            return end.join(lines), f"line ends {end!r}"
    return b"\n".join(lines), f"line {i + 1}: {description}"


def text(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change one word of a text file."""
    words = ["³", "١", "-1", "0", "1e999", "nan", "9" * 5000, "\u2028", FORGED, "\ufeff", "..", "/etc/hostname", '"', ":", ",", "#", ""]  # fmt: skip
    parts = data.decode("utf-8", "surrogateescape").split(" ")
    i, new = random.randrange(len(parts)), random.choice(words)
    kept = random.choice(("", parts[i], parts[i][:3]))
    parts[i] = new + kept if random.random() < 0.5 else kept + new
    return " ".join(parts).encode("utf-8", "surrogateescape"), f"word {i + 1} = {show(parts[i])}"


# Token files, safetensors


def mmididx(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change one or two fields of an .idx: the header, lengths, pointers, document bounds."""
    changed, count = bytearray(data), struct.unpack_from("<Q", data, 18)[0]
    descriptions = []
    for _ in range(random.choice((1, 1, 1, 2))):
        name, form, at = random.choice(
            [("dtype code", "<B", 17), ("version", "<Q", 9), ("sequences", "<Q", 18), ("document bounds", "<Q", 26)]
            + [("length", "<i", 34 + 4 * random.randrange(count))] * 6
            + [("pointer", "<q", 34 + 4 * count + 8 * random.randrange(count))] * 6
            + [("bound", "<q", 34 + 12 * count + 8 * random.randrange(count + 1))] * 2
        )
        old, limit = struct.unpack_from(form, changed, at)[0], 1 << 8 * struct.calcsize(form)
        value = random.choice((*INTEGERS, old + 1, old - 1, old + 2, old - 2, -old, old * 2, random.randrange(limit)))
        changed[at : at + struct.calcsize(form)] = (value % limit).to_bytes(struct.calcsize(form), "little")
        descriptions.append(f"{name} at byte {at}: {old} -> {struct.unpack_from(form, changed, at)[0]}")
    return bytes(changed), "; ".join(descriptions)


def mmididx_moved(random: Random, data: bytes) -> tuple[bytes, str]:
    """Changes that keep the sum of lengths or the set of pointers, so no total gives them away."""
    count = struct.unpack_from("<Q", data, 18)[0]
    sizes = list(struct.unpack_from(f"<{count}i", data, 34))
    pointers = list(struct.unpack_from(f"<{count}q", data, 34 + 4 * count))
    i, j = random.sample(range(count), 2)
    if random.random() < 0.5:
        amount = random.choice((1, 2, sizes[i], 10**6, 2**31 - 1 - max(sizes[i], sizes[j])))
        sizes[i], sizes[j] = sizes[i] - amount, sizes[j] + amount
        description = f"lengths {i} and {j}: {amount} tokens moved"
    else:
        pointers[i], pointers[j] = pointers[j], pointers[i]
        description = f"pointers {i} and {j} swapped"
    table = struct.pack(f"<{count}i", *sizes) + struct.pack(f"<{count}q", *pointers)
    return data[:34] + table + data[34 + len(table) :], description


def safetensors_header(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change the JSON header of a safetensors file; its length is adapted, or not."""
    length = int.from_bytes(data[:8], "little")
    header, description = json_tree(random, data[8 : 8 + length])
    if random.random() < 0.15:
        value = random.choice((*INTEGERS, length + 1, length - 1, len(data)))
        return (value % 2**64).to_bytes(8, "little") + data[8:], f"header length {length} -> {value}"
    return len(header).to_bytes(8, "little") + header + data[8 + length :], description


# Pickles and zip archives


def raw_pickle(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change an operand of a pickle, or drop an operation; some begin at a minimal pickle."""
    if random.random() < 0.1:
        name = random.choice(list(MINIMAL_PICKLES))
        return MINIMAL_PICKLES[name], f"content: {name}"
    try:
        operations = list(pickletools.genops(data))
    except Exception:  # noqa: BLE001 - an earlier mutation broke it
        return flip(random, data)
    i = random.randrange(len(operations) - 1)
    operation, argument, start = operations[i]
    assert start is not None
    stop = operations[i + 1][2]
    if random.random() < 0.25:
        return data[:start] + data[stop:], f"drop {operation.name} {show(argument)} at {start}"
    if isinstance(argument, bool) or argument is None:
        return flip(random, data)
    if isinstance(argument, int) and operation.name in ("BININT", "BININT1", "BININT2", "LONG1"):
        value = random.choice(INTEGERS)
        encoded = value.to_bytes(8, "little", signed=True) if -(2**63) <= value < 2**63 else b"\xff" * 8
        return data[:start] + b"\x8a\x08" + encoded + data[stop:], f"{argument} at {start} = {value}"
    if isinstance(argument, str) and operation.name in ("BINUNICODE", "SHORT_BINUNICODE"):
        new = random.choice(("", "x", FORGED, argument + "x", "cpu:99", "cuda:0", "9" * 5000, "../outside")).encode()
        pushed = b"X" + struct.pack("<I", len(new)) + new
        return data[:start] + pushed + data[stop:], f"{show(argument)} at {start} = {show(new)}"
    if isinstance(argument, str) and operation.name == "GLOBAL":
        names = (
            b"os\nsystem",
            b"builtins\neval",
            b"collections\nOrderedDict",
            b"torch\nTensor",
            b"\x1b[2J\nx",
            b"torch\nbfloat16",
        )
        new = random.choice(names)
        return data[:start] + b"c" + new + b"\n" + data[stop:], f"global {show(argument)} = {show(new)}"
    at = random.randrange(start, stop)
    return data[:at] + random.randbytes(1) + data[at + 1 :], f"random byte in {operation.name} at {at}"


def zip_records(random: Random, data: bytes) -> tuple[bytes, str]:
    """Change one record of an archive that torch.save wrote: its name, content or existence."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, OSError):
        return flip(random, data)
    pickled = [i for i, (name, _) in enumerate(records) if name.endswith("data.pkl")]
    i = random.choice(pickled) if pickled and random.random() < 0.5 else random.randrange(len(records))
    name, content = records[i]
    compression = zipfile.ZIP_STORED
    match random.randrange(8):
        case 0:
            del records[i]
            description = f"without {name}"
        case 1:
            new = random.choice(
                (name + "x", "../outside", "/etc/hostname", name.replace("/", "\\"), FORGED[:8], "x/" + name)
            )
            records[i], description = (new, content), f"{name} named {show(new)}"
        case 2:
            content, description = truncate(random, content)
            records[i], description = (name, content), f"{name}: {description}"
        case 3:
            compression, description = zipfile.ZIP_DEFLATED, "compressed"
        case _:
            content, description = (raw_pickle if name.endswith(".pkl") else random.choice(ANY))(random, content)
            records[i], description = (name, content), f"{name}: {description}"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue(), description
