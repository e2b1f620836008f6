"""The functions of the API: arguments as flags, errors of ranks, and results without training."""

import os
import threading

import pytest
from conftest import ROOT

from megatron_ft import api
from megatron_ft.config.command_line import build_parser, former_spellings
from megatron_ft.config.keywords import command_line
from megatron_ft.errors import UserError

FIXTURES = ROOT / "tests/fixtures"


def words(**arguments):
    return command_line(arguments, build_parser().settable, former_spellings(), "finetune")


def test_arguments_become_the_words_of_a_command_line():
    given = words(train_iters=5, bf16=True, lr=1e-5, load=None, test_weighted_split_paths=["a: 1 0:1 p", "b: 1 0:1 q"])
    assert given == [
        "--train-iters", "5", "--bf16", "--lr", "1e-05", "--test-weighted-split-paths", "a: 1 0:1 p", "b: 1 0:1 q",
    ]  # fmt: skip
    assert words(use_distributed_optimizer=False, from_scratch=False) == ["--no-use-distributed-optimizer"]
    assert words(lr=1, config="run.yaml") == ["--config", "run.yaml", "--lr", "1"]
    assert words(validation_share=0.1) == ["--validation-fraction", "0.1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_iter": 5}, "finetune(): 'train_iter': unknown key; did you mean train-iters?"),
        ({"bf16": 1}, "finetune(): 'bf16': expected true or false, found '1'"),
        ({"lr": [1, 2]}, "finetune(): 'lr': expected one value, found a list of 2"),
    ],
)
def test_arguments_that_are_no_flags_are_user_errors(arguments, message):
    with pytest.raises(UserError) as error:
        words(**arguments)
    assert str(error.value) == message


def test_an_unknown_format_is_refused_with_those_of_both_converters():
    with pytest.raises(UserError, match="format 'gguf': expected 'huggingface', 'torch_dist' or 'legacy'"):
        api.convert("in", "out", format="gguf")


@pytest.fixture
def data(tmp_path):
    return {
        "data_prefix": FIXTURES / "data",
        "tokenizer_file": FIXTURES / "tokenizer.json",
        "seq_length": 128,
        "overlong": "truncate",
        "data_cache_path": tmp_path / "cache",
    }


def test_open_dataset_splits_as_training_does(data):
    train = api.open_dataset(**data, validation_fraction=0.25)
    valid = api.open_dataset(split="valid", **data, validation_fraction=0.25)
    documents = [{n for i in range(len(part)) for n in part.provenance(i)["documents"]} for part in (train, valid)]
    assert documents[0] and documents[1] and not documents[0] & documents[1]
    assert train[0].tokens.shape == (129,)
    for wrong, message in (
        ({"split": "valid", "group": "other"}, "no valid group 'other'; there are: valid"),
        ({"split": "test"}, "no test group; there are: none"),
        ({"split": "dev"}, "split 'dev': expected 'train', 'valid' or 'test'"),
    ):
        with pytest.raises(UserError, match=message):
            api.open_dataset(**wrong, **data)


def test_plan_judges_the_given_layout_and_proposes_others():
    large = api.plan(gpu="a100-40gb", gpus_per_node=4, preset="starcoderbase", tensor_model_parallel_size=1)
    assert not large.fits and large.given.memory.total > 40 * 2**30
    assert all("--tensor-model-parallel-size" in proposal.flags() for proposal in large.proposals)
    small = api.plan(gpu="a100-40gb", gpus_per_node=4, preset="starcoderbase-1b", dataset_tokens=1e6, train_epochs=1)
    assert small.fits and small.given is None and len(small.proposals) == 3
    assert small.run.steps == 1


def test_an_error_that_only_a_rank_finds_is_raised_also_in_a_thread(data, tmp_path):
    raised = []

    def train():
        try:
            api.finetune(
                **data, preset="tiny", from_scratch=True, train_iters=1, best_group="other", save=tmp_path / "run"
            )
        except UserError as error:
            raised.append(str(error))

    before = dict(os.environ)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert raised == ["--best-group other is not a validation group; the groups are: valid"]
    assert dict(os.environ) == before
