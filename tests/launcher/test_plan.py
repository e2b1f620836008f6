"""launch/plan.py: proposals fit and divide the batch, refusals give the reason, steps are right."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from conftest import ROOT, one_error_line, run_program
from doc_commands import run_page
from token_files import training_flags

from megatron_ft.data.indexed import IndexedWriter, commit, field_paths
from megatron_ft.errors import UserError
from megatron_ft.launcher.planning import make_plan, parse_plan
from megatron_ft.launcher.proposals import Planner, best
from megatron_ft.model import cost
from megatron_ft.model.families import PRESETS
from megatron_ft.model.speed import Cluster, step_seconds, tensor_seconds


def plan(*words, ok=True):
    return run_program("launch/plan.py", *words, ok=ok)


@dataclass
class Printed:
    """A proposal as it is printed."""

    flags: str
    gib: float
    fits: bool
    step_seconds: float


def proposals(text: str) -> list[Printed]:
    lines = r"flags +(.+)\n  memory .+ = ([\d.]+) GiB of [\d.]+: (fits|does not fit)\n  speed .+tokens/s, ([\d.]+) s per step"
    found = re.findall(lines, text)
    return [Printed(flags, float(gib), fits == "fits", float(step)) for flags, gib, fits, step in found]


def test_the_three_proposals_fit_differ_and_are_sorted_by_speed():
    text = plan(
        *"--preset starcoderbase --nodes 8 --gpus-per-node 8 --gpu h100-80gb --dataset-tokens 2.5e8".split()
    ).stdout
    found = proposals(text)
    assert len(found) == 3 and all(p.fits for p in found)
    assert [p.step_seconds for p in found] == sorted(p.step_seconds for p in found)
    assert len({re.sub("--micro-batch-size .*", "", p.flags) for p in found}) == 3
    assert "15,517,456,384 parameters" in text and "one epoch: 31,137 sequences (estimated), 244 steps" in text


def test_gpu_and_host_memory_of_an_offloaded_optimizer_are_counted():
    words = "--preset starcoderbase-7b --gpus-per-node 4 --gpu h100-80gb --pipeline-model-parallel-size 1 --recompute-granularity full"
    text = plan(*words.split(), "--optimizer-cpu-offload").stdout
    gib = 7_327_263_232 / cost.GIB
    assert f"weights {2 * gib:.1f} + gradients {4 * gib:.1f} + optimizer {4 * gib / 4:.1f}" in text
    rank, node = map(float, re.search(r"host +([\d.]+) GiB per rank, ([\d.]+) GiB per node", text).groups())
    assert node == pytest.approx(4 * rank, abs=0.2)
    assert 4 * gib + gib < rank < 4 * gib + 1.2 * gib  # all weights in fp32, and this rank's shard pinned
    assert "host" not in plan(*words.split()).stdout


def test_disk_space_for_checkpoints_follows_from_the_flags():
    words = "--preset starcoderbase --nodes 8 --gpu h100-80gb --train-iters 1000 --save-interval 100".split()
    assert "\ncheckpoint 217.2 GB, at most 4 at once\n" in plan(*words).stdout
    assert "\ncheckpoint 217.2 GB, at most 10 at once\n" in plan(*words, "--keep-last", "0").stdout
    words[words.index("--train-iters") :] = ["--keep-last", "0"]
    assert "\ncheckpoint 217.2 GB, all are kept\n" in plan(*words).stdout


def test_the_default_batch_is_one_that_the_cluster_divides():
    text = plan(*"--preset starcoderbase --nodes 3 --gpus-per-node 8 --gpu h100-80gb".split()).stdout
    assert "120 per step" in text and "--global-batch-size 120" in proposals(text)[0].flags


def test_the_flags_of_a_proposal_include_the_given_ones_that_the_estimate_depends_on():
    words = "--preset starcoderbase-7b --gpus-per-node 1 --gpu a100-80gb --optimizer-cpu-offload --lora-rank 8 --seq-length 2048"
    flags = re.search("flags +(.+)", plan(*words.split(), "--no-use-distributed-optimizer").stdout)[1]
    for given in ("--optimizer-cpu-offload", "--lora-rank 8", "--seq-length 2048", "--no-use-distributed-optimizer"):
        assert given in flags


def test_a_proposal_planned_again_has_the_same_numbers():
    base = "--preset starcoderbase-7b --nodes 1 --gpus-per-node 8 --gpu a100-80gb".split()
    first = proposals(plan(*base).stdout)[0]
    again = proposals(plan(*base, *first.flags.split()).stdout)
    assert again == [first]


def test_a_layout_that_does_not_fit_is_reported_with_ones_that_do_or_other_options():
    words = "--preset starcoderbase --nodes 2 --gpus-per-node 8 --gpu a100-40gb --tensor-model-parallel-size 2".split()
    done = plan(*words, ok=False)
    assert done.returncode == 1 and "this layout does not fit" in done.stdout
    first, *others = proposals(done.stdout)
    assert not first.fits and others and all(p.fits for p in others)

    words = "--preset starcoderbase --nodes 1 --gpus-per-node 1 --gpu v100-16gb --lora_rank 16".split()
    done = plan(*words, ok=False)
    assert done.returncode == 1 and "options: more nodes" in done.stdout and "--lora-rank 16" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset-tokens -5", "--dataset-tokens -5: must be above 0 and at most 1e+14"),
        ("--dataset-tokens nan", "--dataset-tokens nan: must be above 0"),
        ("--dataset-tokens 1e30 --train-epochs 1", "--dataset-tokens 1e+30: must be above 0 and at most 1e+14"),
        ("--document-tokens 0", "--document-tokens 0: must be above 0"),
        ("--seq-length 9999", "--seq-length 9999 exceeds the model's 8192 positions"),  # as training would
    ],
)
def test_impossible_numbers_are_one_line(words, message):
    options = ["--preset", "starcoderbase", "--gpu", "h100-80gb", *words.split()]
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        make_plan(*parse_plan(options))


def test_steps_and_hours_follow_from_the_data_and_the_length(tmp_path):
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
    # 95% of 200 documents of 64 tokens, two in a sequence of 128
    assert "one epoch: 95 sequences (packed), 24 steps" in text
    flops = 4 * 127 * cost.flops_per_token(PRESETS["tiny"], 127)
    seconds = flops / (0.25 * 312e12)
    assert re.search(r"run +72 steps, 0.0 h, 0 GPU hours", text)
    tokens = float(re.search(r"([\d,]+) tokens/s", text).group(1).replace(",", ""))
    assert tokens == pytest.approx(4 * 127 / seconds, rel=1e-3)
    warning = "warning: your data make 5 steps (285 packed sequences, 64 per step); lower --global-batch-size 64 to 14"
    assert (
        warning not in text
        and warning in plan(*words.split(), *"--train-epochs 3 --global-batch-size 64".split()).stdout
    )


@pytest.mark.parametrize(
    "words, message",
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
            "not a multiple of the micro-batch",
        ),
        (
            "--gpu a100-80gb --preset tiny --nodes 3 --global-batch-size 125",
            "24 GPUs divides the model and --global-batch-size 125; try 120 or 144",
        ),
        ("--gpu a100-80gb --preset tiny --mfu 45", "45% is 0.45"),
        ("--gpu a100-80gb --preset tiny --tensor-paralel 2", "unknown flag --tensor-paralel"),
    ],
)
def test_usage_errors_are_one_line(words, message):
    assert message in one_error_line(plan(*words.split(), ok=False))


def test_commands_in_planning_md_print_what_the_page_shows(tmp_path):
    printed = run_page("planning.md", tmp_path)
    page = (ROOT / "docs/planning.md").read_text()
    shown = [line[4:] for line in page.splitlines() if line.startswith("    ") and not line.lstrip().startswith("--")]
    assert len(shown) >= 8
    for line in shown:
        assert line in printed.splitlines(), line


PRESET_SCRIPTS = [path for path in sorted(ROOT.glob("slurm/finetune_*.sh")) if "--preset" in path.read_text("utf-8")]


@pytest.mark.parametrize("script", PRESET_SCRIPTS, ids=lambda path: path.stem)
def test_scripts_use_the_first_layout_for_80_gb_gpus(script):
    text = script.read_text(encoding="utf-8")
    nodes, gpus = (int(re.search(rf"#SBATCH --{name}=(\d+)", text)[1]) for name in ("nodes", "gpus-per-node"))
    words = dict(re.findall(r"(--[\w-]+) (\w\S*)", text[text.index("\nfinetune ") :]))
    preset, batch = words["--preset"], int(words["--global-batch-size"])
    config = training_flags(
        "--preset", preset, "--data-prefix", "unused", "--bf16", seq_length=PRESETS[preset].max_position_embeddings
    )
    for gpu, margin in (("a100-80gb", 1.0), ("h100-80gb", 1.05)):
        cluster = Cluster(gpu=cost.GPUS[gpu], nodes=nodes, gpus_per_node=gpus, mfu=0.45)
        found = best(Planner(config.shape, config, cluster, batch, 500.0).judge_all(as_given=False).fitting, 9)
        sizes = [int(words.get(f"--{kind}-model-parallel-size", 1)) for kind in ("tensor", "pipeline")]
        chosen = next(p for p in found if [p.layout.tensor_parallel, p.layout.pipeline_parallel] == sizes)
        assert chosen.step_seconds <= margin * found[0].step_seconds, f"{gpu}: {found[0].layout} is faster"


def test_a_layout_is_charged_for_what_it_communicates():
    shape = PRESETS["starcoderbase"]
    cluster = Cluster(gpu=cost.GPUS["h100-80gb"], nodes=8, gpus_per_node=8, mfu=0.45)
    base = cost.Layout(tensor_parallel=4, sequence_parallel=True, data_parallel=16, num_microbatches=8)

    def seconds(shape=shape, cluster=cluster, **changes):
        return step_seconds(shape, replace(base, **changes), cluster, 8192, 500.0)

    # Gathered queries, keys and values: multi-head attention has none, but more rows to compute.
    gathered = tensor_seconds(shape, base, cluster, 8192)
    own_heads = tensor_seconds(replace(shape, num_query_groups=48), base, cluster, 8192)
    assert gathered / own_heads == pytest.approx(1 + 2 * shape.qkv_rows / (8 * shape.hidden_size))
    # The bubble of three micro-batches in eight, and a last stage that has the logits.
    pipelined = seconds(pipeline_parallel=4, data_parallel=4, num_microbatches=32)
    assert 32 / 35 * pipelined / seconds() > 1.05
    # Gradients that a micro-batch's backward pass does not hide: on a network of a tenth.
    slow = replace(cluster, gpu=replace(cluster.gpu, network=cluster.gpu.network / 10))
    assert seconds(cluster=slow) > 1.05 * seconds() and seconds(cluster=slow, data_parallel=1) == seconds(
        data_parallel=1
    )
    assert seconds(recompute="full") > 1.25 * seconds()
