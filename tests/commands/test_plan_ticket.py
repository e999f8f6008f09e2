"""A plan with --early-bird: what search and ticket compute, counted by hand and against a run."""

import json

import pytest

from tests.commands.test_plan import GPT3, IN_SAMPLES, SPLITS_ATTENTION, plan_of
from tests.commands.test_plan_command import command
from tests.megatron.test_training import BASE, LTD, SEQ
from tests.parallel import train

SAVED = "--save nowhere --save-interval 10 --ckpt-format torch_dist"
SEARCH = f"{SAVED} --early-bird --early-bird-interval 2"
MODEL = "--group-query-attention --num-query-groups 2 --swiglu --ffn-hidden-size 96"
KEEP = "--early-bird-num-attention-heads 2 --early-bird-ffn-hidden-size 48"
GPT3_DENSE = GPT3[: GPT3.index("--random-ltd")] + "--train-samples 146484375"
GPT3_KEEP = "--early-bird-num-attention-heads 12 --early-bird-ffn-hidden-size 4864"


def by_hand(tokens, hidden, heads, groups, size, ffn, matrices, full=False):
    """Return the FLOPs of a layer on one sample: multiply and add, forward and twice backward."""
    weights = hidden * size * (heads + 2 * groups) + heads * size * hidden
    weights += matrices * hidden * ffn
    scores = heads * size * tokens**2 * (2 if full else 1)  # two products, half of each if causal
    return 6 * (tokens * weights + scores)


def logits(tokens, hidden, vocabulary):
    return 6 * tokens * hidden * vocabulary


def test_gpt3_by_hand():
    ticket = plan_of(f"{GPT3_DENSE} {SEARCH} {GPT3_KEEP}")["ticket"]
    dense, small = (
        24 * by_hand(2048, 2048, heads, heads, 128, ffn, 2) + logits(2048, 2048, 50304)
        for heads, ffn in ((16, 8192), (12, 4864))
    )
    counted = ticket["flops_of_iteration"]
    assert counted["dense"] == pytest.approx(512 * dense, rel=1e-12)
    assert counted["ticket"] == pytest.approx(512 * small, rel=1e-12)
    assert round(small / dense, 3) == 0.679
    assert list(ticket["draws"]) == ["10% of the run", "20% of the run"]
    for draw, drawn, share in zip(
        ticket["draws"].values(), (28_610, 57_220), (0.711, 0.743), strict=True
    ):
        assert draw["iteration"] == drawn
        total = 512 * (drawn * dense + (286_102 - drawn) * small)
        assert draw["flops_causal_attention"] == pytest.approx(total, rel=1e-12)
        assert round(draw["in_units_of_run"], 3) == share
        assert draw["in_units_of_same_samples"] is None
        assert draw["from_scratch"]["iterations"] == total // (512 * small)
    assert ticket["keeps"] == {
        "num_attention_heads": 12,
        "num_query_groups": 12,
        "kv_channels": 128,
        "ffn_hidden_size": 4864,
    }


def test_dropped_layers_are_counted_in_both_parts():
    """Two of four layers keep 16, 16, 24, 32, 32 and 40 of 64 tokens; drawn after 5 iterations."""
    line = f"{BASE} {LTD} {MODEL} {SEARCH} {KEEP} --early-bird-until 3"
    numbers = plan_of(line)
    kept = [k for k, steps in ((16, 2), (24, 1), (32, 2), (40, 1)) for _ in range(steps)]
    draw = numbers["ticket"]["draws"]["--early-bird-until 3"]
    assert draw["iteration"] == 5
    batch = numbers["runs"]["run"]["samples"] // 6
    for key, full in (("flops_causal_attention", False), ("flops_full_attention", True)):
        if full and not SPLITS_ATTENTION:
            assert draw[key] is None
            continue

        def step(tokens, heads, groups, ffn, full=full):
            shape = (32, heads, groups, 8, ffn, 3, full)
            layers = 2 * by_hand(SEQ, *shape) + 2 * by_hand(tokens, *shape)
            return batch * (layers + logits(SEQ, 32, numbers["padded_vocab_size"]))

        dense = [step(tokens, 4, 2, 96) for tokens in kept]
        small = [step(tokens, 2, 1, 48) for tokens in kept]
        assert numbers["runs"]["run"][key] == pytest.approx(sum(dense), rel=1e-12)
        assert draw[key] == pytest.approx(sum(dense[:5]) + small[5], rel=1e-12)
        if not full:
            share = draw[key] / numbers["runs"]["same_samples"][key]
            assert draw["in_units_of_same_samples"] == share
            # The ramp goes on in a longer run of the small model: 48, 56, then 64 tokens.
            longer = small + [step(tokens, 2, 1, 48) for tokens in (40, 48, 56, *[64] * 9)]
            reached = max(n for n in range(len(longer)) if sum(longer[:n]) <= draw[key])
            assert 6 < reached < len(longer) - 1
            assert draw["from_scratch"]["iterations"] == reached
            assert draw["from_scratch"]["samples"] == reached * batch


@pytest.mark.parametrize(
    ("options", "iteration"),
    [
        ("--early-bird-until 1 --lr-warmup-iters 0", 3),
        ("--early-bird-until 1 --lr-warmup-iters 3", 5),
        ("--early-bird-until 4 --lr-warmup-iters 3", 5),
    ],
)
def test_the_latest_draw_is_where_a_run_stops(options, iteration, tmp_path):
    line = BASE.replace("--lr-warmup-iters 1", "")
    search = f"{SEARCH} {KEEP} --early-bird-threshold 0".replace("nowhere", str(tmp_path / "run"))
    line = f"{line} {MODEL} {search} {options}"
    until = " ".join(options.split()[:2])
    assert plan_of(line)["ticket"]["draws"][until]["iteration"] == iteration
    assert not (tmp_path / "run").exists()
    train(line)
    saved = (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text()
    assert int(saved) == iteration


def test_text_says_what_json_says():
    line = f"{BASE} {LTD} {MODEL} {SEARCH} {KEEP}"
    status, text = command(f"-- {line}")
    assert status == 0, text
    assert "--early-bird keeps 2 of 4 heads and 48 of 96 FFN neurons in each layer" in text
    draws = json.loads(command(f"--json -- {line}")[1])["ticket"]["draws"]
    assert len(draws) == 2
    for when, draw in draws.items():
        (row,) = (row for row in text.splitlines() if row.startswith(when))
        shares = [f"{draw[f'in_units_of_{name}']:.3f}" for name in ("run", "same_samples")]
        found = row.removeprefix(when).split()
        counted = f"{draw['flops_causal_attention']:.4e}"
        assert found[:4] == [str(draw["iteration"]), counted, *shares]
        assert found[4] == str(draw["from_scratch"]["iterations"])
    status, text = command(f"-- {BASE} {LTD} {MODEL}")
    assert status == 0 and "early-bird" not in text


@pytest.mark.parametrize("pattern", ["2:4", "unstructured --early-bird-ratio 0.5"])
def test_single_weights_save_nothing(pattern):
    status, text = command(f"-- {BASE} {SEARCH} --early-bird-pattern {pattern}")
    assert status == 0, text
    name = pattern.split()[0]
    assert f"--early-bird-pattern {name} masks single weights: no smaller model" in text
    assert "no FLOPs, time or memory are saved" in text
    assert "FLOPs from scratch" not in text


def test_a_search_that_ends_too_late():
    line = f"{IN_SAMPLES} {SEARCH} {KEEP} {MODEL} --global-batch-size 8 --train-samples 48"
    status, text = command(f"-- {line} --early-bird-until 5")
    assert status == 0
    assert "WARNING: the run ends before the first check from --early-bird-until 5 on" in text
    status, text = command(f"-- {line} --early-bird-until 9")
    assert status == 2
    assert "--early-bird-until 9 is not within the 6 iterations of the run" in text
