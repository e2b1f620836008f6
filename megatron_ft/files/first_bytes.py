"""Files that are not what their name promises, recognized by their first bytes: pointers, pages,
archives.

    if found := what_it_is(path, expected={"zip"}):
        raise UserError(f"{path}: {found}")

A reader calls it before it parses a file, or when parsing fails, so that its error names the cause
and not a symptom ("invalid UTF-8") and not a wrong remedy ("copy it again").
"""

import re
from collections.abc import Collection
from pathlib import Path

HEAD_BYTES = 4096
DOWNLOAD = "download it again, with hf auth login and hf download if it is on the Hugging Face Hub"
UTF16 = "UTF-16, not UTF-8; iconv -f UTF-16 -t UTF-8 converts the file"
NUL = "NUL bytes, as an interrupted copy leaves them; copy the file again"
TO_JSONL = "orient='records', lines=True) writes JSONL"

# (kind, expression at the start of the file, what it is and what to do). The first match is used.
KINDS = [
    (kind, re.compile(start, re.DOTALL), found)
    for kind, start, found in (
        ("lfs", rb"version https?://(?:git-lfs|hawser)", "a Git LFS pointer, not the file; git lfs pull downloads it"),
        ("html", rb"(?:\xef\xbb\xbf)?\s*<(?i:!doctype html|html|head|body)\b", f"an HTML page, not the file; {DOWNLOAD}"),
        ("xml", rb"(?:\xef\xbb\xbf)?\s*<\?xml\b", f"an XML document, such as a server's error message, not the file; {DOWNLOAD}"),
        (
            "hub",
            rb"(?:Entry not found|Repository not found|Access to \w+ \S+ is restricted|Invalid username or password)",
            f"an error message of the Hugging Face Hub, not the file; {DOWNLOAD}",
        ),
        ("gzip", rb"\x1f\x8b", "compressed with gzip; gunzip decompresses it"),
        ("zstd", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "compressed with zstd; unzstd decompresses it"),
        ("bzip2", rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", "compressed with bzip2; bunzip2 decompresses it"),
        ("xz", rb"\xfd7zXZ\x00", "compressed with xz; unxz decompresses it"),
        ("lz4", rb"\x04\x22\x4d\x18", "compressed with LZ4; lz4 -d decompresses it"),
        ("zip", rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a zip archive; unzip extracts it"),
        ("7z", rb"7z\xbc\xaf\x27\x1c", "a 7z archive; 7z x extracts it"),
        ("tar", rb".{257}ustar", "a tar archive; tar -xf extracts it"),
        ("parquet", rb"PAR1", f"a Parquet file; pandas.read_parquet(FILE).to_json(OUT, {TO_JSONL}"),
        ("arrow", rb"ARROW1|\xff{4}[^\xff]..\x00", f"an Arrow file; pandas.read_feather or datasets' to_json(OUT, {TO_JSONL}"),
        ("safetensors", rb".{5}\x00{3}\{\"", "a safetensors file"),
        ("pickle", rb"\x80[\x02-\x05][\x8a\x95\x63\x5d\x7d]", "a Python pickle"),
        ("gguf", rb"GGUF", "a GGUF file"),
        ("hdf5", rb"\x89HDF\r\n", "an HDF5 file"),
        ("numpy", rb"\x93NUMPY", "a NumPy array"),
        ("sqlite", rb"SQLite format 3\x00", "an SQLite database"),
        ("pdf", rb"%PDF-", "a PDF file"),
        ("appledouble", rb"\x00\x05\x16[\x00\x07]\x00", "macOS metadata of the file without ._ in its name; leave it out"),
        ("utf-32", rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32, not UTF-8; iconv -f UTF-32 -t UTF-8 converts the file"),
        ("utf-16", rb"\xff\xfe|\xfe\xff|[\t\n\r -~]\x00[\t\n\r -~]\x00|\x00[\t\n\r -~]\x00[\t\n\r -~]", UTF16),
        ("nul", rb"\x00{16}|\x00+\Z", f"begins with {NUL}"),
    )
]  # fmt: skip
TEXTS = {kind: text for kind, _, text in KINDS}


def what_it_is(path: Path, expected: Collection[str] = ()) -> str | None:
    """What the file is, and what to do: the end of an error message. None if it is not recognized,
    is of an `expected` kind, is empty or cannot be read.

    `expected` are names of KINDS.
    """
    try:
        with open(path, "rb") as file:
            return describe(file.read(HEAD_BYTES), expected)
    except OSError:
        return None


def describe(start: bytes, expected: Collection[str] = ()) -> str | None:
    r"""`what_it_is` for the first bytes of a file.

    >>> describe(b"BZh91AY&SY\x9e")
    'compressed with bzip2; bunzip2 decompresses it'
    >>> describe(b'{"n_layer": 2}')
    """
    kind = kind_of_bytes(start)
    return None if kind in expected else TEXTS.get(kind)


def kind_of_bytes(start: bytes) -> str:
    """The name of the kind in KINDS of a file with these first bytes; "" if it has none."""
    start = start[:HEAD_BYTES]
    return next((kind for kind, expression, _ in KINDS if expression.match(start)), "")
