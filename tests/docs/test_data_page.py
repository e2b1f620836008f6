"""The commands of docs/data.md run as printed."""

from doc_commands import run_page


def test_commands_tokenize_shards_and_merge(tmp_path):
    printed = run_page("data.md", tmp_path)
    assert "3 parts, " in printed and "tokenizer of 2048 ids" in printed
