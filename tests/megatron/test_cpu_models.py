"""HybridModel and multi-latent attention on the CPU, where Megatron leaves modules to others."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from megatron_rltd.config import ConfigError
from megatron_rltd.cpu import adapter, attention
from megatron_rltd.patching import versions
from tests import gpt
from tests.megatron.test_hybrid_training import EXPERTS, FORMAT, HYBRID
from tests.megatron.test_training import BASE, assert_same
from tests.parallel import RankError, train

hybrid_only = pytest.mark.skipif(versions.release() < (0, 19), reason="no HybridModelConfig")

LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 8,
    "kv_lora_rank": 12,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 5,
    "rope_type": "rope",
}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
NORM = ("weight", "bias")
LINEAR = ("weight", "bias", "_extra_state")
# In this order: the distributed optimizer's buffers keep it.
NORM_LINEAR = ("layer_norm_weight", "layer_norm_bias", *LINEAR)
UNBIASED = ("weight", "_extra_state")
NORM_UNBIASED = ("layer_norm_weight", "weight", "_extra_state")
# The modules of Megatron's hybrid_stack_spec with what Transformer Engine's classes register: see
# __init__ of LayerNormLinear and Linear in transformer_engine/pytorch/module, and of LayerNorm and
# RMSNorm in transformer_engine/pytorch/ops/basic. A local GPTModel's keys agree for attention and
# MLP: sharded_state_dict_keys_map in megatron/core/models/gpt/gpt_layer_specs.py.
LAYERS = {
    "*": {"self_attention.linear_proj": LINEAR, "self_attention.linear_qkv": NORM_LINEAR},
    "-": {"mlp.linear_fc1": NORM_LINEAR, "mlp.linear_fc2": LINEAR},
    "E": {
        "pre_mlp_layernorm": NORM,
        "mlp.router": NORM,
        # Both TEGroupedMLP and SequentialMLP store the experts under these keys.
        "mlp.experts.experts.linear_fc1": LINEAR,
        "mlp.experts.experts.linear_fc2": LINEAR,
    },
    "+": {
        "input_layernorm": ("weight",),
        "self_attention.linear_proj": UNBIASED,
        "self_attention.linear_q_down_proj": UNBIASED,
        "self_attention.linear_q_up_proj": UNBIASED,
        "self_attention.linear_kv_down_proj": UNBIASED,
        "self_attention.linear_kv_up_proj": UNBIASED,
    },
    "+ with --qk-layernorm": {
        "input_layernorm": ("weight",),
        "self_attention.linear_proj": UNBIASED,
        "self_attention.linear_q_down_proj": UNBIASED,
        "self_attention.linear_q_up_proj": NORM_UNBIASED,
        "self_attention.linear_kv_down_proj": UNBIASED,
        "self_attention.linear_kv_up_proj": NORM_UNBIASED,
    },
    "G": {
        "self_attention": ("dt_bias", "A_log"),
        "self_attention.in_proj": NORM_UNBIASED,
        "self_attention.conv1d": ("weight",),
        "self_attention.out_norm": ("weight",),
        "self_attention.out_proj": UNBIASED,
    },
}


def build(pattern, **options):
    """Return Megatron's HybridModel of Megatron's own spec."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    settings = gpt.config(
        num_layers=len(pattern), is_hybrid_model=True, transformer_impl="local", **options
    )
    return HybridModel(settings, hybrid_stack_spec, 32, 16, hybrid_layer_pattern=pattern)


@hybrid_only
@pytest.mark.parametrize("name", LAYERS)
def test_parameters_and_keys_are_those_of_transformer_engine(name):
    options = {"num_moe_experts": 2} if name == "E" else {}
    if name[0] in "+G":
        options = LATENT if name[0] == "+" else DELTA
        options = {**options, "normalization": "RMSNorm", "add_bias_linear": False}
        options["qk_layernorm"] = "--qk-layernorm" in name
    with gpt.one_process():
        model = build(name[0], **options)
        entries = model.sharded_state_dict(
            metadata={"dp_cp_group": torch.distributed.group.WORLD, "singleton_local_shards": False}
        )
        parameters = [key for key, _ in model.named_parameters()]
        whole = {key: value.key for key, value in entries.items()}
    expected = [
        f"decoder.layers.0.{module}.{key}" for module, keys in LAYERS[name].items() for key in keys
    ]
    final = ["weight"] if "normalization" in options else ["weight", "bias"]
    expected += [f"decoder.final_norm.{key}" for key in final]
    expected += ["embedding.word_embeddings.weight", "output_layer.weight"]
    assert sorted(set(whole.values())) == sorted([*expected, "output_layer._extra_state"])
    # Order counts inside a module.
    if name != "E":
        for module in LAYERS[name]:
            prefix = f"decoder.layers.0.{module}."
            own = [key for key in parameters if key.rpartition(".")[0] + "." == prefix]
            assert own == [k for k in expected if k in own and not k.endswith("_extra_state")]
            assert own
    assert all(whole[key] == key for key in parameters if ".local_experts." not in key)


@pytest.mark.parametrize(("key_size", "value_size"), [(8, 8), (10, 5), (6, 12)])
def test_attention_with_values_of_another_size(key_size, value_size):
    from megatron.core.transformer.enums import AttnMaskType

    s, b, n, scale = 9, 2, 4, 0.3
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(s, b, n, d, generator=generator, dtype=torch.float64).requires_grad_()
        for d in (key_size, key_size, value_size)
    )
    with gpt.one_process():
        from megatron.core.transformer.dot_product_attention import DotProductAttention

        module = DotProductAttention(
            gpt.config(num_layers=1),
            1,
            AttnMaskType.causal,
            "self",
            softmax_scale=scale,
            k_channels=key_size,
            v_channels=value_size,
        )
        out = module(query, key, value, None)
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    future = torch.ones(s, s).triu(1).bool()
    plain = scores.masked_fill(future, -torch.inf).softmax(-1)
    plain = torch.einsum("bnst,tbnd->sbnd", plain, value).reshape(s, b, n * value_size)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(out, (query, key, value), upstream),
        torch.autograd.grad(plain, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def train_hybrid(pattern, options="", world_size=1):
    before, after = HYBRID.split("--hybrid-layer-pattern")
    arguments = f"{before} --hybrid-layer-pattern {pattern} {after} {options}"
    return train(arguments, world_size, script="pretrain_hybrid")


def rewind(folder):
    """Forget all checkpoints but the one of step 2."""
    for other in folder.glob("iter_*"):
        if other.name != "iter_0000002":
            shutil.rmtree(other)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A GPTModel saved after two steps, optimizer and all."""
    folder = tmp_path_factory.mktemp("gpt")
    train(f"{BASE} {FORMAT} --save {folder} --save-interval 2 --exit-interval 2")
    return folder


@hybrid_only
def test_a_hybrid_model_continues_a_gpt_model(saved):
    gpt_model = train(f"{BASE} {FORMAT} --load {saved}")
    hybrid = train_hybrid("*-*-*-*-", f"{FORMAT} --load {saved}")
    # The first loss to the bit; the gradient's norm is then summed in another order of parameters.
    assert hybrid.losses[0] == gpt_model.losses[0]
    assert_same(hybrid, gpt_model, 1e-6)
    stages = f"{FORMAT} --load {saved} --pipeline-model-parallel-size 2"
    assert_same(train_hybrid("*-|*-|*-|*-", stages, 2), gpt_model, 1e-5)
    replicas = f"{FORMAT} --load {saved} --overlap-grad-reduce --overlap-param-gather"
    assert_same(train_hybrid("*-*-*-*-", replicas, 2), gpt_model, 1e-5)


# Weights as large as these make attention decide; with Megatron's own of 0.02, errors in its
# gradient hide.
LARGE = "--init-method-std 0.2 --normalization RMSNorm --disable-bias-linear"
FLAGS = (
    "--multi-latent-attention --q-lora-rank 12 --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 6 --no-rope-fusion"
)


@pytest.mark.parametrize("model", ["GPTModel", pytest.param("HybridModel", marks=hybrid_only)])
def test_latent_attention_under_tensor_parallelism(model):
    # Megatron's own gradient of the key positions is each rank's part only.
    def run(parallel="", world_size=1):
        if model == "GPTModel":
            return train(f"{BASE} {LARGE} {FLAGS} {parallel}", world_size)
        return train_hybrid("+-+-", f"{LARGE} {FLAGS} {parallel}", world_size)

    alone, parallel = run(), "--tensor-model-parallel-size 2"
    assert_same(run(parallel, 2), alone, 1e-5)
    assert_same(run(f"{parallel} --sequence-parallel", 2), alone, 1e-5)


@hybrid_only
def test_latent_attention_and_experts_in_a_hybrid_model_resume_on_more_ranks(tmp_path):
    options = f"{LARGE} {FLAGS} --qk-layernorm {EXPERTS} --no-save-optim --no-load-optim"
    # The fusion is switched off on a CPU.
    options += " --mla-down-proj-fusion"
    train_hybrid("+E+E", f"{options} --save {tmp_path} --save-interval 2 --exit-interval 2")
    alone = train_hybrid("+E+E", f"{options} --load {tmp_path}")
    spread = "--sequence-parallel --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
    options = f"{options} --load {tmp_path} --tensor-model-parallel-size 2 {spread}"
    assert_same(train_hybrid("+E+E", options, 2), alone, 1e-5)


@hybrid_only
def test_gated_delta_nets_train(tmp_path):
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in DELTA.items())
    options = f"{flags} --swiglu --disable-bias-linear --normalization RMSNorm"
    alone = train_hybrid("G-*-G-", f"{options} --save {tmp_path} --save-interval 2")
    assert alone.losses[-1] < alone.losses[0] - 0.1
    cut = train_hybrid("G-*-G-", f"{options} --context-parallel-size 2", 2)
    assert_same(cut, alone, 1e-5)
    rewind(tmp_path)
    resumed = train_hybrid("G-*-G-", f"{options} --load {tmp_path}")
    assert resumed.losses == alone.losses[2:]


def test_functions_that_gated_delta_nets_take_from_elsewhere():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    ours, state = attention.causal_conv1d(None)(x=x, weight=weight, activation="silu")
    assert state is None
    for t in range(7):
        past = [x[:, t - i] * weight[:, 3 - i] for i in range(4) if t >= i]
        torch.testing.assert_close(ours[:, t], functional.silu(sum(past)), rtol=1e-12, atol=1e-13)
    plain = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(attention.l2norm(None)(x), plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("flag", ["hybrid_layer_pattern", "hybrid_override_pattern"])
@pytest.mark.parametrize("pattern", ["*-M-", "D-", "*-*-/M-"])
def test_layers_without_code_for_a_cpu_are_refused(flag, pattern):
    symbol = "D" if "D" in pattern else "M"
    said = f"--{flag.replace('_', '-')} {pattern} with --cpu: {symbol} stands for".replace(
        "*", r"\*"
    )
    with pytest.raises(ConfigError, match=said):
        adapter.refuse_layers(SimpleNamespace(**{flag: pattern}))
    adapter.refuse_layers(SimpleNamespace(**{flag: "*-+E|G-/*-"}))


@hybrid_only
def test_mamba_is_refused_at_start():
    with pytest.raises(RankError, match="M stands for Mamba's layers, which run only the kernels"):
        train_hybrid("M-")
