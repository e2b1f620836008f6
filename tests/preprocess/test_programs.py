"""Every program of dataset/ and preprocess/: Python's own modules, inputs that are safe."""

import os
from pathlib import Path

import pytest
from conftest import ROOT, one_error_line, run_program

PROGRAMS = sorted(path.relative_to(ROOT) for room in ("dataset", "preprocess") for path in (ROOT / room).glob("*.py"))


@pytest.fixture(scope="module")
def sitecustomize(tmp_path_factory) -> dict[str, str]:
    """Environment in which Python prints where its `tokenize` is and fails as it exits."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "sitecustomize.py").write_text(
        "import atexit\n"
        "@atexit.register\n"
        "def show():\n"
        "    import tokenize, inspect, linecache, traceback\n"
        "    print('STDLIB', tokenize.__file__)\n"
        "    raise RuntimeError('on purpose')\n"
    )
    return {**os.environ, "PYTHONPATH": str(directory)}


@pytest.mark.parametrize("program", [*PROGRAMS, Path("bench/tokenize.py")], ids=str)
def test_standard_librarys_tokenize_is_not_shadowed(program, sitecustomize, tmp_path):
    done = run_program(program, "--help", cwd=tmp_path, env=sitecustomize)
    assert "usage: " in done.stdout
    assert Path(done.stdout.split("STDLIB ")[1].strip()).parent == Path(os.__file__).parent
    # A traceback shows its source lines, for which Python needs its own tokenize.
    assert "RuntimeError: on purpose" in done.stderr and "raise RuntimeError('on purpose')" in done.stderr


@pytest.mark.parametrize("as_link", [False, True], ids=["same file", "link to it"])
@pytest.mark.parametrize(
    "program, input_flag",
    [
        ("dataset/commits_to_jsonl.py", ["--input"]),
        ("dataset/dedup_shuffle.py", []),
        ("preprocess/train_tokenizer.py", ["--input"]),
    ],
)
def test_output_that_is_the_input_is_refused(tmp_path, program, input_flag, as_link):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"inputs": "a", "outputs": "b"}\n')
    output = tmp_path / "link.jsonl" if as_link else rows
    if as_link:
        output.symlink_to(rows)
    line = one_error_line(run_program(program, *input_flag, rows, "--output", output, ok=False))
    assert "input and output" in line
    assert rows.read_text() == '{"inputs": "a", "outputs": "b"}\n' and output.is_symlink() == as_link
