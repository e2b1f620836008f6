"""Which kernels are chosen, from what is installed: no GPU is needed."""

import importlib.metadata
from dataclasses import replace

import pytest
from packaging.version import Version
from token_files import training_flags

from megatron_ft.engine.kernels import (
    Installed,
    accepted_transformer_engine,
    uses_transformer_engine,
    why_not_transformer_engine,
)
from megatron_ft.errors import UserError

HOPPER = Installed(transformer_engine="2.11.0", cudnn=91300, capability=(9, 0))
AMPERE = replace(HOPPER, capability=(8, 0))
CORE_BOUNDS_IT = Version(importlib.metadata.version("megatron-core")) < Version("0.19")  # Transformer Engine's version


def config_of(*flags: str):
    return training_flags("--preset", "starcoderbase-1b", "--data-prefix", "unused", *(flags or ("--bf16",)))


@pytest.mark.parametrize(
    ("installed", "flags", "reason"),
    [
        (HOPPER, ["--bf16"], None),
        (HOPPER, ["--bf16", "--attention-dropout", "0"], None),
        (AMPERE, ["--bf16"], "install flash-attn 2"),
        (replace(AMPERE, flash_attention_2=True), ["--bf16"], None),
        (replace(HOPPER, cudnn=0, flash_attention_3=True), ["--bf16"], "--attention-dropout 0"),
        (replace(HOPPER, cudnn=0, flash_attention_3=True), ["--bf16", "--attention-dropout", "0"], None),
        (replace(HOPPER, cudnn=90500), ["--bf16"], "install flash-attn 2"),
        (replace(HOPPER, capability=(7, 5), flash_attention_2=True), ["--fp16"], "before the A100"),
        (HOPPER, ["--attention-dropout", "0"], "in fp32"),
        (replace(HOPPER, transformer_engine="2.12.0"), ["--bf16"], "2.12.0 is installed" if CORE_BOUNDS_IT else None),
        (replace(HOPPER, transformer_engine="2.8.0"), ["--bf16"], "2.8.0 is installed" if CORE_BOUNDS_IT else None),
        (replace(HOPPER, transformer_engine="2.9.0"), ["--bf16"], None),
        (replace(HOPPER, transformer_engine=None), ["--bf16"], "not installed"),
        (replace(HOPPER, capability=None), ["--bf16"], "needs a GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_transformer_engine_is_chosen_only_with_attention_for_packed_rows(installed, flags, reason):
    config = config_of(*flags)
    found = why_not_transformer_engine(config, installed)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")
    assert uses_transformer_engine(config, installed) == (reason is None)


def test_transformer_engine_on_request_is_refused_with_the_reason():
    config = config_of("--bf16", "--transformer-impl", "transformer_engine")
    assert uses_transformer_engine(config, HOPPER)
    with pytest.raises(UserError, match="no attention kernel for packed rows.*--transformer-impl local"):
        uses_transformer_engine(config, AMPERE)


def test_local_layers_are_never_replaced():
    assert not uses_transformer_engine(config_of("--bf16", "--transformer-impl", "local"), HOPPER)


def test_accepted_versions_are_megatron_cores_own():
    accepted = accepted_transformer_engine()
    assert accepted is not None and "2.11" in accepted.specifier
    assert ("2.12" not in accepted.specifier) == CORE_BOUNDS_IT
