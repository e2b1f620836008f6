"""Megatron-FT: fine-tune StarCoder-family models with Megatron-Core on SLURM clusters."""

__version__ = "0.1.0"
