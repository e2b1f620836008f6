"""The commands of docs/data.md run as they stand."""

from doc_commands import run_page


def test_the_commands_of_the_data_page_run(tmp_path):
    printed = run_page("data.md", tmp_path)
    assert "3 parts, " in printed and "tokenizer of 2048 ids" in printed
