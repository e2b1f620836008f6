"""Which adapters of PEFT are plain LoRA, W + s B A on unchanged base weights: an allow-list.

PEFT keeps many methods under peft_type LORA. Some add other tensors or compute another product
(DoRA, aLoRA, QALoRA, BD-LoRA), some change the base weights when training starts (PiSSA, OLoRA,
CorDA, LoftQ, LoRA-GA), some change the model (layer replication, modules_to_save). Merged as plain
LoRA, each gives wrong weights. So every field of an adapter_config.json must be known here, with a
value at which it is plain LoRA. Fields are those of peft 0.21's LoraConfig and of older versions.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ft.errors import UserError
from megatron_ft.files.json_file import kind_of

# Fields that have no influence on what an adapter computes: they are about training or loading, or
# say which tensors there are, as the weights' file does.
ANY_VALUE = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "merge_weights", "peft_version",
    "qalora_group_size", "r", "revision", "runtime_config", "target_modules",
}  # fmt: skip
# The values of the others at which an adapter is plain LoRA; null always is.
PLAIN: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (),
    "alpha_pattern": ({},),
    "arrow_config": (),
    "bias": ("none",),
    "corda_config": (),
    "enable_lora": (),
    "fan_in_fan_out": (False, True),  # PEFT ignores it for nn.Linear, which GPTBigCode's layers are
    # With these, B A is zero or random at the start of training, and the base stays as it is.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "kasa_config": (),
    "layer_replication": (),
    "loftq_config": ({},),
    "lora_bias": (False,),
    "lora_ga_config": (),
    "megatron_config": (),
    "modules_to_save": ([],),
    "monteclora_config": (),
    "peft_type": ("LORA",),
    "rank_pattern": ({},),
    "target_parameters": ([],),
    "task_type": ("CAUSAL_LM",),
    "trainable_token_indices": ([], {}),
    "use_bdlora": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_rslora": (False, True),  # another scaling, see AdapterConfig.from_peft
    "velora_config": (),
}


def check_plain(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for the first field that is not known to mean plain LoRA at its value.

    `where` names the adapter_config.json.

    >>> check_plain({"peft_type": "LORA", "r": 8, "use_dora": True}, "adapter_config.json")
    Traceback (most recent call last):
    megatron_ft.errors.UserError: adapter_config.json: use_dora is True, which is not plain LoRA ...
    """
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {_shown(config.get('peft_type'))}, expected 'LORA'")
    for name, value in config.items():
        if value is None or name in ANY_VALUE:
            continue
        if not any(type(value) is type(plain) and value == plain for plain in PLAIN.get(name, ())):
            known = "is not plain LoRA" if name in PLAIN else "is unknown, and may not be plain LoRA"
            raise UserError(
                f"{where}: {name} is {_shown(value)}, which {known} (W + s B A on unchanged base weights); "
                "merge the adapter with PEFT: merge_and_unload()"
            )


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{kind_of(value)} ({shown[:50]}...)"
