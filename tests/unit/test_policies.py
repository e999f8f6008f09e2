import itertools
import math

import pytest
import torch

from megatron_rltd.tokens import reference
from megatron_rltd.tokens.policies import Balanced, Draw, Policy, TokenBypass
from megatron_rltd.tokens.sampling import kept_indices, priorities

SEED, SAMPLES = 5, torch.tensor([3, 2**33, 11])


def draw(length, kept, strata, ordinals):
    layers = torch.tensor([n + 2 for n in ordinals])
    return Draw(SEED, layers, tuple(ordinals), SAMPLES, length, kept, strata)


def test_the_default_is_the_papers_draw():
    ours = Policy().choose(reference, draw(16, 4, 2, range(3)))
    plain = kept_indices(SEED, torch.tensor([2, 3, 4]), SAMPLES, 16, 4, 2)
    assert torch.equal(ours, plain)


def plain_row(length, kept, orders, sample, start):
    """Return the row of tokens of a stratum, one order after the other, by plain loops."""
    row: list[int] = []
    for number in range(orders):
        ranked = priorities(SEED, torch.tensor([number]), SAMPLES[[sample]], 64)[0, 0]
        order = sorted(range(length), key=lambda t: int(ranked[start + t]))
        open_places = len(row) % kept  # tokens of a layer that is not full yet
        taken = row[len(row) - open_places :]
        row += [t for t in order if t not in taken] + [t for t in order if t in taken]
    return row


@pytest.mark.parametrize(
    ("kept", "strata", "layers"), [(16, 1, 5), (20, 1, 9), (48, 4, 11), (7, 1, 22), (63, 1, 4)]
)
def test_balanced(kept, strata, layers):
    length = 64
    chosen = Balanced().choose(reference, draw(length, kept, strata, range(layers)))
    assert chosen.dtype == torch.int32
    assert chosen.shape == (layers, len(SAMPLES), kept)
    assert (chosen.diff(dim=-1) > 0).all()
    counts = torch.zeros(len(SAMPLES), length, dtype=torch.int64)
    for of_layer in chosen:
        counts.scatter_add_(1, of_layer.long(), torch.ones_like(of_layer, dtype=torch.int64))
    assert (counts.amax(1) - counts.amin(1) <= 1).all()
    size, each = length // strata, kept // strata
    for sample, stratum in itertools.product(range(len(SAMPLES)), range(strata)):
        start = stratum * size
        row = plain_row(size, each, -(-layers * each // size), sample, start)
        for layer in range(layers):
            own = sorted(start + t for t in row[layer * each : (layer + 1) * each])
            ours = chosen[layer, sample, stratum * each : (stratum + 1) * each]
            assert ours.tolist() == own


def test_a_pipeline_stage_draws_balanced_tokens_as_the_whole_model_does():
    whole = Balanced().choose(reference, draw(64, 20, 1, range(9)))
    assert torch.equal(Balanced().choose(reference, draw(64, 20, 1, range(4, 7))), whole[4:7])


def plain_choice(importance, ids, kept):
    """Return the kept positions of one sample by plain Python: highest first, ties by position."""
    ranked = sorted(range(len(ids)), key=lambda i: (-importance[ids[i]], i))
    return sorted(ranked[:kept])


def bypass(**options):
    policy = TokenBypass(40, always_kept=[1, 2], padding=[0], **options)
    generator = torch.Generator().manual_seed(3)
    policy.importance[3:] = torch.randint(5, (37,), generator=generator).float()  # ties
    return policy


def ids():
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, 40, (3, 64), generator=generator)
    tokens[:, 0], tokens[0, 40:], tokens[1, 5::7] = 1, 0, 2
    return tokens


def test_token_bypass_keeps_the_most_important_tokens():
    policy, tokens = bypass(), ids()
    policy.begin(tokens)
    chosen = policy.choose(reference, draw(64, 24, 1, range(3)))
    assert chosen.dtype == torch.int32
    expected = [plain_choice(policy.importance.tolist(), own, 24) for own in tokens.tolist()]
    assert chosen.tolist() == [expected]
    assert 0 in chosen[0, 0]  # [CLS]
    assert set(range(5, 64, 7)) < set(chosen[0, 1].tolist())
    policy.begin(tokens.flip(0))
    assert policy.choose(reference, draw(64, 24, 1, range(3))).tolist() == [expected[::-1]]


def test_token_bypass_with_a_random_share():
    policy, tokens = bypass(random_share=0.5), ids()
    policy.begin(tokens)
    chosen = policy.choose(reference, draw(64, 24, 1, range(3)))[0]
    by_chance = []
    for own, rows in zip(tokens.tolist(), chosen.tolist(), strict=True):
        assert len(set(rows)) == 24
        important = plain_choice(policy.importance.tolist(), own, 12)
        assert set(important) < set(rows)
        by_chance.append(sorted(set(rows) - set(important)))
        # Padding comes last, special tokens first.
        rest = set(range(64)) - set(rows)
        assert not any(own[i] in (1, 2) for i in rest)
        assert not any(own[i] == 0 for i in rows)
    drawn = priorities(SEED, torch.tensor([0]), SAMPLES, 64)[0]
    rest = set(range(64)) - set(plain_choice(policy.importance.tolist(), tokens[2].tolist(), 12))
    assert by_chance[2] == sorted(sorted(rest, key=lambda i: int(drawn[2, i]))[:12])


def test_padding_is_kept_where_there_is_nothing_else():
    policy = bypass(random_share=0.5)
    tokens = torch.zeros(3, 64, dtype=torch.int64)
    tokens[:, 60:] = 7
    policy.begin(tokens)
    chosen = policy.choose(reference, draw(64, 16, 1, [0]))[0]
    assert all(set(range(60, 64)) < set(rows) for rows in chosen.tolist())


def observe(policy, labels, losses, counted):
    policy.observe(torch.tensor(labels), torch.tensor(losses), torch.tensor(counted))


def test_importance_is_a_running_mean_of_the_losses_of_labels():
    policy = TokenBypass(8, always_kept=[1], padding=[0])
    before = policy.importance.clone()
    observe(
        policy,
        [[2, 3, 2], [5, -1, 1]],
        [[4.0, 1.5, 2.0], [9.0, 7.0, 3.0]],
        [[True] * 3, [True, False, True]],
    )
    observe(policy, [[2, 5, 6]], [[0.5, 8.0, math.inf]], [[True, False, True]])
    policy.learn()
    means = {2: (4.0 + 2.0 + 0.5) / 3, 3: 1.5, 5: 9.0}
    for token in range(8):
        old = float(before[token])
        new = 0.995 * old + 0.005 * means[token] if token in means else old
        assert float(policy.importance[token]) == pytest.approx(new, rel=1e-6), token
    assert float(policy.importance[1]) == 1e4
    assert float(policy.importance[0]) == -1e4
    learned = policy.importance.clone()
    policy.learn()  # nothing was observed since
    assert torch.equal(policy.importance, learned)
    observe(policy, [[4]], [[3.0]], [[True]])
    policy.forget()
    policy.learn()
    assert torch.equal(policy.importance, learned)


def test_no_order_of_the_observations_changes_a_bit():
    generator = torch.Generator().manual_seed(6)
    labels = torch.randint(8, (64, 16), generator=generator)
    losses = torch.rand(64, 16, generator=generator) * 20
    counted = torch.rand(64, 16, generator=generator) > 0.3
    learned = []
    for order in (torch.arange(64), torch.randperm(64, generator=generator)):
        policy = TokenBypass(8)
        for rows in order.split(7):
            policy.observe(labels[rows], losses[rows], counted[rows])
        policy.learn()
        learned.append(policy.importance)
    assert torch.equal(*learned)
    assert learned[0].unique().numel() == 8


@pytest.mark.parametrize("size", [40, 32, 48])
def test_state(size):
    policy = bypass()
    other = TokenBypass(size, always_kept=[1, 2], padding=[0])
    other.load(policy.state())
    same = min(size, 40)
    assert torch.equal(other.importance[:same], policy.importance[:same])
    assert (other.importance[same:] == TokenBypass.INITIAL).all()
