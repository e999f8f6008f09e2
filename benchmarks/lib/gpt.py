"""Training steps of a GPT of megatron-core at any kept length, in one process on one model.

Shapes: s sequence length, b micro batch, h hidden size, v vocabulary.
"""

import contextlib
import importlib.util
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import record_function

from lib.attention import TRANSFORMER_ENGINE, layer_spec
from megatron_rltd import join_micro_batches
from megatron_rltd.config import RandomLTDConfig
from megatron_rltd.cpu import adapter
from megatron_rltd.model.random_ltd import RandomLTD

Backend = Literal["auto", "cuda", "torch"]
DTYPES = ("float32", "bfloat16")
PARTS = ("forward", "backward", "optimizer")
FUSED, UNFUSED = "fused", "unfused"
OPTIMIZER = "bench: optimizer"  # what the profiler calls all of it


@dataclass(frozen=True)
class Shape:
    """A GPT and what it trains on. Names are those of Megatron's arguments."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    vocab_size: int
    micro_batch_size: int
    dtype: str
    position_embedding_type: str = "learned_absolute"


PRESETS = {
    "tiny": Shape(4, 32, 4, 64, 64, 2, "float32"),
    # The output layer's share of the operations is about that of the large model.
    "small": Shape(8, 512, 8, 512, 4096, 2, "float32"),
    # GPT-3 1.3B of arXiv 2211.11586; the vocabulary is GPT-2's, padded.
    "gpt3-1.3b": Shape(24, 2048, 16, 2048, 50304, 8, "bfloat16"),
}


def operations(shape: Shape, kept: int, dropped: int, is_causal: bool) -> int:
    """Return the floating-point operations of a sample, forward and backward.

    Those of matrix products, the output layer's too.

    Args:
        kept: k, tokens that a dropped layer processes.
        dropped: Number of dropped layers.
        is_causal: Whether attention leaves out the half that is masked, as Megatron's own count
            assumes.
    """

    def layer(tokens: int) -> int:
        linear = 24 * tokens * shape.hidden_size**2  # 4 h^2 weights in attention, 8 h^2 in the MLP
        return linear + 4 * tokens**2 * shape.hidden_size // (2 if is_causal else 1)

    layers = (shape.num_layers - dropped) * layer(shape.seq_length) + dropped * layer(kept)
    return 3 * (layers + 2 * shape.seq_length * shape.hidden_size * shape.vocab_size)


@contextlib.contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """Megatron's parallel state for this process alone, on the CPU if that is the device."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if device.type == "cpu":
            stack.enter_context(adapter.enabled())  # before Megatron is imported
        from megatron.core import parallel_state, tensor_parallel

        logging.getLogger("megatron").setLevel(logging.ERROR)
        torch.distributed.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            init_method=f"file://{Path(folder) / 'store'}",
            rank=0,
            world_size=1,
        )
        stack.callback(torch.distributed.destroy_process_group)
        parallel_state.initialize_model_parallel()
        stack.callback(parallel_state.destroy_model_parallel)
        torch.manual_seed(1234)
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield


def default_cross_entropy(shape: Shape, device: torch.device) -> str:
    """Return the cross-entropy of a training: fused, where that changes nothing but the time."""
    return FUSED if shape.dtype == "bfloat16" and device.type == "cuda" else UNFUSED


def has_extension(name: str) -> bool:
    """Return whether one of Megatron's optional kernels can run here."""
    return torch.cuda.is_available() and importlib.util.find_spec(name) is not None


def has_fused_gradients() -> bool:
    """Return whether weight gradients are added up where they are computed."""
    return has_extension("fused_weight_gradient_mlp_cuda")


def build(shape: Shape, attention: str, cross_entropy: str) -> Any:
    """Return the model in training mode, as Megatron's own scripts wrap it.

    Args:
        attention: One of `bench_attention.DESCRIBED`.
        cross_entropy: `FUSED` or `UNFUSED`; fused is Megatron's native one.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    is_bf16, has_gpu = shape.dtype == "bfloat16", torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=is_bf16,
        params_dtype=getattr(torch, shape.dtype),
        # What of Megatron's fused kernels is there, as its scripts have it by default.
        masked_softmax_fusion=has_extension("scaled_upper_triang_masked_softmax_cuda"),
        gradient_accumulation_fusion=has_fused_gradients(),
        bias_activation_fusion=has_gpu,
        bias_dropout_fusion=has_gpu,
        apply_rope_fusion=has_gpu and attention == TRANSFORMER_ENGINE,
        cross_entropy_loss_fusion=cross_entropy == FUSED,
        cross_entropy_fusion_impl="native",
        use_cpu_initialization=not has_gpu,
    )
    model: Any = GPTModel(
        config,
        layer_spec(attention),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.seq_length,
        position_embedding_type=shape.position_embedding_type,
    ).cuda()
    if is_bf16:
        model = Float16Module(config, model)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=is_bf16)
    return DistributedDataParallel(config, settings, model).train()


class Trainer:
    """A model whose next step may keep any number of tokens.

    Attributes:
        dropped: Number of layers that drop.
    """

    def __init__(
        self,
        shape: Shape,
        least: int,
        device: torch.device,
        backend: Backend,
        attention: str,
        cross_entropy: str,
        most_joined: int = 1,
    ):
        """Build the model.

        Args:
            least: The shortest kept length that a step may have.
            most_joined: Micro-batches that a pass may take, at most.
        """
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.shape, self.device, self._least = shape, device, least
        self.model = build(shape, attention, cross_entropy)
        settings = OptimizerConfig(
            lr=1e-4,
            clip_grad=1.0,
            bf16=shape.dtype == "bfloat16",
            params_dtype=getattr(torch, shape.dtype),
        )
        self._optimizer = get_megatron_optimizer(settings, [self.model])
        # One more token with each position of the schedule, so that a position chooses a length.
        ramp = max(1, shape.seq_length - least)
        config = RandomLTDConfig(
            min_tokens=least,
            ramp_iters=ramp,
            increment=1,
            backend=backend,
            grow_micro_batch=most_joined,
        )
        self._random_ltd = RandomLTD(config).attach(self.model)
        self.dropped = len(self._random_ltd.resolved.dropped_layers)
        self._consumed_samples = 0

    def joined(self, kept: int, micro_batches: int) -> int:
        """Return how many micro-batches of a step a pass takes with `kept` tokens."""
        return self._random_ltd.resolved.micro_batches_per_pass(kept, micro_batches)

    def step(
        self,
        kept: int,
        micro_batch_size: int,
        samples: int,
        mark: Callable[[str], None],
        passes: contextlib.AbstractContextManager | None = None,
    ) -> None:
        """Train on random tokens.

        Args:
            kept: k; s is a step in which nothing is dropped, Megatron's own.
            micro_batch_size: b. If it is more than the shape's, micro-batches of that size are
                joined in passes, as many as the config has it.
            samples: Samples of the step, a multiple of b.
            mark: Called with the part that has just ended, one of `PARTS`.
            passes: Entered for the forward and backward passes, if any.
        """
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        size = min(micro_batch_size, self.shape.micro_batch_size)
        forward_backward_func = get_forward_backward_func()
        if size < micro_batch_size:
            forward_backward_func = join_micro_batches(forward_backward_func, self._random_ltd)
        tokens = torch.randint(
            self.shape.vocab_size, (samples, self.shape.seq_length + 1), device=self.device
        )
        positions = torch.arange(self.shape.seq_length, device=self.device).expand(size, -1)
        ended: list[str] = []  # what runs until the next forward pass

        def forward_step(data_iterator: Iterator[torch.Tensor], model: Any) -> tuple:
            while ended:
                mark(ended.pop())
            part = next(data_iterator)

            def loss_func(losses: torch.Tensor) -> tuple:
                ended[:] = ["backward"]
                mark("forward")
                return losses.mean(), {}

            return model(part[:, :-1], positions, None, labels=part[:, 1:]), loss_func

        with record_function(OPTIMIZER):
            self.model.zero_grad_buffer()
            self._optimizer.zero_grad()
        step = self._random_ltd.begin_step(kept - self._least, self._consumed_samples)
        assert step.kept_tokens == kept
        assert micro_batch_size in (size, size * self.joined(kept, samples // size))
        mark("optimizer")
        with passes or contextlib.nullcontext():
            forward_backward_func(
                forward_step_func=forward_step,
                data_iterator=iter(tokens.split(size)),
                model=self.model,
                num_microbatches=samples // size,
                seq_length=self.shape.seq_length,
                micro_batch_size=size,
            )
        mark("backward")
        self._random_ltd.end_step()
        with record_function(OPTIMIZER):
            finalize_model_grads([self.model])
            self._optimizer.step()
        mark("optimizer")
        self._consumed_samples += samples

    def timed_step(
        self, kept: int, micro_batch_size: int, samples: int, now: Callable[[], float]
    ) -> dict[str, float]:
        """Take a step; return the seconds of "step", of each of `PARTS`, and of "host".

        That is the time that Python takes to give the forward and backward passes to the GPU, or
        the GPU to take them if it is behind; on a CPU it is the passes' own.

        Args:
            now: The clock of the CPU.
        """
        is_gpu = self.device.type == "cuda"
        marks: list[tuple[str, float, Any]] = []

        def mark(part: str) -> None:
            event = torch.cuda.Event(enable_timing=True) if is_gpu else None
            if event:
                event.record()
            marks.append((part, now(), event))

        if is_gpu:
            torch.cuda.synchronize()
        mark("start")
        self.step(kept, micro_batch_size, samples, mark)
        if is_gpu:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(("step", *PARTS, "host"), 0.0) | {"step": now() - marks[0][1]}
        for (_, began, start), (part, ended, end) in itertools.pairwise(marks):
            seconds[part] += start.elapsed_time(end) / 1000 if is_gpu else ended - began
            seconds["host"] += ended - began if part != "optimizer" else 0
        return seconds
