"""The model of a GPU's time against sums by hand, and where its terms vanish."""

import itertools
import math
from dataclasses import replace

import pytest

from tests.parallel import ROOT  # puts tools/ on the path

from lib import gpt as bench_gpt  # isort: skip
from lib import moves as bench_moves  # isort: skip
from megatron_rltd.commands.plan import gpu_memory  # isort: skip
from megatron_rltd.commands.plan import gpu_time  # isort: skip

assert ROOT
UNIT = gpu_time.Gpu(1.0, math.inf, 4)
TILE = 2 * 128 * 256 * 64 / (1e12 / 4)  # seconds of a multiprocessor of UNIT, for k = 64
SMALL = gpu_time.Training(
    seq_length=512,
    num_layers=6,
    dropped_layers=4,
    hidden_size=256,
    query_size=256,
    key_value_size=256,
    mlp_size=1024,
    vocab_size=1024,
    micro_batch_size=2,
    micro_batches=8,
)
# Nothing is lost: one multiprocessor has no half-empty wave, memory and launches cost nothing, and
# attention's seven products take the time that six are counted for.
IDEAL = gpu_time.Gpu(1.0, math.inf, 1, attention_share=7 / 6, host_seconds=0.0)
IDEAL = replace(IDEAL, host_seconds_dropping=0.0)
LENGTHS = (256, 512)


@pytest.mark.parametrize(
    ("m", "n", "tiles"),
    [
        (128, 256, 1 / 4 / 0.75),  # four of the smallest, a quarter each
        (256, 512, 1),
        # Six of the largest would take two waves; ten of the smaller, four of them at a time, or
        # twenty of the smallest.
        (257, 512, 3 / 2 / 0.9),
        (64, 512, 1 / 4 / 0.75),  # four of 64 x 128
        (512, 512, 2),
    ],
)
def test_products_take_whole_waves(m, n, tiles):
    assert UNIT.product(m, n, 64) == pytest.approx(tiles * TILE)


def test_products_take_at_least_the_time_of_their_bytes():
    gpu = replace(UNIT, bandwidth=1e-3, tflops=1e6)
    read_and_written = 2 * (100 * 64 + 64 * 300) + 2 * 100 * 300
    assert gpu.product(100, 300, 64) == pytest.approx(read_and_written / 1e9)
    accumulated = 2 * (100 * 64 + 64 * 300) + 8 * 100 * 300
    assert gpu.product(100, 300, 64, 8) == pytest.approx(accumulated / 1e9)


def test_everything_is_realised_where_nothing_is_lost():
    seconds = gpu_time.seconds_of(IDEAL, SMALL, 512)
    assert seconds == pytest.approx(16 * SMALL.operations(512) / 1e12)
    found = gpu_time.saved(IDEAL, SMALL, [(256, 0.5), (512, 0.5)])
    assert found["realised"] == pytest.approx(1)
    assert found["time"] == pytest.approx(found["operations"])
    assert found["operations"] == pytest.approx(
        0.5 * (1 - SMALL.operations(256) / SMALL.operations(512))
    )
    assert gpu_time.saved(IDEAL, SMALL, [(512, 1.0)])["realised"] is None


def saving(gpu, training, kept=256, joined=lambda kept: 1):
    return gpu_time.saved(gpu, training, [(kept, 1.0)], joined)


def test_what_does_not_shrink_is_lost():
    gpu = replace(IDEAL, bandwidth=1.0)
    dense = gpu_time.step(gpu, SMALL, 512)
    short = gpu_time.step(gpu, SMALL, 256)
    for name in ("cross-entropy", "optimizer", "output layer"):
        assert short[name] == dense[name] > 0
    logits = 8 * 2 * 512 * 1024
    assert dense["cross-entropy"] == pytest.approx(52 * logits / 0.85e12)
    parameters = 6 * 12 * 256**2 + 1024 * 256
    assert dense["optimizer"] == pytest.approx(40 * parameters / 0.85e12)
    shared = replace(SMALL, optimizer_shards=4)
    assert gpu_time.step(gpu, shared, 512)["optimizer"] == dense["optimizer"] / 4
    realised = [
        saving(gpu, replace(SMALL, cross_entropy=name, micro_batches=n))["realised"]
        for name, n in (("unfused", 8), ("native", 8), ("te", 8), ("te", 80))
    ]
    assert realised == sorted(realised)
    assert realised[-1] < 1


def test_rows_that_are_moved():
    expected = bench_moves.expected_rows
    for share, layers in itertools.product((0.1, 0.5, 1.0), (1, 3, 22)):
        rows = gpu_time.moved_rows(share, layers)
        assert rows == pytest.approx(expected(bench_moves.KERNELS, share, layers))
    gpu = replace(IDEAL, bandwidth=1.0)
    moved = 4 * gpu_time.moved_rows(0.5, 4) * 2 * 512 * 2 * 256
    one = gpu_time.micro_batch(gpu, SMALL, 256)
    assert one["row moves"] == pytest.approx(moved / 0.85e12)
    assert gpu_time.micro_batch(gpu, SMALL, 512)["row moves"] == 0


def test_nothing_is_saved_where_launches_take_all_the_time():
    gpu = replace(IDEAL, host_seconds=1.0)
    assert gpu_time.seconds_of(gpu, SMALL, 512) == pytest.approx(8 * 6)
    assert saving(gpu, SMALL)["time"] == pytest.approx(0)
    slower = replace(gpu, host_seconds_dropping=0.5)
    assert gpu_time.seconds_of(slower, SMALL, 256) == pytest.approx(8 * (6 + 4 * 0.5))
    assert gpu_time.seconds_of(slower, SMALL, 512) == pytest.approx(8 * 6)
    # Micro-batches that are joined are launched once.
    few = replace(SMALL, dropped_layers=5)
    assert gpu_time.seconds_of(gpu, few, 64, 2) == pytest.approx(4 * 6)
    assert saving(gpu, few, 64, {64: 2}.get)["seconds"] == pytest.approx(4 * 6)
    assert saving(gpu, few, 64)["seconds"] == pytest.approx(8 * 6)


def test_unfused_gradients_are_added_up_apart():
    gpu = replace(IDEAL, bandwidth=1.0)
    assert gpu_time.step(gpu, SMALL, 256)["adding up gradients"] == 0
    unfused = gpu_time.step(gpu, replace(SMALL, has_fused_gradients=False), 256)
    parameters = 6 * 12 * 256**2 + 1024 * 256
    assert unfused["adding up gradients"] == pytest.approx(8 * 10 * parameters / 0.85e12)


def test_recomputation_repeats_the_forward_pass():
    again = replace(SMALL, recomputes=True)
    one, other = (gpu_time.step(IDEAL, training, 512) for training in (SMALL, again))
    assert other["matrix products"] == pytest.approx(one["matrix products"] * 4 / 3)
    assert other["attention"] == pytest.approx(one["attention"] * 9 / 7)


@pytest.mark.parametrize("kept", [16, 33, 64])
def test_operations_are_those_of_the_benchmark(kept):
    tiny = bench_gpt.PRESETS["tiny"]
    h, s = tiny.hidden_size, tiny.seq_length
    training = gpu_time.Training(s, 4, 2, h, h, h, 4 * h, tiny.vocab_size, 2, 1)
    assert training.operations(kept) == bench_gpt.operations(tiny, kept, 2, is_causal=True)
    grouped = replace(training, key_value_size=h // 4, is_gated=True, mlp_size=3 * h)
    assert grouped.layer_parameters == h * h * (1 + 0.5 + 1 + 6 + 3)


def test_memory():
    # arXiv 2205.05198: 34 bytes of a row for each of the hidden state's elements, with fused
    # attention, which stores no matrix.
    parameters = 6 * 12 * 256**2 + 1024 * 256
    assert gpu_memory.memory(SMALL, 512) == {
        "parameters": 18 * parameters,
        "activations": 34 * 256 * 6 * 512 * 2,
        "logits": 12 * 2 * 512 * 1024,
    }
    shared = replace(SMALL, optimizer_shards=12, cross_entropy="te", is_gated=True)
    assert gpu_memory.memory(shared, 128, joined=2) == {
        "parameters": 7 * (parameters + 6 * 4 * 256**2),
        "activations": 42 * 256 * (2 * 512 + 4 * 128) * 4,
        "logits": 4 * 4 * 512 * 1024,
    }
    layers = gpu_memory.memory(replace(SMALL, recomputes=True), 512)["activations"]
    assert layers == (2 * 6 + 34) * 256 * 512 * 2
    dense = sum(gpu_memory.memory(SMALL, 512).values())
    assert gpu_memory.peak_memory(SMALL, [128, 256]) == dense
    logits = replace(SMALL, vocab_size=10**6)
    needed = sum(gpu_memory.memory(logits, 64, 2).values())
    assert gpu_memory.peak_memory(logits, [64, 128], {64: 2, 128: 1}.get) == needed


def test_gpus_are_in_order():
    def seconds(name):
        return gpu_time.seconds_of(gpu_time.GPUS[name], SMALL, 512)

    assert seconds("a100") > seconds("h100") >= seconds("h200") > seconds("b200")
