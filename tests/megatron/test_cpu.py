import copy
import subprocess
import sys

import pytest
import torch

from megatron_rltd.config import RankConfigError
from megatron_rltd.cpu import adapter
from megatron_rltd.cpu.modules import GroupStepAdam
from megatron_rltd.patching import versions
from tests.parallel import run


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_group_step_adam_equals_torch(decoupled, weight_decay):
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": weight_decay}
    ours = [torch.randn(5, 3, dtype=torch.float64).requires_grad_() for _ in range(3)]
    theirs = [copy.deepcopy(p) for p in ours]
    adam = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizers = GroupStepAdam(ours, adam_w_mode=decoupled, **options), adam(theirs, **options)
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step == 2:
            ours[0].grad = theirs[0].grad = None
        for optimizer in optimizers:
            optimizer.step()
        if step < 2:  # torch counts steps per parameter, the group's count goes on
            for p, q in zip(ours, theirs, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert optimizers[0].param_groups[0]["step"] == 4


def test_group_step_adam_resumes_from_its_state():
    parameter = torch.randn(4, requires_grad=True)
    optimizer = GroupStepAdam([parameter])
    parameter.grad = torch.randn(4)
    optimizer.step()
    other = parameter.detach().clone().requires_grad_()
    resumed = GroupStepAdam([other])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.grad = parameter.grad.clone()
    optimizer.step()
    resumed.step()
    assert torch.equal(parameter, other)


def names_in_force():
    return {
        patch.target: patch.resolve()[2] for patch in versions.rows_for_release(adapter.PATCHES)
    }


def test_enable_is_reversible():
    before = names_in_force()
    with adapter.enabled():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).to("cuda").cuda().pin_memory().device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        assert (
            torch.tensor([1], device=torch.device("cuda:0"), pin_memory=True).device.type == "cpu"
        )
        assert not torch.cuda.is_available()
    after = names_in_force()
    assert all(after[name] is value for name, value in before.items())
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_enable_is_refused_where_there_is_cuda(monkeypatch):
    before = names_in_force()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RankConfigError, match="only if no CUDA device is visible: omit --cpu"):
        adapter.enable()
    assert all(names_in_force()[name] is value for name, value in before.items())


def test_tensors_are_made_on_the_cpu_inside_backward_too():
    class MakesTensors(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(1, device="cuda")

    with adapter.enabled():
        x = torch.ones(3, requires_grad=True)
        MakesTensors.apply(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]


def test_arguments_that_need_a_gpu_are_switched_off():
    class Arguments:
        distributed_backend = "nccl"
        transformer_impl = "transformer_engine"
        bias_gelu_fusion = True
        seq_length = 64

    args = Arguments()
    changed = adapter.set_arguments(args)
    assert args.distributed_backend == "gloo"
    assert args.transformer_impl == "local"
    assert args.bias_gelu_fusion is False
    assert args.seq_length == 64
    assert sorted(changed) == [
        "bias_gelu_fusion=False",
        "distributed_backend=gloo",
        "transformer_impl=local",
    ]


def _attention(context_parallel, grouped, explicit):
    """Return attention and its gradients on a context-parallel layout, gathered in order."""
    import megatron.core.parallel_state as mpu
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_rltd.tokens.shards import context_parallel_strata

    adapter.enable()
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(context_parallel_size=context_parallel)
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    s, b, n, groups, d = 16, 2, 4, 2 if grouped else 4, 8
    config = TransformerConfig(
        num_layers=1,
        hidden_size=n * d,
        num_attention_heads=n,
        num_query_groups=groups,
        context_parallel_size=context_parallel,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    attention = DotProductAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(5)
    whole = [
        torch.randn(s, b, heads, d, generator=generator, dtype=torch.float64)
        for heads in (n, groups, groups)
    ]
    upstream = torch.randn(s, b, n * d, generator=generator, dtype=torch.float64)
    mask = torch.rand(b, 1, s, s, generator=generator) < 0.4
    mask &= ~torch.eye(s).bool()
    rank = mpu.get_context_parallel_rank()
    strata = context_parallel_strata(2 * context_parallel, rank, context_parallel)
    rows = torch.arange(s).view(2 * context_parallel, -1)[strata].flatten()
    local = [t[rows].requires_grad_() for t in whole]
    out = attention(*local, mask[:, :, rows] if explicit else None)
    grads = torch.autograd.grad(out, local, upstream[rows])
    return {"rows": rows.tolist(), "values": [t.tolist() for t in (out.detach(), *grads)]}


@pytest.mark.parametrize(("grouped", "explicit"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("size", [2, 4])
def test_attention_under_context_parallelism(size, grouped, explicit):
    (alone,) = run(1, _attention, 1, grouped, explicit)
    order = torch.tensor(alone["rows"]).argsort()
    whole = [torch.tensor(v, dtype=torch.float64)[order] for v in alone["values"]]
    ranks = run(size, _attention, size, grouped, explicit)
    rows = torch.cat([torch.tensor(r["rows"]) for r in ranks])
    assert rows.sort().values.tolist() == list(range(16))
    for i, expected in enumerate(whole):
        parts = [torch.tensor(r["values"][i], dtype=torch.float64) for r in ranks]
        got = torch.cat(parts)[rows.argsort()]
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def _unequal_shares():
    """Return what a rank gathers, and gets of a sum, with shares of three rows and of one."""
    adapter.enable()
    torch.distributed.init_process_group("gloo")
    from megatron.core.tensor_parallel import mappings

    group, sizes = torch.distributed.group.WORLD, [3, 1]
    rows = torch.arange(8.0).view(4, 2).split(sizes)[group.rank()]
    gathered = mappings._gather_along_first_dim(rows, group, sizes)
    share = mappings._reduce_scatter_along_first_dim(gathered * (group.rank() + 1), group, sizes)
    return [gathered.tolist(), share.tolist()]


def test_unequal_shares_over_gloo():
    rows = torch.arange(8.0).view(4, 2)
    first, second = run(2, _unequal_shares)
    assert first == [rows.tolist(), (3 * rows[:3]).tolist()]
    assert second == [rows.tolist(), (3 * rows[3:]).tolist()]


def test_models_can_still_be_made_on_the_meta_device():
    # In a process of its own, for torch remembers what it acts on.
    code = """
import torch
from megatron_rltd.config import RankConfigError
from megatron_rltd.cpu import adapter
with adapter.enabled():
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    assert torch.empty(2).device.type == "cpu"
with torch.device("meta"):
    assert torch.empty(2).device.type == "meta"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
