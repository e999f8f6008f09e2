"""A ticket computes what its dense model does if the pruned units' outputs are zero, in float64."""

import pytest
import torch

from megatron_rltd.early_bird import slices
from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.target import Target
from megatron_rltd.early_bird.units import MATRICES, ModelShape
from tests.gpt import build, loss_of, one_process

LAYERS = 3
LLAMA = {
    "rotary": "rope",
    "num_query_groups": 2,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "kv_channels": 6,
    "ffn_hidden_size": 48,
}
CASES = {
    "gpt2": ({"ffn_hidden_size": 64}, Target(num_attention_heads=3, ffn_hidden_size=16)),
    "gpt2, heads alone": ({"ffn_hidden_size": 64}, Target(num_attention_heads=1)),
    "llama": (LLAMA, Target(num_attention_heads=2, ffn_hidden_size=32)),
    "llama with norms of Q and K": (
        {**LLAMA, "qk_layernorm": True, "add_qkv_bias": True},
        Target(ffn_hidden_size=16),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with one_process():
        yield


def in_layer(name: str) -> tuple[int, str] | None:
    """Return the layer from 0 and the name in it of a module's parameter."""
    if ".layers." not in name:
        return None
    number, _, rest = name.partition(".layers.")[2].partition(".")
    return int(number), f"decoder.layers.{rest}"


def weights_of(layer):
    modules = {**dict(layer.self_attention.named_children()), **dict(layer.mlp.named_children())}
    return {name: modules[name].weight for name in MATRICES}


def mask_by(target, shape, model):
    pruned = {kind: {} for kind in target.units(shape, model.config.hidden_size)}
    for layer in model.decoder.layers:
        for kind, bits in target.mask_of_layer(weights_of(layer), shape).items():
            pruned[kind][layer.layer_number] = bits
    return Mask(0, target.units(shape, model.config.hidden_size), pruned)


@pytest.mark.parametrize("name", CASES)
def test_the_ticket_is_the_dense_model_without_the_pruned_units_outputs(name):
    options, target = CASES[name]
    dense = build(num_layers=LAYERS, **options)
    shape = ModelShape.of(dense.config)
    kept = target.kept(shape)
    assert kept != shape
    sizes = {"num_attention_heads": kept.num_attention_heads, "kv_channels": kept.kv_channels}
    sizes |= {"ffn_hidden_size": kept.ffn_hidden_size}
    if "num_query_groups" in options:
        sizes["num_query_groups"] = kept.num_query_groups
    ticket = build(num_layers=LAYERS, **{**options, **sizes})
    mask = mask_by(target, shape, dense)
    of_dense = dict(dense.named_parameters())
    with torch.no_grad():
        for parameter_name, parameter in ticket.named_parameters():
            place = in_layer(parameter_name)
            value = of_dense[parameter_name]
            if place:
                units = slices.kept_units(mask, shape, place[0] + 1)
                value = slices.sliced(place[1], value, units, shape)
            assert value.shape == parameter.shape
            parameter.copy_(value)
        before = loss_of(dense)
        for layer in dense.decoder.layers:
            size = shape.heads_per_group * shape.kv_channels
            columns = {
                "heads": layer.self_attention.linear_proj.weight.view(16, -1, size),
                "ffn": layer.mlp.linear_fc2.weight,
            }
            for kind in mask.pruned:
                columns[kind][:, mask.of_layer(kind, layer.layer_number)] = 0
        after, ours = loss_of(dense), loss_of(ticket)
    assert abs(float(after - before)) > 1e-4
    assert abs(float(ours - after)) < 1e-13 * float(after)


def test_every_parameter_of_a_layer_is_known():
    for options, _ in CASES.values():
        for name, _parameter in build(num_layers=1, **options).named_parameters():
            place = in_layer(name)
            assert place is None or place[1] in (*slices.SLICED, *slices.WHOLE), name
