"""The estimate of `plan --gpu`: what the model of a GPU's time is told and what is shown."""

import json
from dataclasses import asdict

import pytest

from tests.commands.test_plan_command import command

from megatron_rltd.commands.plan import gpu_time  # isort: skip  # of tools/, by tests.parallel

MODEL = (
    "--num-layers 6 --hidden-size 512 --num-attention-heads 8 --seq-length 512 "
    "--max-position-embeddings 512 --vocab-size 1000 --tokenizer-type NullTokenizer "
    "--group-query-attention --num-query-groups 2 --swiglu --ffn-hidden-size 1536 "
    "--micro-batch-size 4 --global-batch-size 64 --train-iters 100 --lr 1e-3 --bf16 "
    "--use-distributed-optimizer --cross-entropy-loss-fusion --no-gradient-accumulation-fusion"
)
GROWING = "--random-ltd-grow-micro-batch 2"
LTD = "--random-ltd --random-ltd-min-tokens 64 --random-ltd-ramp-iters 70"


@pytest.fixture(scope="module")
def numbers():
    status, output = command(f"--gpus 2 --gpu h200 --json -- {MODEL} {LTD}")
    assert status == 0, output
    return json.loads(output)


def training(numbers, **others):
    return gpu_time.Training(
        **{
            **{"seq_length": 512, "num_layers": 6, "dropped_layers": 4, "hidden_size": 512},
            **{"query_size": 512, "key_value_size": 128, "mlp_size": 1536, "is_gated": True},
            **{"vocab_size": numbers["padded_vocab_size"], "optimizer_shards": 2},
            **{"micro_batch_size": 4, "micro_batches": 8},
            **{"cross_entropy": "native", "has_fused_gradients": False},
            **others,
        }
    )


def test_an_estimate_is_the_models(numbers):
    gpu, found = gpu_time.GPUS["h200"], numbers["estimate"]
    assert found["gpu"] == asdict(gpu)
    flags = training(numbers)
    for row in found["lengths"]:
        expected = gpu_time.saved(gpu, flags, [(row["kept_tokens"], 1.0)])
        assert {key: row[key] for key in expected} == expected
    kept = [row["kept_tokens"] for row in found["lengths"]]
    assert (kept[0], len(kept), kept[-1] < 512) == (64, 8, True)
    for length, parts in found["step"].items():
        expected = gpu_time.step(gpu, flags, int(length))
        assert parts == pytest.approx({name: 1e3 * part for name, part in expected.items()})
    levels = numbers["kept_tokens"]["from_iteration"]
    ends = [start for start, _ in levels[1:]] + [100]
    shares = [(k, (end - start) / 100) for (start, k), end in zip(levels, ends, strict=True)]
    expected = gpu_time.saved(gpu, flags, shares)
    assert found["run"] == pytest.approx(expected)
    theory = 1 - numbers["run_in_units_of"]["same_samples"]["flops_causal_attention"]
    # Megatron counts the output layer of a padded vocabulary, and no more than the model does.
    assert found["run"]["operations"] == pytest.approx(theory, rel=1e-9)


def test_choices_are_other_flags(numbers):
    found = numbers["estimate"]
    rows = {
        (row["micro_batch_size"], row["increment"], row["grown"]): row for row in found["choices"]
    }
    # 32 samples of a step on each GPU; 128 is a multiple of the strata and divides the sequence.
    assert sorted(rows) == [(b, q, f) for b in (4, 8, 16) for q in (16, 128) for f in (1, 8)]
    own = rows[4, 16, 1]
    assert own["relative"] == 1
    assert {key: own[key] for key in found["run"]} == found["run"]
    gpu = gpu_time.GPUS["h200"]
    counted = dict.fromkeys((64, 128, 256, 384, 512), 0)
    for t in range(100):
        counted[max(64, min(512, (64 + 448 * t // 70) // 128 * 128))] += 1
    coarse = [(k, n / 100) for k, n in counted.items()]
    larger = training(numbers, micro_batch_size=8, micro_batches=4)
    # Of 64 or 128 kept tokens two micro-batches have no more LayerTokens than a dense one.
    for grown, joined in ((1, {}), (8, {64: 2, 128: 2})):
        expected = gpu_time.saved(gpu, larger, coarse, lambda k, joined=joined: joined.get(k, 1))
        row = rows[8, 128, grown]
        assert {key: row[key] for key in expected} == pytest.approx(expected)
        assert row["relative"] == pytest.approx(expected["seconds"] / own["seconds"])


def test_an_estimate_is_of_the_runs_own_flags(numbers):
    status, output = command(f"--gpus 2 --gpu h200 --json -- {MODEL} {LTD} {GROWING}")
    assert status == 0, output
    found = json.loads(output)["estimate"]
    rows = {(r["micro_batch_size"], r["increment"], r["grown"]): r for r in found["choices"]}
    assert {grown for _, _, grown in rows} == {1, 2, 8}
    own = rows[4, 16, 2]
    assert own["relative"] == 1 < rows[4, 16, 1]["relative"]
    assert {key: own[key] for key in found["run"]} == found["run"]
    assert found["run"]["seconds"] < numbers["estimate"]["run"]["seconds"]


def test_text_says_that_it_is_an_estimate(numbers):
    describe = "--gpu-tflops 692.3 --gpu-bandwidth 4.32 --gpu-sms 132"
    status, text = command(f"--gpus 2 {describe} -- {MODEL} {LTD}")
    assert status == 0, text
    _, _, text = text.partition("ESTIMATE by a model, not a measurement")
    assert "692 TFLOP/s in large matrix products, 4.32 TB/s, 132 multiprocessors" in text
    run = numbers["estimate"]["run"]
    shares = [f"{run[key]:.1%}" for key in ("operations", "time", "realised")]
    assert shares in [line.split()[2:] for line in text.splitlines() if "the run " in line]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"--gpu h100 -- {MODEL}", "--gpu estimates what random-LTD saves, but the run is dense"),
        (
            f"--gpu h100 --gpus 2 -- {MODEL} {LTD} --tensor-model-parallel-size 2",
            "omit --gpu or --tensor-model-parallel-size",
        ),
        (f"--gpu-sms 9 -- {MODEL} {LTD}", "give all of --gpu-tflops, --gpu-bandwidth and"),
    ],
)
def test_what_cannot_be_estimated(line, message):
    status, output = command(line)
    assert (status, output.count("\n")) == (2, 1)
    assert message in output
