import itertools

import pytest

from megatron_rltd.schedule import LayerTokenCost, Progress, Schedule, integer_root

GPT3 = Schedule(seq_length=2048, min_tokens=128, ramp_length=200_000, increment=16)
VIT = Schedule(seq_length=197, min_tokens=32, ramp_length=3910, increment=8)
CASES = [
    GPT3,
    VIT,
    Schedule(100, 10, 7, 3),
    Schedule(100, 10, 1000, 16),
    Schedule(64, 64, 10, 8),
    Schedule(64, 8, 40, 8, root_degree=2),
    Schedule(65, 7, 91, 5, root_degree=3),
    Schedule(64, 16, None, 8),
]


def test_golden_values_of_the_gpt3_recipe():
    # arXiv 2211.11586's recipe: r0 = 128, s = 2048, increment 16, 200,000 steps.
    expected = {0: 128, 1666: 128, 1667: 144, 100_000: 1088, 199_999: 2032, 200_000: 2048}
    assert {t: GPT3.kept_tokens(t) for t in expected} == expected
    end = LayerTokenCost(GPT3, num_layers=24, num_dropped=22).after(200_000, 512)
    assert end == Progress(200_000, 200_000 * 512, 2_852_447_191_040)


def test_golden_values_of_the_vit_log():
    # DeepSpeed's published CIFAR log: 5,474 steps of "batch 32", 12 layers, 10 of them dropped.
    end = LayerTokenCost(VIT, num_layers=12, num_dropped=10).after(5474, 32)
    assert end.layer_tokens == 305_784_192
    # s is no multiple of the increment: the ramp passes T before it reaches s.
    assert VIT.kept_tokens(3910) == 192
    assert VIT.kept_tokens(3982) == 197


@pytest.mark.parametrize("schedule", CASES)
def test_kept_tokens_follow_the_definition(schedule):
    s, k0, q = schedule.seq_length, schedule.min_tokens, schedule.increment
    for t in range(0, 300):
        kept = schedule.kept_tokens(t)
        if schedule.ramp_length is None:
            assert kept == k0
            continue
        # The largest x with x^r * T <= (s - k0)^r * t is the floor of the growth.
        grown = 0
        while (grown + 1) ** schedule.root_degree * schedule.ramp_length <= (
            (s - k0) ** schedule.root_degree * t
        ):
            grown += 1
        assert kept == min(s, max(k0, (k0 + grown) // q * q))


@pytest.mark.parametrize("schedule", CASES)
def test_kept_tokens_never_shrink_and_end_at_full_length(schedule):
    kept = [schedule.kept_tokens(t) for t in range(4500)]
    assert kept == sorted(kept)
    assert kept[0] == schedule.min_tokens
    if schedule.ramp_length is not None and schedule.ramp_length < 4000:
        assert kept[-1] == schedule.seq_length


# Billions of LayerTokens per layer, ramp, and the steps that adding up one by one gives.
GPT3_BUDGETS = ((300, 200_000, 372_757), (200, 133_333, 248_505), (150, 100_000, 186_379))


def test_golden_values_of_the_gpt3_budgets():
    # "300B tokens" are LayerTokens per layer: more raw tokens are read.
    for budget, ramp, steps in GPT3_BUDGETS:
        schedule = Schedule(2048, 128, ramp, 16)
        target = budget * 10**9 * 24
        end = LayerTokenCost(schedule, 24, 22).until(
            lambda p, target=target: p.layer_tokens >= target, lambda samples: 512
        )
        assert end.iteration == steps
        assert end.samples == 512 * steps


@pytest.mark.parametrize("schedule", CASES)
@pytest.mark.parametrize("stride", [1, 3, 512])
@pytest.mark.parametrize("start", [0, 1, 39, 2000])
def test_sums_equal_adding_up_step_by_step(schedule, stride, start):
    for steps in (0, 1, 5, 100, 1000):
        by_hand = [schedule.kept_tokens(start + i * stride) for i in range(steps)]
        assert schedule.kept_token_sum(steps, stride, start) == sum(by_hand)
        in_a_row = [(kept, len(list(same))) for kept, same in itertools.groupby(by_hand)]
        assert list(schedule.kept_lengths(steps, stride, start)) == in_a_row


@pytest.mark.parametrize("schedule", CASES)
def test_first_position_is_where_a_length_appears(schedule):
    for position, kept in schedule.levels():
        if position > 10_000:
            break
        assert schedule.first_position(kept) == position
        assert schedule.kept_tokens(position) == kept
        assert position == 0 or schedule.kept_tokens(position - 1) < kept


def walk(tokens: LayerTokenCost, batch_size, reached, start: Progress) -> Progress:
    """As `LayerTokens.until`, one step after another."""
    iteration, samples, total = start.iteration, start.samples, start.layer_tokens
    while not reached(Progress(iteration, samples, total)):
        size = batch_size(samples)
        position = samples if tokens.ramp_in_samples else iteration
        kept = tokens.schedule.kept_tokens(position)
        full, dropped = tokens.num_layers - tokens.num_dropped, tokens.num_dropped
        total += size * (full * tokens.schedule.seq_length + dropped * kept)
        iteration, samples = iteration + 1, samples + size
    return Progress(iteration, samples, total)


BATCH_SIZES = {
    "constant": lambda samples: 8,
    "ramp-up": lambda samples: 4 if samples < 10 else 8 if samples < 300 else 24,
    "every step another": lambda samples: 2 + 2 * (samples // 6),
}


@pytest.mark.parametrize("schedule", CASES)
@pytest.mark.parametrize("ramp_in_samples", [False, True])
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("start", [Progress(), Progress(17, 90, 12_345)])
def test_a_run_is_what_its_steps_add_up_to(schedule, ramp_in_samples, batch_size, start):
    tokens = LayerTokenCost(schedule, 6, 4, ramp_in_samples)
    goals = [
        lambda p: p.layer_tokens >= 1,
        lambda p: p.layer_tokens >= 3_000_000,
        lambda p: p.samples >= 1001,
        lambda p: p.iteration >= 123,
    ]
    for reached in goals:
        expected = walk(tokens, BATCH_SIZES[batch_size], reached, start)
        assert tokens.until(reached, BATCH_SIZES[batch_size], start) == expected


def test_integer_root_is_exact_where_floats_are_not():
    for degree in (1, 2, 3, 5):
        for base in (0, 1, 2, 7, 10**9, 2**53 + 1):
            power = base**degree
            assert integer_root(power, degree) == base
            if base > 1:
                assert integer_root(power - 1, degree) == base - 1
                assert integer_root(power + 1, degree) == (base if degree > 1 else base + 1)
