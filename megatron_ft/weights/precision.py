"""The precisions that converters write, by their names on the command line."""

PRECISIONS = ("bf16", "fp16", "fp32")
