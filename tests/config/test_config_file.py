"""--config: flags from a YAML file, what overrides them, and one clear line for what is wrong."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from megatron_ft.config.arguments import normalize, parse_args
from megatron_ft.config.command_line import build_parser, keep_settings, with_config
from megatron_ft.config.parser import Parser
from megatron_ft.errors import UserError
from megatron_ft.model.families import PRESETS

TOKENIZER = str(ROOT / "tests/fixtures/tokenizer.json")


def parser() -> Parser:
    parser = Parser(allow_abbrev=False)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shard", type=lambda text: tuple(map(int, text.split("/"))))
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--keys", nargs="+", default=["inputs"])
    parser.add_argument("--source", action="append", default=[])
    parser.add_argument("--shuffle", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--skip-bad-rows", action="store_true")
    repos = parser.add_mutually_exclusive_group(required=True)
    repos.add_argument("--repos", nargs="+")
    repos.add_argument("--repos-from")
    return parser


EVERYTHING = """
rows: [a.jsonl, b.jsonl]
output: out.jsonl
selection:
  shard: 1/2
  seed: 7
more:
  deeper: {keys: [inputs, targets], source: [x=1, y=2]}
shuffle: no
skip_bad_rows: true
repos: d
"""


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> list[str]:
        (tmp_path / "c.yaml").write_text(text)
        return ["--config", str(tmp_path / "c.yaml")]

    return write


def test_file_sets_every_kind_of_argument(config):
    found = parser().parse_args(config(EVERYTHING))
    assert found == argparse.Namespace(
        rows=["a.jsonl", "b.jsonl"], output=Path("out.jsonl"), shard=(1, 2), seed=7, keys=["inputs", "targets"],
        source=["x=1", "y=2"], shuffle=False, skip_bad_rows=True, repos=["d"], repos_from=None,
    )  # fmt: skip


def test_command_line_takes_precedence(config):
    words = "c.jsonl --seed 8 --source z=3 --shuffle --repos-from list --keys k".split()
    found = parser().parse_args([*words, *config(EVERYTHING)])
    assert found.rows == ["c.jsonl"] and found.seed == 8 and found.shuffle and found.keys == ["k"]
    assert found.source == ["z=3"]  # not appended to the file's
    assert (found.repos, found.repos_from) == (None, "list")  # they exclude each other
    assert found.output == Path("out.jsonl") and found.skip_bad_rows


def test_printed_settings_are_read_again(config, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([*config(EVERYTHING), "--print-config", "--seed", "9"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "shard: 1/2\n" in printed and "seed: 9\n" in printed
    expected = parser().parse_args(config(EVERYTHING.replace("seed: 7", "seed: 9")))
    assert parser().parse_args(config(printed)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: o\nsede: 3", r"c.yaml, line 2: 'sede': unknown key; did you mean seed\?"),
        ("seed: [1, 2]", r"line 1: 'seed': expected one value, found a list of 2"),
        ("seed: many", r"line 1: 'seed': invalid int value: 'many'"),
        ("shuffle: 3", r"line 1: 'shuffle': expected true or false, found '3'"),
        ("keys: []", r"line 1: 'keys': expected at least one value"),
        ("keys: [[a]]", r"line 1: 'keys': expected a value or a list of values"),
        ("seed: 1\nx: {seed: 2}", r"line 2: 'seed': given on line 1 already"),
        ("seed: [", r"c.yaml, line 1: not YAML"),
        ("- seed", r"c.yaml: expected keys with values"),
        ("help: true", r"line 1: 'help': unknown key"),
        ("a: &a {b: *a}", r"c.yaml, line 1: (not YAML|sections in more than)"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(text, message, config):
    with pytest.raises(UserError, match=message):
        parser().parse_args([*config(text), "rows"])


@pytest.mark.parametrize("key", ["rows", "row"])
def test_argument_without_a_flag_has_its_name_or_that_of_help(key, config):
    reader = Parser(allow_abbrev=False)
    reader.add_argument("rows", nargs="+", metavar="ROW")
    assert reader.parse_args(config(f"{key}: [a, b]")).rows == ["a", "b"]


def test_missing_file_is_one_line():
    with pytest.raises(UserError, match="nowhere.yaml: no such file"):
        parser().parse_args(["--config", "nowhere.yaml"])


def test_training_flags_of_a_file_yield_to_others_of_the_same_setting(config):
    words = with_config([*config("train-epochs: 2\nbf16: true\nlr: 1e-4"), "--train-iters", "5", "--fp16"])
    found = build_parser().parse_args(words)
    assert (found.train_iters, found.train_epochs, found.fp16, found.bf16, found.lr) == (5, None, True, False, 1e-4)
    with pytest.raises(UserError, match="line 1: 'lr': invalid float value: 'fast'"):
        with_config(config("lr: fast"))


def script_of(preset: str) -> Path | None:
    path = ROOT / f"slurm/finetune_{preset.replace('-', '_')}.sh"
    return path if path.exists() else None


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_example_of_a_preset_is_valid_and_sets_what_its_script_sets(preset):
    example = ROOT / f"examples/configs/{preset}.yaml"
    given = ["--config", str(example), "--data-prefix", "p", "--tokenizer-file", TOKENIZER, "--load", "l"]
    script, ranks = script_of(preset), 1
    if script:
        text = script.read_text()
        header = dict(re.findall(r"^#SBATCH --(nodes|ntasks-per-node)=(\d+)", text, flags=re.MULTILINE))
        ranks = int(header["nodes"]) * int(header["ntasks-per-node"])
        line = re.search(r'^finetune (.+?)"\$@"', text, flags=re.MULTILINE | re.DOTALL)[1]
        flags = build_parser()
        of_script = flags.parse_args(normalize(shlex.split(line.replace("\\\n", "")), flags.actions)[0])
        assert flags.parse_args(with_config(given[:2])) == of_script
    settled = parse_args(given, world_size=ranks)
    assert settled.model.preset == preset


def test_kept_settings_repeat_the_run(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRON_FT_LAUNCHED_WITH", '{"num-processes": 2}')
    flags = f"--preset tiny --from_scratch --data-prefix data --tokenizer-file {TOKENIZER} --train-iters 3 --lr 1e-3"
    flags += " --no-use-distributed-optimizer --valid-weighted-split-paths 'v: 1 0:1 data' --save runs/first"
    first = parse_args(shlex.split(flags), 2)
    (tmp_path / "runs/first").mkdir(parents=True)
    keep_settings(first, tmp_path / "runs/first")
    kept = tmp_path / "runs/first/config.yaml"
    assert "num-processes: 2" in kept.read_text() and f"data-prefix: {tmp_path}/data" in kept.read_text()
    monkeypatch.chdir("/")
    repeated = parse_args(["--config", str(kept)], 2)
    paths = {"save": f"{tmp_path}/runs/first", "data_prefix": f"{tmp_path}/data"}
    assert repeated.values() == first.with_flags(**paths).values()
