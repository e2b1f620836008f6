"""Complete runs of `--engine transformers`: equal to the Megatron-Core engine, resumed bitwise,
data parallel, ended by signals; with adapters of each kind."""

import importlib.util
import json
import signal
from pathlib import Path

import pytest
import torch
from checkpoint_runs import Ranks, wait_for_iteration
from hf_runs import column, lines, train, write_adapters
from ranks import run_ranks
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_ft.checkpoint.resume import newest_manifest
from megatron_ft.config.arguments import parse_args
from megatron_ft.errors import EXIT_DONE, EXIT_RESUME, UserError
from megatron_ft.metrics.lines import DETERMINISTIC_KEYS
from megatron_ft.weights.open import open_weights

STEPS = 20
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
SCHEDULE = "--lr-warmup-iters 4 --min-lr 1e-4 --weight-decay 0.1 --clip-grad 0.8 --norm-target-loss"
LORA = "--lora-rank 4 --lora-alpha 8 --lora-dropout 0 --lora-targets linear_qkv,linear_fc2"


class Runs:
    """Runs of the tiny reference model on real data, each with its own save directory."""

    def __init__(self, golden: Path, folder: Path) -> None:
        self.golden, self.folder = golden, folder
        self.common = [
            *f"--tokenizer-file {golden}/data/tokenizer.json --data-prefix {golden}/data/short --seq-length 128".split(),
            *f"--data-cache-path {folder}/cache --validation-fraction 0.1 --lr 1e-3 --log-interval 100".split(),
            *f"--global-batch-size 4 --train-iters {STEPS} --eval-interval 10 --eval-iters full".split(),
        ]

    def words(self, name: str, flags: str) -> list[str]:
        load = [] if "--load" in flags else ["--load", f"{self.golden}/hf/hf_tiny"]
        return [*self.common, *load, "--save", str(self.folder / name), *flags.split()]

    def __call__(self, name: str, flags: str, ranks: int = 1, engine: str = "transformers", during: str = "") -> Path:
        """Run to the end, or to the stop that `during` or --exit-interval asks for."""
        statuses = run_ranks(train, ranks, engine, self.words(name, flags), during, timeout=900)
        assert set(statuses) == {EXIT_RESUME if during or "--exit-interval" in flags else EXIT_DONE}
        return self.folder / name


@pytest.fixture(scope="module")
def runs(golden, tmp_path_factory) -> Runs:
    return Runs(golden, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def one_rank(runs) -> Path:
    """Without dropout, two sequences at a time."""
    return runs("one", f"{NO_DROPOUT} {SCHEDULE} --micro-batch-size 2")


def close(ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    for key in ("loss", "grad_norm", "lr"):
        assert column(ours, key) == pytest.approx(column(theirs, key), rel=tolerance), key
    exact = [key for key in DETERMINISTIC_KEYS if key not in ("loss", "grad_norm", "lr")]
    assert [[line[key] for key in exact] for line in lines(ours)] == [
        [line[key] for key in exact] for line in lines(theirs)
    ]
    for ours_line, theirs_line in zip(lines(ours, "validation.jsonl"), lines(theirs, "validation.jsonl"), strict=True):
        assert ours_line["loss"] == pytest.approx(theirs_line["loss"], rel=tolerance)
        assert [ours_line[key] for key in ("iteration", "group", "tokens", "rows", "token_accuracy")] == [
            theirs_line[key] for key in ("iteration", "group", "tokens", "rows", "token_accuracy")
        ]


def test_steps_and_validation_equal_the_megatron_core_engine(runs, one_rank):
    megatron = runs("megatron", f"{NO_DROPOUT} {SCHEDULE} --micro-batch-size 2", engine="megatron-core")
    assert len(lines(one_rank)) == STEPS
    close(one_rank, megatron)


def test_lora_steps_equal_the_megatron_core_engine(runs, golden):
    modules = ["attn.c_attn", "mlp.c_proj"]
    adapters = write_adapters(
        golden / "hf/hf_tiny", runs.folder / "adapters", r=4, lora_alpha=8, target_modules=modules
    )
    flags = f"--load {adapters} {NO_DROPOUT} {LORA}"
    ours = runs("lora", flags)
    close(ours, runs("lora-megatron", flags, engine="megatron-core"))
    result = ours / f"iter_{STEPS:07d}"
    written, began = (load_file(where / "adapter_model.safetensors") for where in (result, adapters))
    assert written.keys() == began.keys()
    assert all((written[name] != began[name]).any() for name in began)
    assert json.loads((result / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        golden / "hf/hf_tiny"
    )


def is_sharded(checkpoint: Path) -> bool:
    """Whether ranks had parts of the optimizer's moments, not copies."""
    content = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return any(len(content[name].chunks) > 1 for name in content if name.endswith("exp_avg"))


def loaded_by_peft(result: Path, base: torch.nn.Module) -> torch.nn.Module:
    """The base with the adapters of a checkpoint, whose weights PEFT has all found."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    model = PeftModel.from_pretrained(base, result)
    written, read = load_file(result / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in written)
    return model


@pytest.mark.slow
def test_dora_on_ranks_with_copies_continues_on_one(runs, golden):
    from transformers import AutoModelForCausalLM

    flags = f"{NO_DROPOUT} {LORA} --lora-dora --train-iters 4"
    one = runs("dora", flags)
    save = runs("dora-copies", f"{flags} --no-use-distributed-optimizer --exit-interval 2", ranks=2)
    assert not is_sharded(save / "iter_0000002")
    assert runs("dora-copies", flags) == save
    assert len(lines(save)) == 4
    close(save, one)
    result = save / "iter_0000004"
    assert json.loads((result / "adapter_config.json").read_text())["use_dora"] is True
    base = AutoModelForCausalLM.from_pretrained(golden / "hf/hf_tiny")
    lengths = base.get_submodule("transformer.h.0.attn.c_attn").weight.norm(dim=1)
    loaded = loaded_by_peft(result, base)
    (trained,) = (w for name, w in loaded.named_parameters() if "h.0.attn.c_attn.lora_magnitude_vector" in name)
    assert trained.shape == lengths.shape and 0 < (trained - lengths).abs().max() < 1e-2 * lengths.max()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_qlora_on_two_ranks_equals_lora_on_the_dequantized_base(runs, golden):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = AutoModelForCausalLM.from_pretrained(
        golden / "hf/hf_tiny", quantization_config=nf4, dtype=torch.float32, device_map={"": "cpu"}
    )
    dequantized = runs.folder / "dequantized"
    quantized.dequantize().save_pretrained(dequantized)
    flags = f"{NO_DROPOUT} {LORA} --train-iters 4"
    qlora = runs("qlora", f"{flags} --quantize-base nf4", ranks=2)
    assert not is_sharded(qlora / "iter_0000004")
    close(qlora, runs("lora-dequantized", f"{flags} --load {dequantized}"))
    loaded_by_peft(qlora / "iter_0000004", AutoModelForCausalLM.from_pretrained(golden / "hf/hf_tiny"))


def test_ranks_that_shard_the_model_stop_together_and_continue_as_one(runs, one_rank):
    """Two processes under FSDP2 until a signal to one of them, then a single process."""
    flags = f"{NO_DROPOUT} {SCHEDULE}"
    save = runs("two", flags, ranks=2, during="SIGTERM-in-step 12")
    assert [line["event"] for line in lines(save, "events.jsonl")][-1].startswith("stopped by")
    assert len(lines(save)) == 12
    saved = json.loads((save / "iter_0000012/config.json").read_text())
    assert saved["architectures"] == ["GPTBigCodeForCausalLM"] and saved["use_cache"] is True
    assert is_sharded(save / "iter_0000012")
    assert runs("two", flags) == save
    close(save, one_rank)


def test_checkpoints_are_hugging_face_directories_of_one_engine(runs, one_rank):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = one_rank / f"iter_{STEPS:07d}"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(result), AutoTokenizer.from_pretrained(result)
    assert tokenizer.vocab_size == 1000 and tokenizer.encode("def f():")
    source = open_weights(one_rank)  # what converters and the other engine start from
    assert (source.kind, source.path) == ("Hugging Face", result)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert (load_file(result / "model.safetensors")[name] == model.state_dict()[name]).all()
    config = parse_args(runs.words("one", ""))
    with pytest.raises(UserError, match="was saved by --engine transformers; give that engine, or --load"):
        newest_manifest(config)


def test_a_killed_run_resumes_bitwise(runs):
    """With dropout: its random numbers are those of the step, not of the process."""
    flags = "--hidden-dropout 0.1 --attention-dropout 0.1 --save-interval 2 --eval-interval 0 --train-iters 10"
    uninterrupted = runs("uninterrupted", flags)
    with Ranks(train, 1, "transformers", runs.words("killed", flags)) as ranks:
        wait_for_iteration(ranks, runs.folder / "killed", 5, timeout=900)
        ranks.signal(signal.SIGKILL)
    killed = runs("killed", flags)
    for name in ("model.safetensors", "__0_0.distcp"):
        ours, theirs = (where / "iter_0000010" / name for where in (killed, uninterrupted))
        assert ours.read_bytes() == theirs.read_bytes(), name
    for key in DETERMINISTIC_KEYS:
        assert column(killed, key) == column(uninterrupted, key), key
