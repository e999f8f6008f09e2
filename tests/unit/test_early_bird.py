"""Importance, masks, distances and the rule, against plain loops and the papers' definitions."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_rltd.early_bird import masks, units
from megatron_rltd.early_bird.masks import Mask
from megatron_rltd.early_bird.rule import PRESETS, Rule
from megatron_rltd.early_bird.units import FFN, HEADS, ModelShape

HIDDEN = 12
PLAIN = ModelShape(2, 4, 4, 3, 20, gated=False)
LLAMA = ModelShape(2, 6, 2, 4, 16, gated=True)


def weights_of(shape, seed=0, dtype=torch.float64):
    """Return random weights of a layer whose units differ in size."""
    generator = torch.Generator().manual_seed(seed)
    g, q, d = shape.num_query_groups, shape.heads_per_group, shape.kv_channels
    f = shape.ffn_hidden_size
    sizes = {
        "linear_qkv": (g * (q + 2) * d, HIDDEN),
        "linear_proj": (HIDDEN, g * q * d),
        "linear_fc1": ((2 if shape.gated else 1) * f, HIDDEN),
        "linear_fc2": (HIDDEN, f),
    }
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for name, size in sizes.items()
    }


def plain_importance(weights, shape):
    """The definition, unit by unit and number by number."""

    def norm(values):
        return math.sqrt(math.fsum(float(v) ** 2 for v in values.flatten()))

    g, q, d = shape.num_query_groups, shape.heads_per_group, shape.kv_channels
    heads, neurons = [], []
    for group in range(g):
        start = group * (q + 2) * d + (q + 1) * d  # after the group's queries and its key
        outputs = weights["linear_proj"][:, group * q * d : (group + 1) * q * d]
        heads.append(norm(weights["linear_qkv"][start : start + d]) * norm(outputs))
    for i in range(shape.ffn_hidden_size):
        product = norm(weights["linear_fc1"][i]) * norm(weights["linear_fc2"][:, i])
        if shape.gated:
            product *= norm(weights["linear_fc1"][shape.ffn_hidden_size + i])
        neurons.append(product)
    return {HEADS: heads, FFN: neurons}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [PLAIN, LLAMA])
def test_importance_is_the_product_of_norms(shape, dtype):
    weights = weights_of(shape, dtype=dtype)
    found = units.importance(weights, shape)
    expected = plain_importance(weights, shape)
    for kind in (HEADS, FFN):
        assert found[kind].tolist() == pytest.approx(expected[kind], rel=1e-12)


@pytest.mark.parametrize("shape", [PLAIN, LLAMA])
def test_importance_does_not_depend_on_the_tensor_parallel_size(shape):
    weights = weights_of(shape)
    g, q, d = shape.num_query_groups, shape.heads_per_group, shape.kv_channels
    f, kinds = shape.ffn_hidden_size, 2 if shape.gated else 1
    parts = []
    for rank in range(2):
        qkv = weights["linear_qkv"].view(2, -1, HIDDEN)[rank]
        proj = weights["linear_proj"].view(HIDDEN, 2, -1)[:, rank]
        fc1 = weights["linear_fc1"].view(kinds, 2, f // 2, HIDDEN)[:, rank].reshape(-1, HIDDEN)
        fc2 = weights["linear_fc2"].view(HIDDEN, 2, -1)[:, rank]
        assert len(qkv) == g // 2 * (q + 2) * d
        parts.append(
            units.importance(
                {"linear_qkv": qkv, "linear_proj": proj, "linear_fc1": fc1, "linear_fc2": fc2},
                shape,
            )
        )
    whole = units.importance(weights, shape)
    for kind in (HEADS, FFN):
        joined = torch.cat([part[kind] for part in parts])
        torch.testing.assert_close(joined, whole[kind], rtol=1e-14, atol=0)


def test_importance_is_blind_to_how_a_layer_is_scaled():
    weights = weights_of(LLAMA)
    before = units.importance(weights, LLAMA)
    g, q, d = LLAMA.num_query_groups, LLAMA.heads_per_group, LLAMA.kv_channels
    weights["linear_qkv"].view(g, q + 2, d, HIDDEN)[0, -1] *= 4  # V of group 0 up, its O down
    weights["linear_proj"].view(HIDDEN, g, -1)[:, 0] /= 4
    weights["linear_fc1"][LLAMA.ffn_hidden_size + 3] *= 8
    weights["linear_fc2"][:, 3] /= 8
    after = units.importance(weights, LLAMA)
    for kind in (HEADS, FFN):
        assert torch.equal(after[kind], before[kind])  # powers of two: exact


def test_shape_reads_megatrons_arguments():
    args = SimpleNamespace(
        num_layers=2,
        num_attention_heads=6,
        group_query_attention=True,
        num_query_groups=2,
        kv_channels=4,
        hidden_size=HIDDEN,
        ffn_hidden_size=16,
        swiglu=True,
    )
    assert ModelShape.of(args) == LLAMA
    args.group_query_attention = False  # Megatron then leaves a meaningless number of groups
    assert ModelShape.of(args).num_query_groups == 6


def test_random_importance_depends_on_layer_and_seed_only():
    first = units.random_importance(1, LLAMA, seed=5)
    assert torch.equal(first[FFN], units.random_importance(1, LLAMA, seed=5)[FFN])
    assert not torch.equal(first[FFN], units.random_importance(2, LLAMA, seed=5)[FFN])
    assert not torch.equal(first[FFN], units.random_importance(1, LLAMA, seed=6)[FFN])
    assert [len(first[kind]) for kind in (HEADS, FFN)] == [2, 16]


def test_the_least_important_are_pruned_and_of_equals_the_lower():
    importance = torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0])
    assert masks.least_important(importance, 2).tolist() == [False, True, False, True, False]
    assert masks.least_important(importance, 0).sum() == 0
    assert masks.least_important(importance, 5).sum() == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_smallest_weights_follow_the_definition(dtype, ratio):
    matrices = list(weights_of(PLAIN, dtype=dtype).values())
    matrices[0].view(-1)[:50] = 0  # equals: pruned all or not at all
    found = masks.smallest_weights(matrices, ratio)
    for weight, mask in zip(matrices, found, strict=True):
        magnitudes = weight.abs().flatten()
        allowed = math.floor(len(magnitudes) * ratio)
        fitting = [t for t in magnitudes.unique() if (magnitudes <= t).sum() <= allowed]
        expected = weight.abs() <= max(fitting) if fitting else torch.zeros_like(mask)
        assert torch.equal(mask, expected)
        assert mask.sum() <= allowed


def test_smallest_weights_of_shards_are_those_of_the_whole():
    weight = weights_of(PLAIN)["linear_fc1"]
    whole = masks.smallest_weights([weight], 0.3)[0]
    shards = weight.chunk(2)
    calls = []

    def both(counts):  # what an all-reduce over two ranks returns: the second shard is counted here
        calls.append(counts)
        return counts + other.pop(0)

    # The other rank counts at the same thresholds.
    threshold = weight.abs()[whole].max()
    other = [torch.tensor([shards[1].numel()])]
    integers = shards[1].abs().view(torch.int64)
    low, high = -1, torch.iinfo(torch.int64).max - 1
    magnitudes = weight.abs().view(torch.int64)
    for _ in range(64):
        middle = low + (high - low + 1) // 2
        other.append(torch.tensor([(integers <= middle).sum()]))
        if (magnitudes <= middle).sum() <= math.floor(weight.numel() * 0.3):
            low = middle
        else:
            high = middle - 1
    mask = masks.smallest_weights([shards[0]], 0.3, both)[0]
    assert len(calls) == 65
    assert torch.equal(mask, whole[: len(mask)])
    assert torch.equal(mask, shards[0].abs() <= threshold)


def test_two_of_four_prunes_the_smaller_two_of_each_four():
    weight = torch.tensor([[1.0, -3.0, 2.0, -0.5, 1.0, 1.0, 1.0, 1.0]])
    expected = [[True, False, False, True, True, True, False, False]]
    assert masks.two_of_four(weight).tolist() == expected


@pytest.mark.parametrize("units_of_layer", [1, 7, 8, 9, 64, 1001])
def test_packing_is_reversible(units_of_layer):
    mask = torch.rand(units_of_layer, generator=torch.Generator().manual_seed(1)) < 0.4
    packed = masks.pack(mask)
    assert len(packed) == -(-units_of_layer // 8)
    assert torch.equal(masks.unpack(packed, units_of_layer), mask)
    assert masks.count_bits(packed) == mask.sum()


def mask_of(layers, iteration=0):
    """Return a Mask of bool lists, one a layer."""
    bits = {i: masks.pack(torch.tensor(layer)) for i, layer in enumerate(layers, 1)}
    return Mask(iteration, {FFN: len(layers[0])}, {FFN: bits})


def test_distance_is_the_share_of_bits_that_differ():
    a = mask_of([[True, True, False, False, False], [True, False, True, False, False]])
    b = mask_of([[True, False, True, False, False], [True, False, True, False, False]])
    assert masks.distance(a, b, FFN) == 2 / 10
    assert masks.distance(a, a, FFN) == 0
    assert a.count(FFN) == 4
    assert a.of_layer(FFN, 2).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.5])
def test_independent_masks_differ_by_chance(share):
    units_of_layer, layers = 1000, 20

    def random_mask(seed):
        shape = ModelShape(layers, 4, 4, 3, units_of_layer, gated=False)
        return mask_of(
            [
                masks.least_important(
                    units.random_importance(n, shape, seed)[FFN], round(share * units_of_layer)
                ).tolist()
                for n in range(1, layers + 1)
            ]
        )

    found = masks.distance(random_mask(1), random_mask(2), FFN)
    expected = masks.chance(share)
    # The number of common units is hypergeometric; each makes the distance 2 / n smaller.
    variance = units_of_layer * expected**2 / 4 * units_of_layer / (units_of_layer - 1)
    sigma = 2 * math.sqrt(variance / layers) / units_of_layer
    assert abs(found - expected) < 3 * sigma


def test_chance_levels():
    levels = [round(masks.chance(p), 2) for p in (0.1, 0.3, 1 / 3, 0.4, 0.5)]
    assert levels == [0.18, 0.42, 0.44, 0.48, 0.5]


def queue_rule(distances_to_previous_four):
    """Early-Bird's released rule: a queue of 5, each of the other 4 at most 0.1 away."""
    return len(distances_to_previous_four) == 4 and max(distances_to_previous_four) <= 0.1


@pytest.mark.parametrize(
    "distances",
    [[], [0.0] * 3, [0.1] * 4, [0.1, 0.1, 0.1, 0.11], [0.11, 0.0, 0.0, 0.0], [0.05, 0.02, 0, 0.1]],
)
def test_early_bird_is_a_queue_of_five(distances):
    rule = PRESETS["early-bird"]
    assert rule.has_emerged({FFN: distances}) == queue_rule(distances)


def test_early_transformers_compares_with_the_mask_before():
    rule = PRESETS["early-transformers"]
    assert rule.has_emerged({FFN: [0.01, 0.5, 0.5]})
    assert not rule.has_emerged({FFN: [0.011, 0.0]})
    assert not rule.has_emerged({FFN: []})


def test_every_kind_must_have_settled():
    rule = Rule(2, 0.1)
    assert not rule.has_emerged({HEADS: [0.2], FFN: [0.0]})
    assert rule.has_emerged({HEADS: [0.1], FFN: [0.0]})
    assert not rule.has_emerged({})
