"""Flags of BigCode's Megatron-LM branch `mtf` without a counterpart here: ignored, or refused.

Its users bring long command lines. Flags that change nothing are accepted with a notice; those that
cannot be honored end in an error with what to do instead. Renamed ones are `aliases` in
flags.py.
"""

# Ask for what this program always does, or configure what no longer exists.
# The value is the number of words that follow.
ACCEPTED = {
    "--tokenizer-type": 1, "--vocab-file": 1, "--merge-file": 1, "--data-impl": 1, "--mmap-warmup": 0, "--use-flash-attn": 0,
    "--no-masked-softmax-fusion": 0, "--no-bias-gelu-fusion": 0, "--no-bias-dropout-fusion": 0, "--no-gradient-accumulation-fusion": 0,
    "--DDP-impl": 1, "--distributed-backend": 1, "--use-cpu-initialization": 0, "--append-eod": 0,
    "--no-async-tensor-model-parallel-allreduce": 0, "--finetune-mtf": 0, "--valid-num-workers": 1,
    "--no-contiguous-buffers-in-local-ddp": 0, "--no-scatter-gather-tensors-in-pipeline": 0, "--lazy-mpu-init": 1, "--local-rank": 1,
    "--empty-unused-memory-level": 1, "--no-persist-layer-norm": 0, "--no-initialization": 0, "--use-checkpoint-args": 0,
    "--no-query-key-layer-scaling": 0, "--attention-softmax-in-fp32": 0, "--data-parallel-random-init": 0,
    "--override-opt-param-scheduler": 0, "--no-save-rng": 0, "--exit-signal-handler": 0, "--log-params-norm": 0,
    "--log-num-zeros-in-grad": 0, "--tensorboard-log-interval": 1, "--tensorboard-queue-size": 1, "--log-timers-to-tensorboard": 0,
    "--log-batch-size-to-tensorboard": 0, "--no-log-learnig-rate-to-tensorboard": 0, "--no-log-loss-scale-to-tensorboard": 0,
    "--log-validation-ppl-to-tensorboard": 0, "--log-memory-to-tensorboard": 0, "--log-world-size-to-tensorboard": 0,
    "--wandb-entity-name": 1, "--transformer-timers": 0, "--structured-logs": 0, "--structured-logs-dir": 1,
    "--inference-batch-times-seqlen-threshold": 1, "--distribute-saved-activations": 0,
}  # fmt: skip
_OTHER_MODEL = "the models are GPTBigCode (StarCoder, SantaCoder); leave it out"
_SCHEDULER = "a resumed run follows its own command line, at the checkpoint's place in the schedule; leave it out"
REFUSED = {
    "--num-layers-per-virtual-pipeline-stage": "interleaved pipeline stages are not supported; leave it out",
    "--pipeline-model-parallel-split-rank": "there is no encoder to split off; leave it out",
    "--standalone-embedding-stage": "the embedding shares the first pipeline stage; leave it out",
    "--data-path": "use --data-prefix, or --train-weighted-split-paths-path",
    "--split": "use --validation-fraction, or ranges in --train-weighted-split-paths-path",
    "--deepspeed": "the engine is Megatron-Core; leave DeepSpeed flags out",
    "--kv-channels": "a head has hidden size / heads channels; leave it out",
    "--apply-residual-connection-post-layernorm": _OTHER_MODEL,
    "--openai-gelu": "it is the same function as --activation gelu_tanh; leave it out, or use that flag",
    "--onnx-safe": _OTHER_MODEL,
    "--glu-activation": _OTHER_MODEL,
    "--num-experts": _OTHER_MODEL,
    "--fp32-residual-connection": "residuals are in the training precision; leave it out",
    "--fp16-lm-cross-entropy": "the loss is always in fp32; leave it out",
    "--init-method-xavier-uniform": "random initialization is normal with --init-method-std; leave it out",
    "--start-weight-decay": "weight decay is constant; use --weight-decay",
    "--end-weight-decay": "weight decay is constant; use --weight-decay",
    "--weight-decay-incr-style": "weight decay is constant; use --weight-decay",
    "--warmup": "use --lr-warmup-fraction, a fraction and not a percentage",
    "--use-checkpoint-opt-param-scheduler": _SCHEDULER,
    "--no-save-optim": "a checkpoint without optimizer could not be resumed; use convert/megatron_to_hf.py to keep only the weights",
    "--distributed-timeout": "use --distributed-timeout-minutes",
    "--dataloader-type": "sequences are always read in their shuffled order, as with 'single'; leave it out",
    "--sample-rate": "the branch's packed data never used it; set weights in --train-weighted-split-paths-path",
    "--fim-rate": "the branch's packed data never applied it; write fill-in-the-middle rows into the JSONL",
    "--fim-spm-rate": "the branch's packed data never applied it; write fill-in-the-middle rows into the JSONL",
    "--vocab-extra-ids": "add tokens to the tokenizer file instead; the model's vocabulary follows it",
    "--encoder-seq-length": "use --seq-length",
    "--decoder-seq-length": "use --seq-length",
    "--adlr-autoresume": "a stopped run is resumed by the same command; leave it out",
    "--adlr-autoresume-interval": "a stopped run is resumed by the same command; leave it out",
}
