"""Small hand-written contents that are valid in their syntax and wrong in their kind."""

import gzip
import pickle
import struct


def _nested(start: bytes, end: bytes, core: bytes = b"", times: int = 100_000) -> bytes:
    return start * times + core + end * times


MINIMAL_JSON: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\t\n",
    "null": b"null",
    "true": b"true",
    "a number": b"7",
    "a huge exponent": b"1e99999",
    "a long integer": b"9" * 5000,
    "a negative long integer": b'{"a": -' + b"9" * 5000 + b"}",
    "NaN": b"NaN",
    "Infinity": b'{"a": Infinity}',
    "a string": b'"text"',
    "an empty list": b"[]",
    "a list of lists": b"[[1, 2], [3]]",
    "a list of objects": b'[{"a": 1}, {"b": 2}]',
    "an empty object": b"{}",
    "an empty key": b'{"": null}',
    "duplicate keys": b'{"a": 1, "a": {}, "a": []}',
    "a lone surrogate": b'{"\\ud800": "\\udfff"}',
    "an escape sequence": b'{"\\u001b]0;owned\\u0007": "\\u001b[2J\\nerror: forged"}',
    "lists, 100,000 deep": _nested(b"[", b"]"),
    "lists, 100,000 deep, not closed": b"[" * 100_000,
    "objects, 100,000 deep": _nested(b'{"a":', b"}", b"1"),
    "lists, 900 deep": _nested(b"[", b"]", times=900),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-32": '{"a": 1}'.encode("utf-32"),
    "Latin-1": b'{"\xe9t\xe9": 1}',
    "a comment": b'// text\n{"a": 1}',
    "a trailing comma": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "two objects": b"{}{}",
    "NUL bytes": b"\0" * 4096,
    "an object and NUL bytes": b"{}" + b"\0" * 512,
    "a million of zeros": b"[" + b"0," * 500_000 + b"0]",
    "a long key": b'{"' + b"k" * 1_000_000 + b'": 1}',
}

# What is found under a file's name after a failed or unfinished download.
FOREIGN: dict[str, bytes] = {
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    + b"4d7a" * 16
    + b"\nsize 134217728\n",
    "HTML": b"<!DOCTYPE html>\n<html><head><title>Access to this model is restricted</title></head></html>\n",
    "parquet": b"PAR1\x15\x04\x15\x10" + b"\0" * 64 + b"\x10\0\0\0PAR1",
    "Arrow": b"ARROW1\0\0\xff\xff\xff\xff\x10\0\0\0" + b"\0" * 64,
    "gzip": gzip.compress(b'{"a": 1}\n', mtime=0),
    "an empty zip archive": b"PK\x05\x06" + b"\0" * 18,
    "CSV": b"inputs,outputs\n1 + 1,2\n",
    "empty": b"",
    "one NUL": b"\0",
    "NUL bytes": b"\0" * 4096,
    "only a byte order mark": b"\xef\xbb\xbf",
}


def _global(module: str, name: str, *arguments: object) -> bytes:
    """A pickle that calls module.name."""
    pushed = b"".join(pickle.dumps(argument, 2)[2:-1] for argument in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + pushed + b"tR."


MINIMAL_PICKLES: dict[str, bytes] = {
    "nothing": b"",
    "None": pickle.dumps(None, 2),
    "a number": pickle.dumps(7, 2),
    "a list": pickle.dumps([1, "a"], 2),
    "an empty dict": pickle.dumps({}, 2),
    "a dict of numbers": pickle.dumps({1: 2, None: 3}, 2),
    "a dict of strings": pickle.dumps({"transformer.wte.weight": "text", "model": None, "args": 5}, 2),
    "lists, 100,000 deep": b"\x80\x02" + b"(" * 100_000 + b"N" + b"l" * 100_000 + b".",
    "a list that contains itself": b"\x80\x02]q\x00h\x00a.",
    "a long integer": b"\x80\x02\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b".",
    "a string of 2 GiB": b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"short.",
    "a negative length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b".",
    "os.system": _global("os", "system", "true"),
    "builtins.eval": _global("builtins", "eval", "1"),
    "builtins.bytearray of 16 GiB": _global("builtins", "bytearray", 2**34),
    "a name with an escape sequence": _global("\x1b[2J", "x\x07"),
    "a name that is not UTF-8": b"\x80\x02c\xff\xfe\nx\n.",
    "an empty stack": b"\x80\x02.",
    "a missing memo entry": b"\x80\x02h\x05.",
    "a memo entry of 2^31": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "an unknown extension": b"\x80\x02\x82\x01.",
    "an unknown protocol": b"\x80\xff.",
    "a persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "no end": b"\x80\x02}q\x00",
    "an unknown operation": b"\x80\x02\xfe.",
    "protocol 5": pickle.dumps({"a": 1}, 5),
}
