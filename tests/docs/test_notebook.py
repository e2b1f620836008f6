"""examples/api.ipynb runs as it is, and the functions of the API leave the process as it was."""

import nbclient
import nbformat
import pytest
from conftest import ROOT

BEFORE = """
import os, signal
def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return handlers, dict(os.environ)
before = state()
"""
AFTER = """
import torch, torch.distributed
after = state()
print([sorted(dict(set(was.items()) ^ set(now.items()))) for was, now in zip(before, after)])
print(torch.distributed.is_initialized(), torch.get_num_threads() == threads, torch.get_default_dtype())
"""
THREADS = "import torch; threads = torch.get_num_threads()"


@pytest.fixture(scope="module")
def cells() -> dict[str, str]:
    """What each cell of code prints and returns, by its source."""
    notebook = nbformat.read(ROOT / "examples/api.ipynb", as_version=4)
    inserted = {0: BEFORE, 1: THREADS}
    for place, source in inserted.items():
        notebook.cells.insert(place, nbformat.v4.new_code_cell(source))
    notebook.cells.append(nbformat.v4.new_code_cell(AFTER))
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT / "examples"}})
    client.execute()
    return {cell.source: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}


def text_of(cell) -> str:
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def output_of(cells: dict[str, str], call: str) -> str:
    """What the one cell printed that contains `call`."""
    [text] = [text for source, text in cells.items() if call in source]
    return text


def test_every_function_returns_its_result(cells):
    assert "Tokenized(prefix=" in output_of(cells, "tokenize(rows")
    assert "documents in the first one" in output_of(cells, "open_dataset(**data)")
    assert output_of(cells, "plan(gpu=").count("GiB") == 3
    training = output_of(cells, "result = finetune(**run)")
    assert "done: 6 iterations" in training, "the log of rank 0 is not shown"
    assert "6 steps, loss " in training and "{'valid': " in training
    assert "format='huggingface'" in output_of(cells, "convert(work")
    assert output_of(cells, "loaded.complete(").splitlines()[-1][0] in "'\"", "not a text"


def test_an_unknown_flag_is_a_user_error(cells):
    assert output_of(cells, "learning_rate=1e-3") == "finetune(): 'learning_rate': unknown key\n"


def test_process_is_left_as_it_was(cells):
    assert output_of(cells, "print(torch.distributed.is_initialized()") == "[[], []]\nFalse True torch.float32\n"
