"""Transformer Engine itself, as far as it runs without a GPU.

Its Python code runs, on tensors of the CPU or of the GPU that is made up (`fake_gpu`): checks of
arguments, choice of attention, autograd. Its kernels do not: they are replaced by what they compute
or, where only shapes matter, by less. Skipped where Transformer Engine is not installed.
"""

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rltd.model.layer import fused_rotary
from tests.gpu import fake_gpt, fake_gpu
from tests.gpu.fake_gpt import BATCH, SEQ, Case
from tests.megatron import te_signatures
from tests.parallel import run

pytest.importorskip("transformer_engine.pytorch")

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FUSED = {"apply_rope_fusion": True}
PASSES: dict[str, Case] = {
    "learned positions": Case(),
    "rope": Case(rotary=True, options=FUSED),
    "documents, queries in groups, recompute": Case(
        rotary=True, mask="documents", options={**FUSED, **FULL, "num_query_groups": 2}
    ),
    "recompute as under FP8": Case(rotary=True, fp8_recompute=True, options={**FUSED, **FULL}),
    "packed": Case(packed="dense"),
    "packed, padded nowhere": Case(packed="one tensor"),
    "packed, padded": Case(rotary=True, packed="padded"),
    "packed, recompute": Case(packed="dense", options=FULL),
}


def test_signatures_are_those_of_the_golden_file():
    golden, now = te_signatures.golden(), te_signatures.installed()
    for name in ("transformer_engine", "megatron_core"):
        if golden[name] != now[name]:
            pytest.skip(
                f"{name} {now[name]}, not {golden[name]}: python -m tests.megatron.te_signatures"
            )
    assert now["signatures"] == golden["signatures"]


def _check_rotary(t, freqs, start_positions, qkv_format, cu_seqlens):
    """Check what transformer_engine/pytorch/csrc/extensions/apply_rope.cpp checks of "sbhd"."""
    assert freqs.dim() == t.dim() == 4 and freqs.dtype == torch.float32
    assert freqs.size(1) == freqs.size(2) == 1
    assert t.size(0) <= freqs.size(0) and t.size(3) >= freqs.size(3)
    assert start_positions is None and cu_seqlens is None and qkv_format.name == "NVTE_SBHD"


def _rotate(t, freqs, interleaved):
    from transformer_engine.pytorch.attention import rope

    # The kernel knows no strides of the angles.
    size = freqs.size(-1)
    freqs = freqs.as_strided((t.size(0), 1, 1, size), (size, size, size, 1))
    return rope._apply_rotary_pos_emb_base(t, freqs, "sbhd", interleaved).contiguous()


def rotary_forward(t, freqs, start, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    _check_rotary(t, freqs, start, qkv_format, cu_seqlens)
    kernel_inputs.append(t)
    return _rotate(t, freqs, interleaved)


def rotary_backward(grad, freqs, start, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    _check_rotary(grad, freqs, start, qkv_format, cu_seqlens)
    with torch.enable_grad():
        t = torch.zeros_like(grad).requires_grad_()
        return torch.autograd.grad(_rotate(t, freqs, interleaved), t, grad)[0]


kernel_inputs: list[torch.Tensor] = []


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 4])
def test_fused_rope(interleaved, width):
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from transformer_engine.pytorch.attention import rope

    qkv = torch.randn(5, 3, 2, 24, requires_grad=True)  # [k, b, n, 3d]
    t, freqs = qkv[..., :8], torch.randn(5, 3, 1, width)
    upstream = torch.randn(5, 3, 2, 8)
    kernels = dict(fused_rope_forward=rotary_forward, fused_rope_backward=rotary_backward)
    kernel_inputs.clear()
    with mock.patch.multiple(rope.tex, **kernels):
        got = fused_rotary(fused_apply_rotary_pos_emb, t, freqs, interleaved=interleaved)
        (gradient,) = torch.autograd.grad(got, qkv, upstream)
    assert kernel_inputs[0].shape == (15, 1, 2, 8)
    assert kernel_inputs[0].data_ptr() == qkv.data_ptr(), "queries were copied"
    expected = _apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)
    assert torch.equal(got, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, qkv, upstream)[0])


@contextlib.contextmanager
def _a_gpu_with_fused_attention(calls: list[dict[str, Any]]):
    """Let Transformer Engine's Python code find a GPU, and fused attention that supports all."""
    from transformer_engine.pytorch import distributed
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils

    choose = utils.get_attention_backend
    properties = SimpleNamespace(major=9, minor=0, name="H100", multi_processor_count=132)

    def of_plain_tensors(params):
        return choose(dataclasses.replace(params, qkv_type=torch.Tensor))

    def attention(self, query, key, value, *args, **kwargs):
        assert not args
        call = {name: value for name, value in kwargs.items() if name in SEEN}
        calls.append({n: list(v.shape) if torch.is_tensor(v) else v for n, v in call.items()})
        calls[-1]["query"] = list(query.shape)
        return fake_gpt.Attention.forward(self, query, key, value)

    with (
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            current_device=lambda: 0,
            get_device_capability=lambda *args: (9, 0),
            get_device_properties=lambda *args: properties,
            Stream=lambda *args, **kwargs: None,
        ),
        mock.patch.object(distributed, "_get_cuda_rng_state", lambda **kwargs: None),
        mock.patch.object(distributed, "_set_cuda_rng_state", lambda *args, **kwargs: None),
        mock.patch.object(utils, "get_attention_backend", of_plain_tensors),
        mock.patch.object(utils, "_get_fused_attn_backend", lambda **kwargs: (1, "")),
        mock.patch.object(backends.FusedAttention, "forward", attention),
    ):
        yield


SEEN = (
    *("attention_mask", "attn_mask_type", "qkv_layout", "pad_between_seqs"),
    *("max_seqlen_q", "max_seqlen_kv", "cu_seqlens_q", "cu_seqlens_q_padded"),
)


def _all() -> dict[str, Any]:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, te_checkpoint
    from megatron.core.transformer.enums import AttnBackend

    fake_gpu.install()
    results = {}
    for name, case in PASSES.items():
        calls: list[dict[str, Any]] = []
        options = {**case.options, "attention_backend": AttnBackend.fused, "kv_channels": 8}
        case = dataclasses.replace(case, options=options)
        counted = mock.patch("megatron.core.recompute.te_checkpoint", wraps=te_checkpoint)
        with _a_gpu_with_fused_attention(calls), counted as checkpoint:
            result = fake_gpt.run(case, TEDotProductAttention)
        count = checkpoint.call_count
        results[name] = {**dataclasses.asdict(result), "calls": calls, "checkpoints": count}
    return results


@pytest.fixture(scope="module")
def results():
    (result,) = run(1, _all)
    return result


@pytest.mark.parametrize("name", PASSES)
def test_attention_takes_what_dropped_layers_pass(name, results):
    assert results[name]["found"] == []
    case, calls = PASSES[name], results[name]["calls"]
    # The warm-up's forward pass: 32 tokens of each sample, 8 of which the middle layers keep.
    for call, length in zip(calls, [SEQ, 8, 8, SEQ], strict=False):
        if case.packed:
            assert call["query"][0] == BATCH * length
            assert call["qkv_layout"].startswith("t")
            assert call["attn_mask_type"] == "padding_causal"
            assert call["pad_between_seqs"] == (case.packed == "padded")
            assert call["cu_seqlens_q"] == [4]
        else:
            assert call["query"][:2] == [length, BATCH]
            assert call["qkv_layout"].startswith("sb")
            assert call["attn_mask_type"] == "causal"
            assert call["max_seqlen_q"] == call["max_seqlen_kv"] == length
    assert len(calls) >= 2 * 4
    assert results[name]["checkpoints"] == (2 * 4 if case.fp8_recompute else 0)


def _patched() -> str:
    """Return the fused kernel's function once the table of patches is applied."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_rltd.training import patches
    from megatron_rltd.training.state import Training

    applied = patches.apply(Training())
    function = rope_utils.fused_apply_rotary_pos_emb
    applied.revert()
    return f"{function.func.__name__} {function.args[0].__module__}"


def test_patches_apply():
    (got,) = run(1, _patched)
    assert got == "fused_rotary megatron.core.extensions.transformer_engine"


def _planned() -> str:
    """Return what Megatron's optimizer is where a run is planned, on the CPU."""
    import megatron.core.optimizer

    from megatron_rltd.cpu import adapter

    with adapter.enabled():
        return megatron.core.optimizer.Adam.__name__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_runs_are_planned_on_machines_without_a_gpu():
    assert run(1, _planned) == ["GroupStepAdam"]
