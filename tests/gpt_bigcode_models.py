"""The GPTBigCode models on the Hub, as their config.json files describe them.

Facts only: what all of them have in common, and what each has. Fields that no part of this project
reads (generation, summaries, kernels of old versions) are left out.
"""

from typing import Any

COMMON = {
    "architectures": ["GPTBigCodeForCausalLM"],
    "model_type": "gpt_bigcode",
    "activation_function": "gelu_pytorch_tanh",
    "attention_softmax_in_fp32": True,
    "attn_pdrop": 0.1,
    "bos_token_id": 0,
    "embd_pdrop": 0.1,
    "eos_token_id": 0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "n_positions": 8192,
    "resid_pdrop": 0.1,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "vocab_size": 49152,
}


def _model(layers: int, hidden: int, heads: int, **others: Any) -> dict[str, Any]:
    return {**COMMON, "n_layer": layers, "n_embd": hidden, "n_head": heads, "n_inner": 4 * hidden, **others}


GELU = {"activation_function": "gelu"}
MODELS = {
    "tiny_starcoder_py": _model(20, 768, 12),
    "starcoderbase-1b": _model(24, 2048, 16),
    "starcoderbase-3b": _model(36, 2816, 22),
    "starcoderbase-7b": _model(42, 4096, 32, **GELU),
    "starcoderbase": _model(40, 6144, 48, **GELU),
    "starcoder": _model(40, 6144, 48, **GELU),
    "starcoderplus": _model(40, 6144, 48, **GELU),
    "starchat-alpha": _model(40, 6144, 48, vocab_size=49156, **GELU),
    "WizardCoder-15B": _model(40, 6144, 48, vocab_size=49153, **GELU),
    "sqlcoder2": _model(40, 6144, 48, **GELU),
    "aurora-m": _model(40, 6144, 48, n_positions=2048, pad_token_id=0, **GELU),
    "gpt_bigcode-santacoder": _model(
        24, 2048, 16, n_positions=2048, vocab_size=49280, bos_token_id=49152, eos_token_id=49152
    ),
    # Its first upload: an older name of the class, and ids of GPT-2 beyond its vocabulary.
    "NT-Java-1.1B": _model(
        24, 2048, 16, architectures=["GPTBigCodeLMHeadModel"], bos_token_id=50256, eos_token_id=50256
    ),
    "granite-20b-code-base": _model(52, 6144, 48, pad_token_id=0),
    "granite-20b-code-instruct-8k": _model(52, 6144, 48, pad_token_id=0, **GELU),
    "granite-34b-code-instruct": _model(88, 6144, 48, pad_token_id=0),
}

# They call themselves gpt_bigcode, and are other models.
REFACT = {  # smallcloudai/Refact-1_6-base, first upload: ALiBi positions, no biases
    **COMMON, "architectures": ["GPTRefactForCausalLM"], "activation_function": "gelu_new", "bos_token_id": 50256,
    "eos_token_id": 50256, "n_embd": 2048, "n_head": 32, "n_inner": None, "n_layer": 32, "n_positions": 1024,
    "vocab_size": 49216,
}  # fmt: skip
ROTARY = {  # an experiment on the way to StarCoder2
    **COMMON, **GELU, "architectures": ["GPTBigCodeLMHeadModel"], "attention_window_size": 8192, "head_groups": 2,
    "n_embd": 3072, "n_head": 24, "n_inner": 12288, "n_layer": 30, "n_positions": 16384,
    "rotary_embedding_scale": -13.81551, "use_position_embeddings": False, "use_rotary_embeddings": True,
}  # fmt: skip
# bigcode/santacoder and its fine-tuned models, whose code is in their own directory.
SANTACODER = {
    "activation_function": "gelu_fast", "architectures": ["GPT2LMHeadCustomModel"],
    "attention_head_type": "multiquery", "attn_pdrop": 0.1,
    "auto_map": {
        "AutoConfig": "configuration_gpt2_mq.GPT2CustomConfig",
        "AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel",
    },
    "bos_token_id": 49152, "embd_pdrop": 0.1, "eos_token_id": 49152, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_embd": 2048, "n_head": 16, "n_inner": 8192, "n_layer": 24,
    "n_positions": 2048, "reorder_and_upcast_attn": False, "resid_pdrop": 0.1, "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True, "vocab_size": 49280,
}  # fmt: skip
