"""Train a GPT with random-LTD in a loop of your own on megatron-core.

    python examples/megatron_core_loop.py                   one GPU
    python examples/megatron_core_loop.py --cpu             without a GPU
    torchrun --nproc-per-node 4 examples/megatron_core_loop.py \
        --tensor-parallel 2 --pipeline-parallel 2

Three calls are random-LTD's: `attach`, `begin_step` and `end_step`; `LayerTokenScheduler` lets the
learning rate follow LayerTokens. Everything else is a plain megatron-core loop over the bytes of a
text file.

Shapes: b micro batch, s sequence length.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rltd import LayerTokenScheduler, RandomLTD, RandomLTDConfig
from megatron_rltd.cpu import adapter

if "--cpu" in sys.argv:
    adapter.enable()  # before Megatron is imported

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

SEQ, MICRO_BATCH, GLOBAL_BATCH = 128, 2, 8
TEXT = Path(__file__).parent.parent / "README.md"


def build(args: argparse.Namespace) -> DistributedDataParallel:
    """Return this rank's part of the model."""
    config = TransformerConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tensor_parallel,
        sequence_parallel=args.tensor_parallel > 1,
        pipeline_model_parallel_size=args.pipeline_parallel,
        pipeline_dtype=torch.float32,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=args.cpu,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=256,
        max_sequence_length=SEQ,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    ).cuda()
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    config.no_sync_func = model.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return model


def micro_batches(text: bytes, consumed_samples: int) -> Iterator[torch.Tensor]:
    """Yield this rank's samples of one step, [b, s + 1] int64, in Megatron's order.

    Sample i is a pure function of i, counted over all data-parallel ranks and steps.
    """
    replicas = parallel_state.get_data_parallel_world_size()
    for first in range(0, GLOBAL_BATCH, MICRO_BATCH * replicas):
        start = consumed_samples + first + parallel_state.get_data_parallel_rank() * MICRO_BATCH
        offsets = [i * SEQ % (len(text) - SEQ - 1) for i in range(start, start + MICRO_BATCH)]
        yield torch.tensor([list(text[o : o + SEQ + 1]) for o in offsets]).cuda()


def forward_step(data_iterator: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple:
    """Run the model on the next micro-batch, as the pipeline schedules ask for it."""
    samples = next(data_iterator)
    positions = torch.arange(SEQ, device=samples.device).expand(MICRO_BATCH, -1)
    losses = model(samples[:, :-1], positions, None, labels=samples[:, 1:])

    def mean(losses: torch.Tensor) -> tuple:
        return losses.mean(), {"loss": losses.mean().detach()}

    return losses, mean


def learning_rate(optimizer: Any, random_ltd: RandomLTD, steps: int) -> LayerTokenScheduler:
    """Return a schedule that has warmed up after a tenth of a run's LayerTokens and ends with it.

    Lengths are in samples of which nothing is dropped.
    """
    counted = random_ltd.resolved.layer_tokens
    samples = counted.after(steps, GLOBAL_BATCH).layer_tokens // counted.dense
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=2e-3,
        min_lr=1e-5,
        lr_warmup_steps=samples // 10,
        lr_decay_steps=samples,
        lr_decay_style="cosine",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=samples,
        wd_incr_style="constant",
    )
    return LayerTokenScheduler(scheduler, random_ltd)


def train(args: argparse.Namespace) -> list[float]:
    """Return the training losses of all steps on the last pipeline stage, elsewhere nothing."""
    text = TEXT.read_bytes()
    model = build(args)
    settings = OptimizerConfig(lr=2e-3, min_lr=1e-5, clip_grad=1.0)
    optimizer = get_megatron_optimizer(settings, [model])
    # Strata: the same tokens on every layout of up to 4-way tensor parallelism.
    config = RandomLTDConfig(
        min_tokens=32, ramp_iters=max(1, args.steps * 7 // 10), increment=32, strata=4
    )
    random_ltd = RandomLTD(config).attach(model)
    scheduler = learning_rate(optimizer, random_ltd, args.steps)
    forward_backward = get_forward_backward_func()
    replicas = parallel_state.get_data_parallel_world_size()
    history = []
    for step in range(args.steps):
        consumed_samples = step * GLOBAL_BATCH
        model.zero_grad_buffer()
        optimizer.zero_grad()
        random_ltd.begin_step(step, consumed_samples)
        losses = forward_backward(
            forward_step_func=forward_step,
            data_iterator=micro_batches(text, consumed_samples),
            model=[model],
            num_microbatches=GLOBAL_BATCH // (MICRO_BATCH * replicas),
            seq_length=SEQ,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
        ended = random_ltd.end_step()
        optimizer.step()
        scheduler.step(increment=GLOBAL_BATCH, step=ended)
        if losses:
            loss = torch.stack([each["loss"] for each in losses]).mean()
            torch.distributed.all_reduce(
                loss, torch.distributed.ReduceOp.AVG, parallel_state.get_data_parallel_group()
            )
            history.append(float(loss))
            if parallel_state.get_data_parallel_rank() == 0 and (
                parallel_state.get_tensor_model_parallel_rank() == 0
            ):
                kept, rate = ended.kept_tokens, optimizer.param_groups[0]["lr"]
                print(
                    f"step {step + 1:3}  loss {history[-1]:.4f}  kept tokens {kept}  "
                    f"learning rate {rate:.2e}",
                    flush=True,
                )
    return history


def main() -> None:
    """Set up the process groups and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="run without a GPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    args = parser.parse_args()
    if not (args.cpu or torch.cuda.is_available()):
        parser.error("there is no GPU: give --cpu to run on the CPU")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (variables | {"MASTER_PORT": "29513"}).items():
        os.environ.setdefault(name, value)
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo" if args.cpu else "nccl")
    parallel_state.initialize_model_parallel(args.tensor_parallel, args.pipeline_parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(1234)
    train(args)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
