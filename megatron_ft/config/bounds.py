"""What each number on the command line may be: one table, looked at before any rank starts.

    check_bounds(args)      # UserError: --eval-interval -1: must be at least 0 (0 is never)

Every flag that takes a number has a line here; what several flags say together is in arguments.py.
"""

import argparse
import math
from dataclasses import dataclass

from megatron_ft.errors import UserError


@dataclass(frozen=True)
class Bound:
    """Numbers from `low` to `high`, without the ends where `open_low` or `open_high`; `note` explains an end."""

    low: float = 0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = True
    note: str = ""

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)  # False for NaN

    def __str__(self) -> str:
        words = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high < math.inf:
            words += f" and {'below' if self.open_high else 'at most'} {self.high:.10g}"
        return words + (f" ({self.note})" if self.note else "")


ONE_OR_MORE, NOT_NEGATIVE, POSITIVE = Bound(1), Bound(0), Bound(0, open_low=True)
NEVER = Bound(0, note="0 is never")
SHARE = Bound(0, 1)

BOUNDS = {
    # model
    "num_layers": ONE_OR_MORE,
    "hidden_size": ONE_OR_MORE,
    "num_attention_heads": ONE_OR_MORE,
    "ffn_hidden_size": ONE_OR_MORE,
    "max_position_embeddings": ONE_OR_MORE,
    "layernorm_epsilon": POSITIVE,
    "init_method_std": NOT_NEGATIVE,
    "hidden_dropout": SHARE,
    "attention_dropout": SHARE,
    "make_vocab_size_divisible_by": ONE_OR_MORE,
    # data
    "validation_share": SHARE,
    "seq_length": ONE_OR_MORE,
    "packing_lookahead": ONE_OR_MORE,
    # training
    "micro_batch_size": ONE_OR_MORE,
    "global_batch_size": ONE_OR_MORE,
    "train_iters": ONE_OR_MORE,
    "train_samples": ONE_OR_MORE,
    "train_tokens": ONE_OR_MORE,
    "train_epochs": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_eps": POSITIVE,
    "sgd_momentum": SHARE,
    "clip_grad": Bound(0, note="0 is off"),
    "seed": Bound(0, 2**32),
    # learning rate
    "lr": NOT_NEGATIVE,
    "min_lr": NOT_NEGATIVE,
    "lr_decay_iters": ONE_OR_MORE,
    "lr_decay_samples": ONE_OR_MORE,
    "lr_warmup_iters": NOT_NEGATIVE,
    "lr_warmup_samples": NOT_NEGATIVE,
    "lr_warmup_fraction": SHARE,
    "lr_warmup_init": NOT_NEGATIVE,
    "lr_wsd_decay_iters": ONE_OR_MORE,
    "lr_wsd_decay_samples": ONE_OR_MORE,
    # precision
    "loss_scale": POSITIVE,
    "initial_loss_scale": POSITIVE,
    "min_loss_scale": POSITIVE,
    "loss_scale_window": ONE_OR_MORE,
    "hysteresis": ONE_OR_MORE,
    # parallel layout
    "tensor_model_parallel_size": ONE_OR_MORE,
    "pipeline_model_parallel_size": ONE_OR_MORE,
    "context_parallel_size": ONE_OR_MORE,
    "distributed_timeout_minutes": POSITIVE,
    # memory and speed
    "recompute_num_layers": ONE_OR_MORE,
    "num_workers": Bound(0, note="0 reads as it goes"),
    # LoRA
    "lora_rank": Bound(0, note="0 is off"),
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    # validation
    "eval_interval": NEVER,
    "early_stop_patience": Bound(1, note="leave it out to never stop early"),
    # checkpoints
    "save_interval": Bound(0, note="0 is at the end alone"),
    "save_interval_mins": NEVER,
    "save_epochs": POSITIVE,
    "keep_last": Bound(0, note="0 keeps all"),
    "keep_every": Bound(0, note="0 is none"),
    # logging and stopping
    "log_interval": ONE_OR_MORE,
    "exit_interval": NEVER,
    "exit_duration_in_mins": POSITIVE,
    "watchdog_mins": NEVER,
}


def check_bounds(args: argparse.Namespace) -> None:
    """Raise UserError for the first number that is out of its bounds; what is not given is not looked at."""
    for name, bound in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and value not in bound:
            raise UserError(f"--{name.replace('_', '-')} {value:.10g}: must be {bound}")
