"""Row programs in shards: the joined parts are the single run, and foreign parts are never used."""

import json

import pyarrow.parquet
import pytest
from conftest import ROOT, one_error_line, run_program

from megatron_ft.files.row_shards import add_reports

PROGRAM = str(ROOT / "dataset/commits_to_jsonl.py")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    commits = (
        {"commit": str(i), "old_contents": "a" * (i % 97), "new_contents": "b", "subject": "Do"} for i in range(700)
    )
    path.write_text("".join(json.dumps(commit) + "\n" for commit in commits))
    return path


def command(rows, name="out.jsonl"):
    return [PROGRAM, "--input", str(rows), "--output", str(rows.with_name(name)), "--skip-bad-rows"]


def shards(*words, **kwargs):
    return run_program("dataset/row_shards.py", *words, **kwargs)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst", "out.parquet"])
def test_joined_parts_are_the_single_run(rows, name):
    for index in (3, 1, 2):
        shards("run", f"{index}/3", *command(rows, name))
    shards("join", "3", *command(rows, name))
    single = command(rows, f"single{name.removeprefix('out')}")
    run_program("dataset/commits_to_jsonl.py", *single[1:])
    ours, theirs = rows.with_name(name), rows.with_name(single[4].rsplit("/", 1)[1])
    if name == "out.jsonl":
        assert ours.read_bytes() == theirs.read_bytes()
    elif name == "out.parquet":
        assert pyarrow.parquet.read_table(ours).equals(pyarrow.parquet.read_table(theirs))
    else:
        texts = [run_program("dataset/dedup_shuffle.py", path, "--output", "-").stdout for path in (ours, theirs)]
        assert texts[0] == texts[1] and texts[0].count("\n") > 90
    reports = [
        json.loads(path.with_name(f"{stem}_report.json").read_text())
        for path, stem in ((ours, "out"), (theirs, "single"))
    ]
    assert reports[0] == reports[1]
    assert not list(rows.parent.glob("*shard*"))
    assert "exists, nothing to do" in shards("join", "3", *command(rows, name)).stderr


def test_what_is_missing(rows):
    shards("run", "1/2", *command(rows))
    assert shards("missing", "2", *command(rows)).stdout.splitlines()[0].startswith("2\t")
    assert "nothing to do" in shards("run", "1/2", *command(rows)).stderr
    assert "shard 2 of 2 cannot be joined" in one_error_line(shards("join", "2", *command(rows), ok=False))
    other = [*command(rows), "--format", "octocoder"]
    assert [line.split("\t")[0] for line in shards("missing", "2", *other).stdout.splitlines()] == ["1", "2"]
    shards("run", "2/2", *command(rows))
    with open(rows, "a", encoding="utf-8") as file:
        file.write('{"commit": "new", "old_contents": "", "new_contents": "b", "subject": "Do"}\n')
    assert "from other input" in shards("missing", "2", *command(rows)).stdout


def test_an_input_after_an_equals_sign_is_watched(rows):
    joined = [PROGRAM, f"--input={rows}", f"--output={rows.with_name('out.jsonl')}", "--skip-bad-rows"]
    shards("run", "1/1", *joined)
    assert not shards("missing", "1", *joined).stdout
    with open(rows, "a", encoding="utf-8") as file:
        file.write("{}\n")
    assert "from other input" in shards("missing", "1", *joined).stdout


@pytest.mark.parametrize("output", ["./kept.jsonl", "output", "in/../kept.jsonl"])
def test_an_output_after_an_equals_sign_in_any_spelling(rows, output):
    (rows.parent / "in").mkdir()
    words = [PROGRAM, "--input", "rows.jsonl", f"--output={output}", "--skip-bad-rows"]
    for index in (1, 2):
        shards("run", f"{index}/2", *words, cwd=rows.parent)
    assert not (rows.parent / output).exists()
    shards("join", "2", *words, cwd=rows.parent)
    assert (rows.parent / output).read_text().count("\n") == 700


def test_long_words_and_broken_links_are_not_files(rows):
    rows.with_name("broken").mkdir()
    rows.with_name("broken").joinpath("link.jsonl").symlink_to("nowhere")
    words = [*command(rows), "--unused", "x" * 300, str(rows.with_name("broken"))]
    assert shards("missing", "2", *words).stdout.count("\n") == 2


def test_joined_parquet_has_the_columns_of_all_parts(tmp_path):
    chats = [
        {"question": f"What is {i}?", "answer": "A number."} | ({"note": i / 2} if i > 2 else {}) for i in range(4)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    words = ["--input", str(tmp_path / "chats.jsonl"), "--output"]
    program = "dataset/other/filter_oasst.py"
    for index in range(1, 10):  # some get no row
        shards("run", f"{index}/9", str(ROOT / program), *words, str(tmp_path / "joined.parquet"))
    shards("join", "9", str(ROOT / program), *words, str(tmp_path / "joined.parquet"))
    run_program(program, *words, str(tmp_path / "single.parquet"))
    joined, single = (pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("joined", "single"))
    assert joined.equals(single) and joined["note"].to_pylist() == [None, None, None, 1.5]


def test_a_stamp_that_cannot_be_removed_is_one_line(rows):
    rows.with_name(".out-shard-1-of-1.jsonl.stamp").mkdir()
    error = one_error_line(shards("run", "1/1", *command(rows), ok=False))
    assert "out-shard-1-of-1.jsonl: cannot be written" in error


def test_outputs_whose_names_have_dots_have_a_report_each(rows):
    for name in ("out.a.jsonl", "out.b.jsonl"):
        run_program("dataset/commits_to_jsonl.py", *command(rows, name)[1:])
    assert sorted(path.name for path in rows.parent.glob("*report*")) == ["out.a_report.json", "out.b_report.json"]


def test_a_failed_shard_stays_missing(rows):
    broken = [word for word in command(rows) if word != "--skip-bad-rows"]
    with open(rows, "a", encoding="utf-8") as file:
        file.write("no row\n")
    assert shards("run", "2/2", *broken, ok=False).returncode == 2
    assert shards("missing", "2", *broken).stdout.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["run", "3/2", PROGRAM, "--output", "x"], "expected I/N"),
        (["join", "no", PROGRAM, "--output", "x"], "expected a number"),
        (["join", "2", "nothing.py", "--output", "x"], "program not found"),
        (["join", "2", PROGRAM], "--output FILE: expected once"),
        (["join", "2", PROGRAM, "--output", "-"], "not standard output"),
        (["join", "2", PROGRAM, "--output", "x", "--shard", "1/2"], "leave it out"),
    ],
)
def test_mistakes_are_one_line(words, error):
    assert error in one_error_line(shards(*words, ok=False))


def test_an_output_among_the_input_is_refused(rows):
    words = [PROGRAM, "--input", str(rows.parent), "--output", str(rows.with_name("out.jsonl"))]
    assert "is in the directory" in one_error_line(shards("run", "1/2", *words, ok=False))


def test_settings_are_not_added_up():
    one = {"settings": {"seed": 7}, "rows": 1, "samples": ["a"]}
    two = {"settings": {"seed": 7}, "rows": 2, "samples": ["b"]}
    assert add_reports(one, two) == {"settings": {"seed": 7}, "rows": 3, "samples": ["a", "b"]}
