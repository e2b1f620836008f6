"""What tests of `--engine transformers` run on ranks, and tiny models of several kinds."""

import json
from pathlib import Path

import torch
from engine_runs import finetune as finetune_megatron

from megatron_ft.errors import EXIT_USER_ERROR, UserError

VOCABULARY = 512


def train(engine: str, flags: list[str], during: str = "") -> int:
    """A run of an engine on this rank; `during`: "SIGTERM-in-step 3" for the last rank."""
    if engine == "megatron-core":
        return finetune_megatron(flags)
    import os
    import signal

    from megatron_ft.hf_engine import finetune, trainer

    what, _, step = during.partition("-in-step ")
    if what and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        calls, seed_step = [], trainer._seed_step

        def seed(*args) -> None:
            calls.append(args)
            if len(calls) == int(step):
                os.kill(os.getpid(), signal.Signals[what])
            seed_step(*args)

        trainer._seed_step = seed
    try:
        return finetune.main(flags)
    except UserError as error:
        print(error)
        return EXIT_USER_ERROR


def lines(save: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's log file."""
    return [json.loads(line) for line in (save / name).read_text().splitlines()]


def column(save: Path, key: str) -> list:
    """One number of every step."""
    return [line[key] for line in lines(save)]


def tiny_model(kind: str, directory: Path, **changes) -> Path:
    """A random model of transformers with two layers, in a Hugging Face directory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "vocab_size": VOCABULARY,
    }
    torch.manual_seed(5)
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def write_adapters(model: Path, directory: Path, **settings) -> Path:
    """PEFT adapters of a model whose two factors are both random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(task_type="CAUSAL_LM", **settings))
    adapted.base_model.model.name_or_path = str(model)
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.1, generator=draw)
    adapted.save_pretrained(directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(model)}))
    return directory
