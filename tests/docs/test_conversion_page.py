"""The commands of docs/conversion.md run as printed, on a tiny model."""

import json

import pytest
from doc_commands import run_page


@pytest.mark.slow
def test_commands_convert_there_and_back(tmp_path):
    printed = run_page("conversion.md", tmp_path)
    assert printed.count("\nequal\n") == 4 and printed.count("\nequal after rounding") == 1
    assert "DIFFERENT" not in printed
    assert "TP2 PP2" in printed and "largest difference" in printed
    config = json.loads((tmp_path / "from-mtf/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["vocab_size"] == 600
    assert (tmp_path / "finetuned-pp2/iter_0000004/.metadata").is_file()
