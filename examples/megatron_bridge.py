"""Train a GPT with random-LTD in Megatron-Bridge's own loop.

    torchrun --nproc-per-node 1 examples/megatron_bridge.py          one GPU
    torchrun --nproc-per-node 8 examples/megatron_bridge.py          eight GPUs, data parallel
    python examples/megatron_bridge.py --cpu                         without a GPU

With `--folder`, it writes checkpoints there and continues from the newest one.

`RandomLTDCallback` is what a recipe of your own needs: pass it to `pretrain`. The rest is a small
recipe on data that Megatron makes up.
"""

import argparse
import copy
import sys

from megatron_rltd import LayerTokenScheduler, RandomLTD, RandomLTDConfig
from megatron_rltd.pretrain import compiled_helper

# Before Megatron is imported:
if "--cpu" in sys.argv:
    import megatron_bridge_cpu

    megatron_bridge_cpu.enable()
else:
    # Megatron-Bridge runs Megatron's make at start-up, for which a wheel has no Makefile.
    compiled_helper.use(even_in_clone=False)

from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.utils.common_utils import print_rank_0

SEQ, MICRO_BATCH, GLOBAL_BATCH = 128, 2, 8


class RandomLTDCallback(Callback):
    """random-LTD in Megatron-Bridge's training loop.

    Args:
        config: Without `grow_micro_batch`, because Megatron-Bridge calls Megatron's
            forward-backward function itself.
        layer_token_lr: Whether the learning rate follows LayerTokens. The lengths of the run's
            schedule are then in samples of which nothing is dropped.
    """

    def __init__(self, config: RandomLTDConfig, layer_token_lr: bool = False):
        if config.grow_micro_batch > 1:
            raise ValueError("Megatron-Bridge cannot grow micro-batches: omit grow_micro_batch")
        self.config, self.layer_token_lr = config, layer_token_lr

    def on_train_start(self, context: CallbackContext) -> None:
        """Attach to this rank's model chunks. A checkpoint has been loaded by now."""
        settings = context.state.cfg
        if settings.rerun_state_machine.rerun_mode != "disabled":
            raise ValueError("random-LTD cannot repeat a step: leave rerun_mode at 'disabled'")
        self.random_ltd = RandomLTD(self.config).attach(
            context.model,
            seed=settings.rng.seed,
            micro_batch_size=settings.train.micro_batch_size,
        )
        if self.layer_token_lr:
            follow_layer_tokens(context.scheduler, self.random_ltd)

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Begin a step. Megatron-Bridge counts it and its samples after it has ended."""
        state = context.state.train_state
        self.random_ltd.begin_step(state.step, state.consumed_train_samples)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """End the step, and log it."""
        ended, number = self.random_ltd.end_step(), context.state.train_state.step + 1
        print_rank_0(f"step {number}: kept tokens {ended.kept_tokens}")
        if context.state.tensorboard_logger:
            context.state.tensorboard_logger.add_scalar(
                "random-ltd kept tokens", ended.kept_tokens, number
            )


def follow_layer_tokens(scheduler, random_ltd: RandomLTD) -> None:
    """Let the scheduler that Megatron-Bridge made advance by LayerTokens.

    Megatron-Bridge keeps its scheduler, so this replaces two methods of it, by those of a
    `LayerTokenScheduler` around a copy.
    """
    own = copy.copy(scheduler)
    own.num_steps = 0
    follows = LayerTokenScheduler(own, random_ltd)
    follows.load_state_dict(scheduler.state_dict())  # of a checkpoint, if one was loaded
    scheduler.step, scheduler.state_dict = follows.step, follows.state_dict


def recipe(steps: int, folder: str | None = None, on_cpu: bool = False) -> ConfigContainer:
    """Return the configuration of a small GPT."""
    return ConfigContainer(
        model=GPTModelProvider(
            num_layers=4,
            hidden_size=64,
            num_attention_heads=4,
            seq_length=SEQ,
            vocab_size=256,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            **(megatron_bridge_cpu.MODEL if on_cpu else {}),
        ),
        train=TrainingConfig(
            train_iters=steps, micro_batch_size=MICRO_BATCH, global_batch_size=GLOBAL_BATCH
        ),
        validation=ValidationConfig(eval_interval=5, eval_iters=1),
        optimizer=OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-5),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine", start_weight_decay=0.01, end_weight_decay=0.01
        ),
        dataset=MockGPTDatasetConfig(
            seq_length=SEQ,
            random_seed=1234,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
        ),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=255),
        ddp=DistributedDataParallelConfig(),
        dist=DistributedInitConfig(distributed_backend="gloo" if on_cpu else "nccl"),
        logger=LoggerConfig(log_interval=1, logging_level=30),
        checkpoint=CheckpointConfig(save=folder, load=folder, save_interval=5),
        rng=RNGConfig(seed=1234),
    )


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="run without a GPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", help="of checkpoints, to write and to continue from")
    parser.add_argument("--layer-token-lr", action="store_true")
    args = parser.parse_args()
    config = RandomLTDConfig(min_tokens=32, ramp_iters=max(1, args.steps * 7 // 10))
    callback = RandomLTDCallback(config, args.layer_token_lr)
    pretrain(recipe(args.steps, args.folder, args.cpu), forward_step, callbacks=[callback])


if __name__ == "__main__":
    main()
