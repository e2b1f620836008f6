"""transformers' Trainer on packed sequences: our data, loss, schedule and log around its step.

One batch of the Trainer is a global batch, so that one of its steps is an optimizer step. It wraps
the model (DDP, or FSDP2 through accelerate), casts, clips, steps and scales; what comes before and
after each step is the same as in the Megatron-Core engine (training/train.py).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, GradScalerKwargs
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from megatron_ft.config.config import Config
from megatron_ft.hf_engine.model import check_isolation, logits_of
from megatron_ft.training.batches import MicroBatch
from megatron_ft.training.run import Run
from megatron_ft.training.schedule import Length, build_scheduler, learning_rate
from megatron_ft.training.seeds import step_seed
from megatron_ft.training.step import Step
from megatron_ft.training.train import after_step, begin, finished


def training_arguments(config: Config, scratch: Path, *, steps: int, use_cache: bool) -> TrainingArguments:
    """The Trainer's settings. It writes nothing: `scratch` stays empty."""
    precision, recompute = config.precision, config.memory.recompute_granularity == "full"
    return TrainingArguments(
        output_dir=str(scratch),
        use_cpu=not torch.cuda.is_available(),
        max_steps=steps,
        per_device_train_batch_size=config.training.micro_batch_size,
        learning_rate=config.schedule.lr,
        max_grad_norm=config.optimizer.clip_grad,
        bf16=precision.bf16,
        fp16=precision.fp16,
        seed=config.training.seed,
        fsdp=shards(config) or None,  # type: ignore[arg-type]  # a bool since transformers 5
        fsdp_config={"version": 2, "reshard_after_forward": True} if shards(config) else None,
        ddp_find_unused_parameters=False,
        activation_checkpointing=recompute,
        activation_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
        use_cache=use_cache,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,
        log_level="error",
    )


def shards(config: Config) -> bool:
    """Whether weights, gradients and optimizer state are sharded across ranks.

    Quantized weights are small, and each rank has its own.
    """
    several = config.parallel.world_size > 1
    return several and config.parallel.distributed_optimizer and not config.lora.quantize_base


class PackedTrainer(Trainer):
    """A Trainer of a `Run`, which is set before `train`, and an `Engine` of it.

    `vocab_size`: columns of the logits that take part in the softmax, None for all. `length` and
    `done`: of the entire run and of the checkpoint to resume, for the schedule. `stop`: what has
    stopped the run, None until then.
    """

    counts = True  # every rank reads sequences of its own

    def __init__(
        self,
        model: Any,
        config: Config,
        arguments: TrainingArguments,
        *,
        vocab_size: int | None,
        length: Length,
        done: Length,
    ) -> None:
        self.config, self.vocab_size, self.length, self.done = config, vocab_size, length, done
        self.data_parallel_rank = dist.get_rank()
        self.model_config = model.config
        self.stop: str | None = None
        self.run: Run | None = None
        self._step: Step | None = None
        super().__init__(model=model, args=arguments, callbacks=[_Beginning(self)])

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        wrapped: Any = self.optimizer
        return wrapped.optimizer

    @property
    def of_run(self) -> Run:
        """The run, which is set."""
        assert self.run is not None
        return self.run

    # ---- what the Trainer asks for -----------------------------------------------------------

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        precision, built = self.config.precision, super()._build_accelerator_args(**kwargs)
        if precision.fp16:
            built["kwargs_handlers"].append(
                GradScalerKwargs(init_scale=precision.initial_loss_scale, growth_interval=precision.loss_scale_window)
            )
        return built

    def create_accelerator_and_postprocess(self) -> None:
        """Let accelerate shard on the CPU as well, which it does only on accelerators by itself."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.use_cpu:
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if self.args.bf16:
                plugin.set_mixed_precision("bf16")
            state = self.accelerator.state
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> Any:
        """Steps as long as there are any."""
        return _Steps(self)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The next step, if there is one."""
        step = next(epoch_iterator, None)
        return ([] if step is None else [step]), None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam or SGD with Megatron's rule: no weight decay on biases and norms."""
        if self.optimizer is None:
            optimizer, wrapped = self.config.optimizer, model or self.model
            assert wrapped is not None
            trained = [(name, weight) for name, weight in wrapped.named_parameters() if weight.requires_grad]
            decay = [weight for name, weight in trained if weight.ndim > 1 and not name.endswith("bias")]
            plain = [weight for name, weight in trained if weight.ndim < 2 or name.endswith("bias")]
            groups = [{"params": ws, "wd_mult": m} for ws, m in ((decay, 1.0), (plain, 0.0)) if ws]
            if optimizer.name == "sgd":
                self.optimizer = torch.optim.SGD(groups, lr=self.config.schedule.lr, momentum=optimizer.sgd_momentum)
            else:
                self.optimizer = torch.optim.AdamW(
                    groups,
                    lr=self.config.schedule.lr,
                    betas=(optimizer.adam_beta1, optimizer.adam_beta2),
                    eps=optimizer.adam_eps,
                    fused=torch.cuda.is_available(),
                )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Megatron's schedule, which counts sequences, on the run's state."""
        assert self.optimizer is not None
        self.of_run.state.optimizer = self.optimizer
        self.of_run.state.scheduler = build_scheduler(self.config, self.optimizer, self.length, self.done)
        self.lr_scheduler = _NoScheduler()  # type: ignore[assignment]
        return self.lr_scheduler

    def _get_learning_rate(self) -> float:
        return learning_rate(self.optimizer)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward passes of this rank's micro-batches.

        Each adds its part of the mean over the global batch. DDP and FSDP average over ranks, which
        is undone.
        """
        self._step = step = inputs
        model.train()
        _seed_step(self.config.training.seed, self.of_run.state.iteration, self.data_parallel_rank)
        weight, ranks = step.totals.weight or 1.0, self.accelerator.num_processes
        contributions = []
        for number, micro in enumerate(step.micro_batches, 1):
            # FSDP reduces gradients every time: otherwise each rank would hold all of them.
            wait = number < len(step.micro_batches) and not self.is_fsdp_enabled
            with self.accelerator.no_sync(model) if wait else contextlib.nullcontext():
                losses = self._token_losses(self._logits(model, micro), micro)
                contribution = (losses * micro.weights).sum() / weight
                self.accelerator.backward(contribution * ranks)
            contributions.append(contribution.detach())
        losses = torch.stack(contributions)
        step.agree(losses)
        return losses.sum()

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """What follows each step, instead of the Trainer's own; called once more after the last."""
        step, self._step = self._step, None
        if step is None:
            return
        scaler = self.accelerator.scaler
        stop = step.finish(
            lr=kwargs["learning_rate"],
            updated=not self.accelerator.optimizer_step_was_skipped,
            grad_norm=float(grad_norm),
            loss_scale=float(scaler.get_scale()) if scaler is not None else 1.0,
        )
        self.stop = after_step(self.of_run, stop)
        self.control.should_training_stop = self.stop is not None or finished(self.of_run)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted here: the log does."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Nothing: the log is ours."""

    # ---- Engine ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode."""
        self.model_wrapped.eval()
        try:
            yield
        finally:
            self.model_wrapped.train()

    def gathered_weights(self) -> contextlib.AbstractContextManager:
        """Weights are always up to date."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def count(self, micro_batches: list[MicroBatch]) -> list[float]:
        """See Engine."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        for micro in micro_batches:
            logits = self._logits(self.model_wrapped, micro)
            counted = (micro.loss_mask > 0).double()
            label_logits = logits.gather(-1, micro.labels[..., None])[..., 0]
            hits = (label_logits >= logits.max(-1).values).double()
            losses = self._token_losses(logits, micro).double()
            sums += torch.stack(
                [x.sum() for x in (losses * micro.weights, micro.weights.double(), hits * counted, counted)]
            )
        return sums.tolist()

    def check(self) -> None:
        """Raise UserError if documents that must not see each other do."""
        if self.config.data.reset_attention_mask:
            with self.evaluating():
                check_isolation(self.model_wrapped, self.model_config.model_type, self.args.device)

    def _logits(self, model: nn.Module, micro: MicroBatch) -> Tensor:
        logits = logits_of(model, micro, self.config, self.model_config._attn_implementation)
        return logits if self.vocab_size is None else logits[..., : self.vocab_size]

    def _token_losses(self, logits: Tensor, micro: MicroBatch) -> Tensor:
        """Cross entropy of each token, float32 [1, t]."""
        return F.cross_entropy(logits[0].float(), micro.labels[0], reduction="none")[None]


class _Steps:
    """The steps of a run, each read when the one before is finished. It has no length."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Step]:
        run = self.trainer.of_run
        while run.train_batches is not None and self.trainer.stop is None and not finished(run):
            yield Step(run)


class _NoScheduler:
    """Leaves the learning rate to the run's own scheduler."""

    def step(self) -> None:
        """Nothing."""


class _Beginning(TrainerCallback):
    """What comes before the first step, once the Trainer has wrapped the model."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the model, restore the optimizer, validate."""
        trainer, run = self.trainer, self.trainer.of_run
        trainer.check()
        run.checkpointer.restore_optimizer(trainer, run.state)  # type: ignore[attr-defined]  # HfCheckpointer
        if not self.trainer.config.validation.skip_train:
            trainer.stop = begin(run)


def _seed_step(seed: int, iteration: int, rank: int) -> None:
    torch.manual_seed(step_seed(seed, iteration, rank))
