"""Train a GPT with random-LTD in Megatron-Bridge's own loop.

    torchrun --nproc-per-node 1 examples/megatron_bridge.py          one GPU
    torchrun --nproc-per-node 8 examples/megatron_bridge.py          eight, data parallel
    python examples/megatron_bridge.py --cpu                         without a GPU

`RandomLTDCallback` is all that a recipe of your own needs: give it to `pretrain`. The rest of this
file is a small recipe, on data that Megatron makes up.
"""

import argparse
import sys

import torch

from megatron_rltd import RandomLTD, RandomLTDConfig

if "--cpu" in sys.argv:
    import megatron_bridge_cpu

    megatron_bridge_cpu.enable()  # before Megatron is imported

from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
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

SEQ, MICRO_BATCH, GLOBAL_BATCH = 128, 2, 8


class RandomLTDCallback(Callback):
    """random-LTD in Megatron-Bridge's training loop."""

    def __init__(self, config: RandomLTDConfig):
        self.random_ltd = RandomLTD(config)

    def on_train_start(self, context: CallbackContext) -> None:
        """Attach to this rank's model chunks, which have their weights by now."""
        self.random_ltd.attach(context.model, seed=context.state.cfg.rng.seed)

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Begin a step: Megatron-Bridge counts it, and its samples, after `on_train_step_end`."""
        state = context.state.train_state
        self.random_ltd.begin_step(state.step, state.consumed_train_samples)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """End the step, so that evaluation sees all tokens."""
        self.random_ltd.end_step()


def recipe(args: argparse.Namespace) -> ConfigContainer:
    """Return the configuration of a small GPT."""
    on_cpu = megatron_bridge_cpu.MODEL if args.cpu else {}
    return ConfigContainer(
        model=GPTModelProvider(
            num_layers=4,
            hidden_size=64,
            num_attention_heads=4,
            seq_length=SEQ,
            vocab_size=256,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            **on_cpu,
        ),
        train=TrainingConfig(
            train_iters=args.steps, micro_batch_size=MICRO_BATCH, global_batch_size=GLOBAL_BATCH
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
        dist=DistributedInitConfig(distributed_backend="gloo" if args.cpu else "nccl"),
        logger=LoggerConfig(log_interval=1, logging_level=30),
        checkpoint=CheckpointConfig(save=None, load=None),
        rng=RNGConfig(seed=1234),
    )


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="run without a GPU")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    random_ltd = RandomLTDConfig(min_tokens=32, ramp_iters=max(1, args.steps * 7 // 10))
    pretrain(recipe(args), forward_step, callbacks=[RandomLTDCallback(random_ltd)])


if __name__ == "__main__":
    main()
