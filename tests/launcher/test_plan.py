"""launch/plan.py: what it proposes fits and divides, what it refuses is named, and its steps are the training program's."""

import re

import numpy as np
import pytest
from conftest import ROOT, one_error_line, run_program
from doc_commands import run_page

from megatron_ft.data.indexed import IndexedWriter, commit, field_paths
from megatron_ft.model import cost
from megatron_ft.model.shape import PRESETS


def plan(*words, ok=True):
    return run_program("launch/plan.py", *words, ok=ok)


def proposals(text):
    """[(flags, GiB, fits, step seconds)] of an answer."""
    return [
        (flags, float(gib), fits == "fits", float(step))
        for flags, gib, fits, step in re.findall(
            r"flags +(.+)\n  memory .+ = ([\d.]+) GiB of [\d.]+: (fits|does not fit)\n  speed .+tokens/s, ([\d.]+) s a step",
            text,
        )
    ]


def test_three_proposals_fit_are_sorted_and_differ():
    text = plan(
        *"--preset starcoderbase --nodes 8 --gpus-per-node 8 --gpu h100-80gb --dataset-tokens 2.5e8".split()
    ).stdout
    found = proposals(text)
    assert len(found) == 3 and all(fits for _, _, fits, _ in found)
    assert [step for *_, step in found] == sorted(step for *_, step in found)
    assert len({re.sub("--micro-batch-size .*", "", flags) for flags, *_ in found}) == 3
    assert "15,517,456,384 parameters" in text and "an epoch: 31,137 rows (estimated), 244 steps" in text


def test_what_an_offloaded_optimizer_leaves_on_the_gpu_and_takes_of_the_host_is_counted():
    words = "--preset starcoderbase-7b --gpus-per-node 4 --gpu h100-80gb --pipeline-model-parallel-size 1 --recompute-granularity full"
    text = plan(*words.split(), "--optimizer-cpu-offload").stdout
    gib = 7_327_263_232 / cost.GIB
    assert f"weights {2 * gib:.1f} + gradients {4 * gib:.1f} + optimizer {4 * gib / 4:.1f}" in text
    rank, node = map(float, re.search(r"host +([\d.]+) GiB a rank, ([\d.]+) GiB a node", text).groups())
    assert node == pytest.approx(4 * rank, abs=0.2)
    assert 4 * gib + gib < rank < 4 * gib + 1.2 * gib  # all weights once in fp32, and this rank's share pinned
    assert "host" not in plan(*words.split()).stdout


def test_room_for_checkpoints_is_told_from_the_flags():
    words = "--preset starcoderbase --nodes 8 --gpu h100-80gb --train-iters 1000 --save-interval 100".split()
    assert "\ncheckpoint 217.2 GB, at most 4 at once\n" in plan(*words).stdout
    assert "\ncheckpoint 217.2 GB, at most 10 at once\n" in plan(*words, "--keep-last", "0").stdout
    words[words.index("--train-iters") :] = ["--keep-last", "0"]
    assert "\ncheckpoint 217.2 GB, all are kept\n" in plan(*words).stdout


def test_without_a_batch_it_takes_one_that_the_cluster_divides():
    text = plan(*"--preset starcoderbase --nodes 3 --gpus-per-node 8 --gpu h100-80gb".split()).stdout
    assert "120 a step" in text and "--global-batch-size 120" in proposals(text)[0][0]


def test_flags_of_a_proposal_hold_what_the_estimate_was_made_for():
    words = "--preset starcoderbase-7b --gpus-per-node 1 --gpu a100-80gb --optimizer-cpu-offload --lora-rank 8 --seq-length 2048"
    flags = re.search("flags +(.+)", plan(*words.split(), "--no-use-distributed-optimizer").stdout)[1]
    for given in ("--optimizer-cpu-offload", "--lora-rank 8", "--seq-length 2048", "--no-use-distributed-optimizer"):
        assert given in flags


def test_what_it_proposes_judged_again_gives_the_same_numbers():
    base = "--preset starcoderbase-7b --nodes 1 --gpus-per-node 8 --gpu a100-80gb".split()
    first = proposals(plan(*base).stdout)[0]
    again = proposals(plan(*base, *first[0].split()).stdout)
    assert again == [first]


def test_a_layout_that_is_too_large_is_said_to_be_with_ways_out():
    words = "--preset starcoderbase --nodes 2 --gpus-per-node 8 --gpu a100-40gb --tensor-model-parallel-size 2".split()
    done = plan(*words, ok=False)
    assert done.returncode == 1 and "this layout DOES NOT FIT" in done.stdout
    first, *others = proposals(done.stdout)
    assert not first[2] and others and all(fits for _, _, fits, _ in others)

    words = "--preset starcoderbase --nodes 1 --gpus-per-node 1 --gpu v100-16gb --lora_rank 16".split()
    done = plan(*words, ok=False)
    assert done.returncode == 1 and "ways out: more nodes" in done.stdout and "--lora-rank 16" not in done.stdout


def test_steps_and_hours_follow_from_real_data_and_the_length_asked_for(tmp_path):
    prefix = tmp_path / "data"
    writers = [IndexedWriter(path, np.dtype("uint16")) for path in field_paths(prefix)]
    for writer in writers:
        for _ in range(200):
            writer.add(np.arange(32))
    commit(writers)
    words = (
        f"--preset tiny --seq-length 127 --gpu a100-80gb --gpus-per-node 1 --global-batch-size 4 --data-prefix {prefix}"
    )
    text = plan(*words.split(), "--train-epochs", "3", "--mfu", "0.25").stdout
    # 95 % of 200 documents of 64 tokens, two to a row of 128
    assert "an epoch: 95 rows (packed), 24 steps" in text
    flops = 4 * 127 * cost.flops_per_token(PRESETS["tiny"], 127)
    seconds = flops / (0.25 * 312e12)
    assert re.search(r"run +72 steps, 0.0 h, 0 GPU hours", text)
    tokens = float(re.search(r"([\d,]+) tokens/s", text).group(1).replace(",", ""))
    assert tokens == pytest.approx(4 * 127 / seconds, rel=1e-3)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--gpu a100-80gb", "no model: give --preset, --load DIR"),
        ("--gpu a100 --preset tiny", "invalid choice: 'a100'"),
        (
            "--gpu a100-80gb --preset starcoderbase --tensor-model-parallel-size 5",
            "does not divide the 48 attention heads",
        ),
        (
            "--gpu a100-80gb --preset tiny --tensor-model-parallel-size 4 --nodes 3 --gpus-per-node 2",
            "6 GPUs are not a multiple of TP 4",
        ),
        (
            "--gpu a100-80gb --preset tiny --pipeline-model-parallel-size 1 --global-batch-size 12",
            "not a multiple of the micro batch",
        ),
        (
            "--gpu a100-80gb --preset tiny --nodes 3 --global-batch-size 125",
            "24 GPUs divides the model and --global-batch-size 125; try 120 or 144",
        ),
        ("--gpu a100-80gb --preset tiny --mfu 45", "45% is 0.45"),
        ("--gpu a100-80gb --preset tiny --tensor-paralel 2", "unknown flag --tensor-paralel"),
    ],
)
def test_mistakes_end_in_one_line(words, said):
    assert said in one_error_line(plan(*words.split(), ok=False))


def test_the_pages_commands_print_what_the_page_shows(tmp_path):
    printed = run_page("planning.md", tmp_path)
    page = (ROOT / "docs/planning.md").read_text()
    shown = [line[4:] for line in page.splitlines() if line.startswith("    ") and not line.lstrip().startswith("--")]
    assert len(shown) >= 8
    for line in shown:
        assert line in printed.splitlines(), line
