"""HybridModel in one process: groups of layers keep the same tokens."""

import pytest
import torch

from megatron_rltd.config import ConfigError
from megatron_rltd.model import layer
from megatron_rltd.patching import versions
from megatron_rltd.tokens import ops
from tests import gpt, hybrid
from tests.megatron.test_random_ltd import assert_equal_results, attached, expected_kept, results
from tests.megatron.test_random_ltd import step as begin_step

pytestmark = pytest.mark.skipif(versions.release() < (0, 18), reason="no HybridModel")
MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
    "add_bias_linear": False,
}


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with gpt.one_process():
        yield


def recompute(**options):
    return {"recompute_granularity": "full", "recompute_num_layers": 1, **options}


# pattern, options of the model, options of random-LTD, group to layer numbers of those that drop
CASES = {
    "dense": ("*-*-*-*-", {}, {}, {2: [3, 4], 3: [5, 6]}),
    "rope": ("*-*-*-*-", {"rotary": "rope"}, {}, {2: [3, 4], 3: [5, 6]}),
    "experts": ("*E*E*E", MOE, {}, {2: [3, 4]}),
    "every group": ("*-*-", {"rotary": "rope"}, {"layers": "1-2"}, {1: [1, 2], 2: [3, 4]}),
    "gaps": ("*-*-*-*-*-", {}, {"layers": "2,4"}, {2: [3, 4], 4: [7, 8]}),
    "attention alone": ("*-**-*", {"rotary": "rope"}, {}, {2: [3], 3: [4, 5]}),
    "two MLPs": ("-*-E*-", {**MOE, "rotary": "rope"}, {"layers": "1-2"}, {1: [1], 2: [2, 3, 4]}),
    "recurrent": ("M*-M*-M-*", {"rotary": "rope"}, {}, {2: [2, 3], 4: [5, 6]}),
    "recurrent drops": (
        "*-M-*M*-",
        {"rotary": "rope"},
        {"recurrent_layers": True},
        {2: [3, 4], 3: [5], 4: [6]},
    ),
    "recompute": (
        "*-*-M*-*-",
        {"rotary": "rope", **recompute(recompute_method="uniform")},
        {},
        {2: [3, 4], 4: [6, 7]},
    ),
    "recompute across groups": (
        "*-*-*-*-",
        {"rotary": "rope", **recompute(recompute_method="uniform", recompute_num_layers=8)},
        {},
        {2: [3, 4], 3: [5, 6]},
    ),
    "recompute, recurrent drops": (
        "*-M-M-*-",
        recompute(recompute_method="block"),
        {"recurrent_layers": True},
        {2: [3, 4], 3: [5, 6]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_loops(name):
    pattern, options, ours, groups = CASES[name]
    model = hybrid.build(pattern, **options)
    drawn = expected_kept(list(groups))
    kept = {layer: drawn[group] for group, layers in groups.items() for layer in layers}
    plain = results(model, hybrid.plain_loss(model, kept, gpt.document_mask()))
    random_ltd = attached(model, **ours)
    assert random_ltd.resolved.dropped_layers == tuple(groups)
    begin_step(random_ltd)
    assert_equal_results(results(model, gpt.loss_of(model, gpt.document_mask())), plain)
    full = results(model, hybrid.plain_loss(model, {}, gpt.document_mask()))
    assert abs(full["loss"] - plain["loss"]) > 1e-4, "dropping changed nothing"


def as_hybrid(model, pattern, **options):
    """Return a HybridModel with the weights of a GPTModel's layers, each split in two."""
    target = hybrid.build(pattern, **options)
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith("decoder.layers."):
            _, _, number, rest = name.split(".", 3)
            is_mlp = "mlp" in rest
            name = f"decoder.layers.{2 * int(number) + is_mlp}.{rest}"
        weights[name] = value
    # The GPTModel's final norm, which the HybridModel here does not have, becomes the identity.
    missing = target.load_state_dict(weights, strict=False)
    assert all("final_layernorm" in name for name in missing.unexpected_keys)
    assert not missing.missing_keys
    return target


def test_loses_as_much_as_a_gpt_model_of_half_as_many_layers():
    model = gpt.build(rotary="rope", num_layers=5)
    model.decoder.final_layernorm = torch.nn.Identity()
    target = as_hybrid(model, "*-" * 5, rotary="rope")
    losses = []
    for each in (model, target):
        begin_step(attached(each))
        losses.append(gpt.loss_of(each))
    assert torch.equal(*losses)
    each.eval()
    assert not torch.equal(gpt.loss_of(each), losses[0])


def test_rows_do_not_move_inside_a_group(monkeypatch):
    moved = []
    for name in ("split_tokens", "exchange_tokens", "merge_tokens"):
        original = getattr(ops, name)

        def count(*args, name=name, original=original):
            moved.append(name)
            return original(*args)

        monkeypatch.setattr(f"megatron_rltd.model.block.{name}", count)
    model = hybrid.build("*-*-E*-*-", **MOE)
    random_ltd = attached(model)
    begin_step(random_ltd)
    unseen = gpt.loss_of(model)
    moved_alone = ["split_tokens", "exchange_tokens", "merge_tokens"]
    assert moved == moved_alone
    moved.clear()
    # What looks at the hidden states inside a group gets the real ones.
    seen = []
    model.decoder.layers[2].register_forward_hook(lambda *call: seen.append(call[2][0].size(0)))
    begin_step(random_ltd)
    assert torch.equal(gpt.loss_of(model), unseen)
    assert seen == [gpt.SEQ]
    assert moved == [*moved_alone[:1], "merge_tokens", *moved_alone]


def test_a_mask_is_made_for_attention_only(monkeypatch):
    made, original = [], layer.kept_mask
    monkeypatch.setattr(layer, "kept_mask", lambda *args: made.append(1) or original(*args))
    model = hybrid.build("*-*-E*-*-", **MOE)
    begin_step(attached(model))
    gpt.loss_of(model, gpt.document_mask())
    assert len(made) == 2, "of two dropped groups"


@pytest.mark.parametrize(
    ("pattern", "options", "said"),
    [
        ("*-*-", {}, r"no group .* drops tokens by default .*choose groups with --random-ltd-la"),
        ("*-M-*-", {}, r"no group .*group 2 \(M-\) has a Mamba-2 layer.*--random-ltd-recurrent"),
        ("*-M-*-*-", {"layers": "2-3"}, r"--random-ltd-layers 2-3: group 2 \(M-\) has a Mamba-2"),
        ("*-*-*-", {"layers": "2,5"}, r"groups go from 1 to 3, .*groups of the hybrid pattern: "),
        ("*-*-*-", {"recurrent_layers": True}, r"-recurrent-layers does nothing without"),
    ],
)
def test_bad_choices(pattern, options, said):
    with pytest.raises(ConfigError, match=said):
        attached(hybrid.build(pattern), **options)
