"""Megatron's GPT on the GPU that is made up (`fake_gpu`), and the micro-batches that it is given.

Shapes: s sequence length, b micro batch, n heads, d head size, t = b * s tokens end to end.
"""

import contextlib
import functools
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_rltd import RandomLTD, RandomLTDConfig, join_micro_batches
from megatron_rltd.model.layer import fused_rotary
from tests.gpu import fake_gpu
from tests.gpu.fake_gpu import Guard

fake_gpu.NOT_OURS.add(__file__)
VOCAB, SEQ, BATCH, WIDTH = 64, 32, 3, 16


@dataclass(frozen=True)
class Case:
    """A model, its layout and its micro-batches.

    Attributes:
        layers: All, of which the first and the last do not drop.
        mask: None, "causal" [1, 1, s, s] or "documents" [b, 1, s, s].
        packed: None, "dense", "one tensor" for offsets with and without padding, or "padded".
        padding: Whether with a padding mask [b, s].
        fp8_recompute: Recompute as Megatron does under FP8, but in bfloat16.
        joined: Micro-batches of a step, in one pass.
        options: Of the ``TransformerConfig``.
        random_ltd: Of the ``RandomLTDConfig``.
    """

    layers: int = 4
    rotary: bool = False
    mask: str | None = None
    packed: str | None = None
    padding: bool = False
    rank: int = 0
    tensor_parallel: int = 1
    context_parallel: int = 1
    first_stage: bool = True
    backend: str = "auto"
    dropping: bool = True
    fp8_recompute: bool = False
    joined: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    random_ltd: dict[str, Any] = field(default_factory=dict)


class _Product(torch.autograd.Function):
    """Of three tensors; gradients are contiguous, as those of fused attention are."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return (inputs[0] * inputs[1] * inputs[2]).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return tuple((grad * x).contiguous() for x in ctx.saved_tensors)


class Attention(torch.nn.Module):
    """Stands for Transformer Engine's attention, without its arithmetic.

    Megatron's own takes neither packed sequences nor context parallelism.
    """

    def __init__(self, config, **kwargs):
        super().__init__()

    def forward(self, query, key, value, attention_mask=None, packed_seq_params=None, **kwargs):
        """Check what a kernel would read, and return queries as [s, b, n * d] or [t, n * d]."""
        groups = query.size(-2) // key.size(-2)
        key, value = (x.repeat_interleave(groups, dim=-2) for x in (key, value))
        if packed_seq_params is not None:
            assert query.dim() == 3
            for name in ("cu_seqlens_q", "cu_seqlens_kv"):
                offsets = getattr(packed_seq_params, name)
                assert offsets.dtype == torch.int32 and offsets.device == query.device
        return _Product.apply(query, key, value).flatten(-2)


def _megatron_config(case: Case):
    from megatron.core.transformer import TransformerConfig

    sizes = dict(
        num_layers=case.layers,
        hidden_size=WIDTH,
        num_attention_heads=4,
        tensor_model_parallel_size=case.tensor_parallel,
        sequence_parallel=case.tensor_parallel > 1,
        context_parallel_size=case.context_parallel,
        pipeline_model_parallel_size=1 if case.first_stage else 2,
        pipeline_dtype=torch.bfloat16,
    )
    needs_compiled_code = "masked_softmax_fusion bias_activation_fusion bias_dropout_fusion"
    needs_compiled_code += " gradient_accumulation_fusion apply_rope_fusion persist_layer_norm"
    types = dict(use_cpu_initialization=True, bf16=True, params_dtype=torch.bfloat16)
    off = dict.fromkeys(needs_compiled_code.split(), False)
    none = dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0)
    return TransformerConfig(**{**sizes, **types, **off, **none, **case.options})


def _norm(cls, config, hidden_size, eps=1e-5, **kwargs):
    """Make a norm like that of Transformer Engine, which takes sequence parallelism."""
    norm = torch.nn.LayerNorm(hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm


def _model(case: Case, attention: Any):
    """Return a GPTModel on the fake device, in training mode."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    config = _megatron_config(case)
    layer = get_gpt_layer_local_spec()
    if attention or case.packed or case.context_parallel > 1 or config.apply_rope_fusion:
        layer.submodules.self_attention.submodules.core_attention = attention or Attention
    count = case.layers if case.first_stage else case.layers // 2
    model = GPTModel(
        config,
        TransformerBlockSubmodules([layer] * count, WrappedTorchNorm),
        VOCAB,
        SEQ,
        position_embedding_type="rope" if case.rotary else "learned_absolute",
        pre_process=case.first_stage,
    )
    return model.to(torch.bfloat16).train()


def to_device(model: torch.nn.Module) -> None:
    """Put fake tensors on "cuda" in the place of a model's parameters, buffers and tensors."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
            if isinstance(tensor, torch.nn.Parameter):
                new = torch.nn.Parameter(new, tensor.requires_grad)
            for name, value in vars(tensor).items():
                setattr(new, name, value)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers, module.__dict__):
            for name, value in list(tensors.items()):
                if isinstance(value, Tensor):
                    tensors[name] = fake(value)


@contextlib.contextmanager
def _layout(case: Case) -> Iterator[None]:
    """Megatron's parallel state of one rank, alone: collectives talk to nobody."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    size = case.tensor_parallel * case.context_parallel * (1 if case.first_stage else 2)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=case.rank, world_size=size)
    parallel_state.initialize_model_parallel(
        case.tensor_parallel,
        1 if case.first_stage else 2,
        context_parallel_size=case.context_parallel,
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _rotary_kernel(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
    """Stand for Transformer Engine's fused kernel: one op, and its shape rules."""
    assert freqs.size(1) == freqs.size(2) == 1 and t.size(0) <= freqs.size(0)
    return t * freqs[: t.size(0), :, :, :1].to(t.dtype)


@contextlib.contextmanager
def _stand_ins(case: Case) -> Iterator[None]:
    """What Megatron has from Transformer Engine, and what it waits for the GPU with by itself."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def fork(self, name=""):
        return contextlib.nullcontext()

    def packed_rotary(t, cu_seqlens, freqs, **kwargs):  # Megatron's own reads cu_seqlens
        assert freqs.device == t.device
        return t * freqs[:1, 0, :, :1].to(t.dtype)

    def no_fp8(*args, **kwargs):
        return contextlib.nullcontext()

    fused = functools.partial(fused_rotary, _rotary_kernel)
    with contextlib.ExitStack() as stack:
        if case.fp8_recompute:
            for module in ("recompute", "transformer.transformer_block"):
                stack.enter_context(mock.patch(f"megatron.core.{module}.get_fp8_context", no_fp8))
        for stand_in in (
            mock.patch.object(CudaRNGStatesTracker, "fork", fork),
            mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", fused),
            mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb_thd", fused),
            mock.patch.object(rope_utils, "_apply_rotary_pos_emb_thd", packed_rotary),
            mock.patch("megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__", _norm),
        ):
            stack.enter_context(stand_in)
        yield


def _inputs(case: Case) -> dict[str, Any]:
    """Return the arguments of a model for one micro-batch, on the fake device."""
    length = SEQ // case.context_parallel
    shape = (1, BATCH * SEQ) if case.packed else (BATCH, length)
    tokens = torch.zeros(shape, dtype=torch.int64, device="cuda")
    arguments: dict[str, Any] = dict(
        input_ids=tokens, position_ids=tokens, labels=tokens, attention_mask=None
    )
    if case.mask:
        batch = BATCH if case.mask == "documents" else 1
        mask = torch.ones(batch, 1, SEQ, SEQ, dtype=torch.bool, device="cuda")
        arguments["attention_mask"] = mask
    if case.padding:
        arguments["padding_mask"] = torch.zeros(shape, dtype=torch.bool, device="cuda")
    if case.packed:
        from megatron.core.packed_seq_params import PackedSeqParams

        offsets = torch.tensor([0, 9, SEQ, 3 * SEQ], dtype=torch.int32, device="cuda")
        padded = {"dense": None, "one tensor": offsets, "padded": offsets + 1}[case.packed]
        arguments["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=offsets,
            cu_seqlens_kv=offsets,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=2 * SEQ,
            max_seqlen_kv=2 * SEQ,
        )
        # Makes seq_idx where params are made, for Mamba.
        arguments["packed_seq_params"].total_tokens = BATCH * SEQ
    return arguments


def _stage_input(case: Case) -> Tensor:
    rows = SEQ // (case.tensor_parallel * case.context_parallel)
    return torch.zeros(rows, BATCH, WIDTH, dtype=torch.bfloat16, device="cuda", requires_grad=True)


@dataclass
class Result:
    """What a case did.

    Attributes:
        found: What our code did wrong, or what was raised, one line each.
        forward: Op to how often our code launched it in the forward pass of one micro-batch.
        backward: The same of the backward pass.
        all: The same of all code, in both.
    """

    found: list[str] = field(default_factory=list)
    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    all: dict[str, int] = field(default_factory=dict)


def run(case: Case, attention: Any = None) -> Result:
    """Run a micro-batch to warm up, and one of a later step, with another k, that is counted.

    Args:
        attention: What to use instead of `Attention`.
    """
    result = Result()
    _forget()
    with _stand_ins(case), _layout(case):
        model = _model(case, attention)
        with fake_gpu.active() as guard:
            try:
                to_device(model)
                if case.fp8_recompute:
                    model.decoder.config.fp8 = "hybrid"
                (_train if case.joined == 1 else _train_joined)(case, model, guard, result)
            except fake_gpu.NotOnAGpu:
                pass  # it is in guard.found
            except Exception as error:
                result.found.append(_described(error))
            result.found += guard.found
    return result


def _forget() -> None:
    """Clear our caches, so that every case warms up for itself."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "megatron_rltd":
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _train(case: Case, model: Any, guard: Guard, result: Result) -> None:
    config = dict(min_tokens=8, ramp_iters=4, increment=8, backend=case.backend)
    random_ltd = RandomLTD(RandomLTDConfig(**{**config, **case.random_ltd})).attach(model)
    arguments = _inputs(case)

    def forward(iteration: int) -> Tensor:
        guard.start()
        if case.dropping:
            random_ltd.begin_step(iteration, 1000)
            assert random_ltd.is_dropping
        random_ltd.begin_micro_batch(1)
        if not case.first_stage:
            model.set_input_tensor(_stage_input(case))
        return model(**arguments).sum()

    forward(0).backward()
    guard.warming_up = False
    loss = forward(2)  # another k
    result.forward, in_all = dict(guard.launched), Counter(guard.launched_by_all)
    guard.start()
    loss.backward()
    result.backward, result.all = dict(guard.launched), dict(in_all + guard.launched_by_all)


def _train_joined(case: Case, model: Any, guard: Guard, result: Result) -> None:
    """Run two steps as Megatron's schedule does, in passes of several micro-batches."""
    layers = f"1-{case.layers}"
    config = dict(min_tokens=2, ramp_iters=30, increment=2, grow_micro_batch=case.joined)
    random_ltd = RandomLTD(RandomLTDConfig(**config, layers=layers)).attach(model)
    arguments = _inputs(case)

    def forward_step(data_iterator, model):
        return model(**arguments), lambda losses: (losses.sum(), losses[0, 0], {"loss": losses[0]})

    def schedule(forward_step_func, num_microbatches, model, **passes):
        assert num_microbatches == 1
        random_ltd.begin_micro_batch(0)
        output, loss = forward_step_func(None, model)
        result.forward = dict(guard.launched)
        loss(output)[0].backward()

    forward_backward_func = join_micro_batches(schedule, random_ltd, bool(case.packed))
    for iteration in range(2):
        guard.start()
        random_ltd.begin_step(iteration, 1000)
        forward_backward_func(
            forward_step_func=forward_step,
            model=model,
            num_microbatches=case.joined,
            seq_length=SEQ,
            micro_batch_size=BATCH,
        )
        guard.warming_up = False
    result.backward, result.all = dict(guard.launched), dict(guard.launched_by_all)


def _described(error: Exception) -> str:
    """Return an exception as one line, with the line of our code that it came through last."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f for f in frames if f.filename.startswith(fake_gpu.OURS)] or frames
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text} at {where[-1].filename}:{where[-1].lineno}"
