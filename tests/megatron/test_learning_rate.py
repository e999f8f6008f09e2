"""The LayerToken learning rate: Megatron's scheduler in another unit, and in Megatron's loop."""

import copy
import json
import types
from fractions import Fraction

import pytest

from megatron_rltd.config import ConfigError, RandomLTDConfig
from megatron_rltd.model.random_ltd import RandomLTD
from megatron_rltd.resolved_config import ModelFacts, resolve
from megatron_rltd.schedule import Schedule
from megatron_rltd.training.learning_rate import LayerTokenScheduler
from tests.megatron.test_training import (
    BASE,
    FORMAT,
    GLOBAL_BATCH,
    KEPT,
    LTD,
    SEQ,
    STEPS,
    TOKENS,
    rewind,
)
from tests.parallel import run, train, train_on_this_rank

# Numbers that divide nothing.
CONFIG = RandomLTDConfig(min_tokens=7, ramp_iters=31, increment=3)
MODEL = ModelFacts(seq_length=97, num_layers=7)
DENSE = 97 * 7
STYLES = [
    ("constant", None),
    ("linear", None),
    ("cosine", None),
    ("inverse-square-root", None),
    *(("WSD", style) for style in ("linear", "cosine", "exponential", "minus_sqrt")),
]
BATCHES = [6] * 10 + [12] * 10 + [5] * 30  # a ramp-up, and a change on resume


def megatron_scheduler(unit=1, style="cosine", wsd_style=None, weight_decay="cosine", **options):
    """Return Megatron's scheduler with lengths of `unit` steps, on an optimizer of one group."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    settings = dict(
        init_lr=1e-5,
        max_lr=3e-3,
        min_lr=1e-4,
        lr_warmup_steps=13 * unit,
        lr_decay_steps=211 * unit,
        lr_decay_style=style,
        start_wd=0.01,
        end_wd=0.1,
        wd_incr_steps=180 * unit,
        wd_incr_style=weight_decay,
        use_checkpoint_opt_param_scheduler=False,
        wsd_decay_steps=60 * unit if style == "WSD" else None,
        lr_wsd_decay_style=wsd_style,
    )
    return OptimizerParamScheduler(
        types.SimpleNamespace(param_groups=[{}]), **{**settings, **options}
    )


def random_ltd(config=CONFIG, model=MODEL) -> RandomLTD:
    return RandomLTD(config, resolve(config, model))


def rates(scheduler) -> tuple[float, float]:
    group = scheduler.optimizer.param_groups[0]
    return group["lr"], group["weight_decay"]


@pytest.mark.parametrize(("style", "wsd_style"), STYLES)
@pytest.mark.parametrize("weight_decay", ["linear", "cosine"])
def test_equals_a_schedule_in_layer_tokens(style, wsd_style, weight_decay):
    kept = Schedule(97, 7, 31, 3)
    options = dict(style=style, wsd_style=wsd_style, weight_decay=weight_decay)
    ltd = random_ltd()
    ours = LayerTokenScheduler(megatron_scheduler(**options), ltd)
    theirs = megatron_scheduler(unit=DENSE, **options)
    consumed, samples, seen = 0, 0, set()
    for step, batch in enumerate(BATCHES):
        ltd.begin_step(step, samples)
        ours.step(increment=batch)
        layer_tokens = batch * (97 * 2 + 5 * kept.kept_tokens(step))
        theirs.step(layer_tokens)
        consumed, samples = consumed + layer_tokens, samples + batch
        assert ours.layer_tokens == consumed
        assert rates(ours) == pytest.approx(rates(theirs), rel=1e-13)
        seen.add(rates(ours))
    assert len(seen) > 20
    assert consumed > 211 * DENSE  # past the end


@pytest.mark.parametrize(("style", "wsd_style"), STYLES)
def test_without_dropping_it_is_megatrons_bit_for_bit(style, wsd_style):
    ltd = random_ltd(RandomLTDConfig(min_tokens=97, constant=True))
    ours = LayerTokenScheduler(megatron_scheduler(style=style, wsd_style=wsd_style), ltd)
    theirs = megatron_scheduler(style=style, wsd_style=wsd_style)
    for step, batch in enumerate(BATCHES):
        ltd.begin_step(step, 0)
        ours.step(increment=batch)
        theirs.step(increment=batch)
        assert rates(ours) == rates(theirs)
        state = ours.state_dict()
        assert state.pop("layer_tokens") == theirs.num_steps * DENSE
        assert state == theirs.state_dict()
        assert isinstance(ours.num_steps, int)


def test_nothing_drifts():
    ltd = random_ltd(RandomLTDConfig(min_tokens=8, constant=True, strata=1))
    ours = LayerTokenScheduler(megatron_scheduler(), ltd)
    ltd.begin_step(0, 0)
    for _ in range(50_000):
        ours.step(increment=3)
    consumed = 50_000 * 3 * (97 * 2 + 8 * 5)
    assert ours.layer_tokens == consumed
    assert ours.num_steps == float(Fraction(consumed, DENSE))


def advanced(steps: int = 7):
    ltd = random_ltd()
    ours = LayerTokenScheduler(megatron_scheduler(), ltd)
    for step in range(steps):
        ltd.begin_step(step, 0)
        ours.step(increment=5)
    return ltd, ours


def test_state_is_plain_and_exact():
    ltd, ours = advanced()
    state = json.loads(json.dumps(ours.state_dict()))
    loaded = LayerTokenScheduler(megatron_scheduler(), ltd)
    loaded.load_state_dict(state)
    assert loaded.layer_tokens == ours.layer_tokens
    assert rates(loaded) == rates(ours)
    assert loaded.state_dict() == ours.state_dict()
    ours.step(increment=5)
    loaded.step(increment=5)
    assert loaded.layer_tokens == ours.layer_tokens
    assert rates(loaded) == rates(ours)


def test_state_goes_to_plain_megatron_and_back():
    ltd, ours = advanced()
    vanilla = megatron_scheduler()
    vanilla.load_state_dict(ours.state_dict())
    assert rates(vanilla) == rates(ours)
    vanilla.step(increment=10)
    back = LayerTokenScheduler(megatron_scheduler(), ltd)
    back.load_state_dict(vanilla.state_dict())
    assert back.layer_tokens == ours.layer_tokens + 10 * DENSE


def test_a_count_of_another_sequence_length_is_converted():
    _, ours = advanced()
    longer = random_ltd(model=ModelFacts(seq_length=194, num_layers=7))
    loaded = LayerTokenScheduler(megatron_scheduler(), longer)
    loaded.load_state_dict(ours.state_dict())
    assert loaded.layer_tokens == 2 * ours.layer_tokens
    assert rates(loaded) == rates(ours)


def test_other_settings_than_the_state_name_the_way_out():
    ltd, ours = advanced()
    other = LayerTokenScheduler(megatron_scheduler(lr_decay_steps=99), ltd)
    with pytest.raises(ConfigError, match="99 and .*211 .* do not match; add --override-opt"):
        other.load_state_dict(ours.state_dict())


def test_it_can_be_copied():
    _, ours = advanced()
    assert copy.copy(ours).layer_tokens == ours.layer_tokens
    with pytest.raises(AttributeError):
        ours.nothing  # noqa: B018


# In Megatron's loop.

LR = "--layer-token-lr --start-weight-decay 0.01 --end-weight-decay 0.1"
WD = "--weight-decay-incr-style linear"


def expected(kept, batches, warmup, decay, weight_decay):
    """Return learning rates and weight decays by hand; lengths in samples."""
    import math

    lrs, wds, done = [], [], Fraction(0)
    for k, batch in zip(kept, batches, strict=True):
        done += Fraction(batch * (2 * SEQ + 2 * k), SEQ * 4)
        ratio = (done - warmup) / (decay - warmup)
        if done <= warmup:
            lrs.append(3e-3 * float(done / warmup))
        elif ratio > 1:
            lrs.append(1e-4)
        else:
            lrs.append(1e-4 + (3e-3 - 1e-4) * 0.5 * (math.cos(math.pi * ratio) + 1))
        wds.append(0.01 + 0.09 * min(1.0, float(done / weight_decay)))
    return lrs, wds


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run saved after half its steps, and continued without interruption."""
    folder = tmp_path_factory.mktemp("checkpoints")
    whole = train(f"{BASE} {LTD} {LR} {WD} --save {folder} --save-interval 3 {FORMAT}")
    rewind(folder)
    return folder, whole


def test_advances_by_layer_tokens_to_the_end_of_the_run(alone):
    _, whole = alone
    total = sum(GLOBAL_BATCH * TOKENS.per_sample(k) for k in KEPT)
    length = Fraction(total, TOKENS.dense)
    assert whole.arguments["lr_decay_steps"] == float(length) < STEPS * GLOBAL_BATCH
    lrs, wds = expected(
        KEPT, [GLOBAL_BATCH] * STEPS, warmup=GLOBAL_BATCH, decay=length, weight_decay=length
    )
    assert whole.learning_rates == pytest.approx(lrs, rel=1e-12)
    assert whole.weight_decays == pytest.approx(wds, rel=1e-12)
    assert whole.weight_decays[-1] == 0.1
    assert whole.learning_rates[-1] == 1e-4


def test_without_dropping_the_loop_is_bit_identical():
    dense = train(f"{BASE} {LR} {WD}".replace("--layer-token-lr ", ""))
    full = f"--random-ltd --random-ltd-constant --random-ltd-min-tokens {SEQ}"
    ours = train(f"{BASE} {LR} {WD} {full}")
    for name in ("learning_rates", "weight_decays", "losses"):
        assert getattr(ours, name) == getattr(dense, name), name


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, ""),
        (2, ""),
        (2, "--pipeline-model-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    ],
)
def test_resume_is_exact_on_any_layout(alone, world_size, flags):
    folder, whole = alone
    resumed = train(f"{BASE} {LTD} {LR} {WD} --load {folder} {FORMAT} {flags}", world_size)
    assert resumed.learning_rates == whole.learning_rates[3:]
    assert resumed.weight_decays == whole.weight_decays[3:]
    assert resumed.layer_tokens == whole.layer_tokens


def test_changing_how_it_advances_is_an_error(alone, tmp_path):
    folder, _ = alone
    plain = f"{LR} {WD}".replace("--layer-token-lr", "")
    with pytest.raises(AssertionError, match="was trained with --layer-token-lr: add it"):
        train(f"{BASE} {LTD} {plain} --load {folder} {FORMAT}")
    resumed = train(f"{BASE} {LTD} {plain} --load {folder} {FORMAT} --override-opt-param-scheduler")
    assert len(resumed.learning_rates) == 3
    assert resumed.learning_rates[-1] > 1e-4  # Megatron counts samples from there on


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("ramp", "batch"), [("--random-ltd-ramp-iters 9", 4), ("--random-ltd-ramp-samples 72", 12)]
)
def test_another_batch_size_goes_on_along_the_same_schedule(tmp_path, ramp, batch):
    options = f"{BASE} {LTD} {LR} {WD} {FORMAT}".replace("--random-ltd-ramp-iters 9", ramp)
    options = options.replace(f"--train-iters {STEPS}", "--train-samples 48")
    options = options.replace("--lr-warmup-iters 1", "--lr-warmup-samples 8")
    first = train(f"{options} --save {tmp_path} --save-interval 3")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    line = f"{options} --load {tmp_path}".replace("--global-batch-size 8", "")
    more = train(f"{line} --global-batch-size {batch}")
    kept = [first.kept[i] for i in range(3)] + more.kept
    # Megatron ends after 48 / batch iterations, whatever the batch was before.
    batches = [8, 8, 8] + [batch] * (48 // batch - 3)
    positions = list(range(len(batches)))
    if "samples" in ramp:
        positions = [sum(batches[:i]) for i in positions]
    length = 9 if "iters" in ramp else 72
    assert kept == [Schedule(SEQ, 16, length, 8).kept_tokens(p) for p in positions]
    planned = Fraction(first.layer_tokens, TOKENS.dense)
    lrs, wds = expected(
        [int(k) for k in kept], batches, warmup=8, decay=planned, weight_decay=planned
    )
    assert more.learning_rates == pytest.approx(lrs[3:], rel=1e-12)
    assert more.weight_decays == pytest.approx(wds[3:], rel=1e-12)
    # A run that is made longer has to say what its schedule is to be, as in Megatron.
    with pytest.raises(AssertionError, match="do not match; add --override-opt-param-scheduler"):
        train(f"{line} --global-batch-size {batch}".replace("samples 48", "samples 96"))


def test_a_vanilla_checkpoint_goes_on_to_the_end_of_the_run(tmp_path):
    plain = f"{BASE} {LR} {WD}".replace("--layer-token-lr", "")
    train(f"{plain} --save {tmp_path} --save-interval 3 --exit-interval 3 {FORMAT}")
    line = f"{BASE} {LTD} {LR} {WD} --load {tmp_path} {FORMAT}"
    with pytest.raises(AssertionError, match="do not match; add --override-opt-param-scheduler"):
        train(line)
    ours = train(f"{line} --override-opt-param-scheduler")
    done = [3 * GLOBAL_BATCH * TOKENS.dense]
    for k in KEPT[3:]:
        done.append(done[-1] + GLOBAL_BATCH * TOKENS.per_sample(k))
    assert ours.layer_tokens == done[-1]
    assert "was trained without it" in ours.output
    # What it has done counts in full, and both rates end with it.
    length = done[-1] / TOKENS.dense
    scheduler = megatron_scheduler(
        init_lr=0.0,
        lr_warmup_steps=GLOBAL_BATCH,
        lr_decay_steps=length,
        wd_incr_steps=length,
        weight_decay="linear",
    )
    for tokens, *both in zip(done[1:], ours.learning_rates, ours.weight_decays, strict=True):
        scheduler.num_steps = tokens / TOKENS.dense
        scheduler.step(0)
        assert rates(scheduler) == tuple(both)
    assert both == [1e-4, 0.1]


def test_override_lets_the_command_line_win(alone):
    folder, _ = alone
    line = f"{BASE} {LTD} {LR} {WD} --load {folder} {FORMAT}"
    for flag in ("--lr-decay-iters 3", "--lr-warmup-fraction 0.4"):
        given = line.replace("--lr-warmup-iters 1", "") if "fraction" in flag else line
        with pytest.raises(AssertionError, match="do not match"):
            train(f"{given} {flag}")
    override = "--override-opt-param-scheduler"
    given = train(f"{line} --lr-decay-iters 3 {override}")
    assert given.arguments == {**given.arguments, "lr_decay_iters": 3}
    assert "lr_decay_steps" not in given.arguments
    # The schedule stands at 15.5 of now 24 samples.
    lrs, _ = expected(KEPT, [8] * STEPS, warmup=8, decay=24, weight_decay=1)
    assert given.learning_rates == pytest.approx(lrs[3:], rel=1e-12)
    # Another ramp: the rest of the run is other than was planned, and the rates end with it.
    other = line.replace("--random-ltd-ramp-iters 9", "--random-ltd-ramp-iters 5")
    ramped = train(f"{other} {override}")
    done = sum(TOKENS.per_sample(k) for k in KEPT[:3])
    done += sum(TOKENS.per_sample(int(k)) for k in ramped.kept)
    assert ramped.arguments["lr_decay_steps"] == GLOBAL_BATCH * done / TOKENS.dense
    assert ramped.learning_rates[-1] == 1e-4 < ramped.learning_rates[-2]
    assert ramped.weight_decays[-1] == 0.1 > ramped.weight_decays[-2]


def test_warmup_fraction_and_wsd():
    options = BASE.replace("--lr-warmup-iters 1", "--lr-warmup-fraction 0.5")
    length = Fraction(sum(8 * TOKENS.per_sample(k) for k in KEPT), TOKENS.dense)
    ours = train(f"{options} {LTD} --layer-token-lr")
    lrs, _ = expected(KEPT, [8] * STEPS, warmup=length / 2, decay=length, weight_decay=1)
    assert ours.learning_rates == pytest.approx(lrs, rel=1e-12)
    wsd = BASE.replace("cosine", "WSD --lr-wsd-decay-style linear")
    ours = train(f"{wsd} {LTD} --layer-token-lr --lr-wsd-decay-iters 2")
    done = [sum(8 * TOKENS.per_sample(k) for k in KEPT[: n + 1]) / TOKENS.dense for n in range(6)]
    fall = [max(0.0, (d - (float(length) - 16)) / 16) for d in done]
    by_hand = [
        1e-4 + (3e-3 - 1e-4) * (1 - f) if d > 8 else 3e-3 * d / 8
        for d, f in zip(done, fall, strict=True)
    ]
    assert ours.learning_rates == pytest.approx(by_hand, rel=1e-12)
    with pytest.raises(AssertionError, match="--lr-wsd-decay-iters 5 is 40 samples, but"):
        train(f"{wsd} {LTD} --layer-token-lr --lr-wsd-decay-iters 5")


def test_a_run_of_one_step():
    options = BASE.replace(f"--train-iters {STEPS}", "--train-iters 1")
    ours = train(f"{options} {LTD} --layer-token-lr".replace("--lr-warmup-iters 1", ""))
    assert ours.learning_rates == [1e-4]


def _train_with_failures(arguments: list[str], skipped: int, exits: int):
    """Train as `tests.parallel.train`; one update fails, and one step ends the run."""
    from megatron.core import rerun_state_machine
    from megatron.core.optimizer import optimizer

    steps = []

    def prepared(original):
        def wrapper(self, *args, **kwargs):
            steps.append(1)
            return (False, None, None) if len(steps) == skipped else original(self, *args, **kwargs)

        return wrapper

    def asked(original):
        asked_for = []

        def wrapper(self):
            asked_for.append(1)
            return (False, True, 0) if len(asked_for) == exits else original(self)

        return wrapper

    optimizer.ChainedOptimizer.step = prepared(optimizer.ChainedOptimizer.step)
    machine = rerun_state_machine.RerunStateMachine
    machine.should_checkpoint_and_exit = asked(machine.should_checkpoint_and_exit)
    return train_on_this_rank("pretrain_gpt", arguments)


def test_skipped_updates_and_steps_that_end_a_run():
    (ours,) = run(1, _train_with_failures, f"{BASE} {LTD} --layer-token-lr".split(), 3, 5)
    tokens = [8 * TOKENS.per_sample(k) for k in KEPT]
    # Four steps are done, the fifth ends before its update; the third computes and changes nothing.
    assert ours["layer_tokens"] == sum(tokens[:4])
    assert len(ours["learning_rates"]) == 5
    length = Fraction(sum(tokens), TOKENS.dense)
    updates = [KEPT[0], KEPT[1], KEPT[3]]
    lrs, _ = expected(updates, [8] * 3, warmup=8, decay=length, weight_decay=1)
    assert ours["learning_rates"] == pytest.approx([lrs[0], lrs[1], lrs[1], lrs[2], lrs[2]])
