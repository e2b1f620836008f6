"""zstd input: every frame, in memory and time that do not depend on what it expands to."""

import io
import random
import tracemalloc

import pytest
import zstandard

from megatron_ft.errors import UserError
from megatron_ft.files.zstd_file import ZstdFile

SKIPPABLE = b"\x53\x2a\x4d\x18\3\0\0\0abc"


def stream(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(ZstdFile(io.BufferedReader(io.BytesIO(data)), "rows.zst"), 1 << 20)


def random_bytes(size: int) -> bytes:
    """Compressible by a third or so."""
    return bytes(random.Random(size).choices(b"abcdefgh \n", k=size))


@pytest.mark.parametrize("size", [0, 1, 100, 3000, 300_000])
@pytest.mark.parametrize("level", [-5, 3, 19])
@pytest.mark.parametrize("options", [{}, {"write_checksum": True}, {"write_content_size": False}], ids=str)
def test_frames_are_read_and_truncated_ones_are_errors(size, level, options):
    data = random_bytes(size)
    frame = zstandard.ZstdCompressor(level=level, **options).compress(data)
    assert stream(frame).read() == data
    assert stream(SKIPPABLE + frame + SKIPPABLE + frame).read() == data * 2
    for end in {*range(1, 20), len(frame) // 2, *range(len(frame) - 5, len(frame))} & set(range(1, len(frame))):
        with pytest.raises(EOFError):
            stream(frame[:end]).read()
        with pytest.raises(EOFError):
            stream(frame + frame[:end]).read()


def test_stream_of_many_small_blocks_is_read():
    compressed, data = io.BytesIO(), random_bytes(200_000)
    with zstandard.ZstdCompressor().stream_writer(compressed, closefd=False) as writer:
        for start in range(0, len(data), 777):
            writer.write(data[start : start + 777])
            writer.flush(zstandard.FLUSH_BLOCK)
    assert stream(compressed.getvalue()).read() == data


def test_memory_is_bounded_whatever_a_file_expands_to():
    compressor = zstandard.ZstdCompressor().compressobj()
    compressed = b"".join([*(compressor.compress(bytes(1 << 20)) for _ in range(256)), compressor.flush()])
    assert len(compressed) < 1 << 14
    tracemalloc.start()
    file, size = stream(compressed), 0
    while chunk := file.read(1 << 16):
        size += len(chunk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 256 << 20 and peak < 4 << 20


def test_data_after_a_frame_and_damage_are_errors():
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(random_bytes(3000))
    with pytest.raises(zstandard.ZstdError):
        stream(frame + b"no frame").read()
    with pytest.raises((zstandard.ZstdError, EOFError)):
        stream(frame[:100] + bytes(8) + frame[108:]).read()


def test_window_over_the_limit_names_the_flag_that_made_it():
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    compressed = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(compressed, closefd=False) as writer:
        writer.write(b"{}")
    with pytest.raises(UserError, match=r"rows\.zst: needs 256 MiB to decompress.* without --long"):
        stream(compressed.getvalue()).read()
