"""How long a training step should take on a GPU: a model in closed form, not a measurement.

    gpu = GPUS["h200"]
    training = Training(seq_length=2048, num_layers=24, dropped_layers=22, ...)
    step(gpu, training, kept=144)               seconds, by what they go into
    saved(gpu, training, [(144, 1.0)])          in theory and in time, as shares of a dense run

Pure Python. docs/planning.md says where each term comes from and what it leaves out. Trust
differences more than absolute numbers, and those to two points.

Shapes: s sequence length, b micro batch, h hidden size, k kept tokens, m = b * k rows.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# Tiles of the result that a GPU's library computes one at a time on each of its multiprocessors,
# and how fast relative to the largest. It takes the shape that ends first.
TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.9, (64, 128): 0.75}
# Bytes that a logit costs, forward and backward, of bfloat16 logits and float32 probabilities:
# Megatron's own ops; the same by torch.compile, --cross-entropy-fusion-impl native; Transformer
# Engine's kernel.
LOSS_BYTES = {"unfused": 52, "native": 40, "te": 10}
ADAM_BYTES = 40  # a parameter: zeroing and norm, gradient, master, two moments, the bfloat16 copy
# What an op on the hidden states reads and writes of a row, in bytes for each of its elements:
# layer norms, dropout and residual sums, gradients of biases of size h, forward and backward; and
# the activation with its bias, for each of the MLP's elements.
ROW_BYTES, ACTIVATION_BYTES = 62, 12
ATTENTION_PRODUCTS = 2, 5  # forward and backward, where the backward pass repeats one
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Gpu:
    """What a GPU achieves.

    Attributes:
        tflops: Of large bfloat16 matrix products, in TFLOP/s.
        bandwidth: Of a copy, bytes read and written, in TB/s.
        multiprocessors: SMs.
        stream_share: Bandwidth of the other ops, relative to a copy's.
        attention_share: FLOP/s of fused attention, relative to matrix products.
        host_seconds: What Python and the launches of a layer take, forward and backward.
        host_seconds_dropping: What random-LTD adds to that in a dropped layer.
    """

    tflops: float
    bandwidth: float
    multiprocessors: int
    stream_share: float = 0.85
    attention_share: float = 0.6
    host_seconds: float = 0.8e-3
    host_seconds_dropping: float = 64e-6

    def product(self, m: int, n: int, k: int, result_bytes: int = 2) -> float:
        """Return the seconds of a matrix product [m, k] x [k, n].

        The multiprocessors take tiles of the result in waves, the last of which may be almost
        empty; and operands and result must be read and written.
        """
        waves = (
            math.ceil(math.ceil(m / rows) * math.ceil(n / columns) / self.multiprocessors)
            * (2 * rows * columns * k / share)
            for (rows, columns), share in TILES.items()
        )
        computed = min(waves) * self.multiprocessors / (self.tflops * 1e12)
        return max(computed, (2 * (m * k + k * n) + result_bytes * m * n) / (self.bandwidth * 1e12))

    def stream(self, moved: float) -> float:
        """Return the seconds of reading and writing so many bytes."""
        return moved / (self.stream_share * self.bandwidth * 1e12)


def _of_data_sheet(tflops: float, bandwidth: float, multiprocessors: int) -> Gpu:
    # What large products reach of the dense bfloat16 peak, and copies of the memory's.
    return Gpu(0.7 * tflops, 0.9 * bandwidth, multiprocessors)


GPUS = {
    "a100": _of_data_sheet(312, 2.04, 108),
    "h100": _of_data_sheet(989, 3.35, 132),
    "h200": _of_data_sheet(989, 4.8, 132),
    "b200": _of_data_sheet(2250, 8.0, 148),
}


@dataclass(frozen=True)
class Training:
    """A GPT whose layers are whole on each GPU, and a step of its training.

    Attributes:
        query_size, key_value_size: Elements of a row's queries, and of its keys.
        mlp_size: Elements that the second matrix of the MLP takes.
        is_gated: Whether the first one makes twice as many.
        optimizer_shards: GPUs that share the optimizer's work.
        cross_entropy: One of `LOSS_BYTES`.
        has_fused_gradients: Whether weight gradients are added up where they are computed.
        recomputes: Whether the forward pass of each layer is repeated in the backward pass.
    """

    seq_length: int
    num_layers: int
    dropped_layers: int
    hidden_size: int
    query_size: int
    key_value_size: int
    mlp_size: int
    vocab_size: int
    micro_batch_size: int
    micro_batches: int
    is_gated: bool = False
    optimizer_shards: int = 1
    cross_entropy: str = "unfused"
    has_fused_gradients: bool = True
    recomputes: bool = False

    @property
    def weights(self) -> list[tuple[int, int]]:
        """(rows that it makes, rows that it takes) of each matrix of a layer."""
        h = self.hidden_size
        return [
            (self.query_size + 2 * self.key_value_size, h),
            (h, self.query_size),
            (self.mlp_size * (2 if self.is_gated else 1), h),
            (h, self.mlp_size),
        ]

    @property
    def layer_parameters(self) -> int:
        """Of the matrices."""
        return sum(n * k for n, k in self.weights)

    @property
    def parameters(self) -> int:
        """Of the layers' matrices and the embedding, which is the output layer's matrix."""
        return self.num_layers * self.layer_parameters + self.vocab_size * self.hidden_size

    def attention_operations(self, tokens: int) -> int:
        """Return those of one product of a sample in a layer: queries by keys, or by values.

        Without the masked half.
        """
        return tokens**2 * self.query_size

    def operations(self, kept: int) -> int:
        """Return the floating-point operations of a sample, forward and backward, as Megatron's."""

        def layer(tokens: int) -> int:
            return 2 * tokens * self.layer_parameters + 2 * self.attention_operations(tokens)

        full = self.num_layers - self.dropped_layers
        layers = full * layer(self.seq_length) + self.dropped_layers * layer(kept)
        return 3 * (layers + 2 * self.seq_length * self.hidden_size * self.vocab_size)

    def layer_tokens(self, kept: int) -> int:
        """Return the LayerTokens of a sample."""
        full = self.num_layers - self.dropped_layers
        return full * self.seq_length + self.dropped_layers * kept


def layer(gpu: Gpu, training: Training, rows: int, tokens: int) -> dict[str, float]:
    """Return the seconds of a layer by what they go into.

    Args:
        rows: m, of all samples.
        tokens: Of each sample.
    """
    products = {FORWARD: 0.0, BACKWARD: 0.0}
    gradient_bytes = 8 if training.has_fused_gradients else 2
    for n, k in training.weights:
        products[FORWARD] += gpu.product(rows, n, k)
        products[BACKWARD] += gpu.product(rows, k, n) + gpu.product(n, k, rows, gradient_bytes)
    one = rows / tokens * training.attention_operations(tokens)
    one /= gpu.attention_share * gpu.tflops * 1e12
    size = ROW_BYTES * training.hidden_size + ACTIVATION_BYTES * training.mlp_size
    repeated = 1 if training.recomputes else 0
    unfused = 0 if training.has_fused_gradients else 10 * training.layer_parameters
    return {
        "matrix products": products[FORWARD] * (1 + repeated) + products[BACKWARD],
        "attention": one * (ATTENTION_PRODUCTS[0] * (1 + repeated) + ATTENTION_PRODUCTS[1]),
        "norms, activations": gpu.stream(size * rows) * (1 + repeated / 3),
        "adding up gradients": gpu.stream(unfused),
    }


def moved_rows(share: float, layers: int) -> float:
    """Return the rows read and written for a dropped layer, forward and backward, in units of b*s.

    Of a run of neighbouring dropped layers: between two of them 8p - 4p^2 with p = `share`, and
    4 + 4p where the run begins and ends.
    """
    return (4 + 4 * share + (layers - 1) * (8 * share - 4 * share**2)) / layers if layers else 0.0


def micro_batch(gpu: Gpu, training: Training, kept: int, joined: int = 1) -> dict[str, float]:
    """Return the seconds of one micro-batch, forward and backward, by what they go into.

    Args:
        kept: k.
        joined: How many micro-batches share a pass; the seconds are those of one of them.
    """
    s, h, dropped = training.seq_length, training.hidden_size, training.dropped_layers
    samples = joined * training.micro_batch_size
    rows = s * samples
    if kept == s:
        dropped = 0
    seconds: dict[str, float] = {}
    for count, tokens in ((training.num_layers - dropped, s), (dropped, kept)):
        for name, part in layer(gpu, training, samples * tokens, tokens).items():
            seconds[name] = seconds.get(name, 0.0) + count * part
    moved = dropped * moved_rows(kept / s, dropped) * rows * 2 * h
    output = (
        gpu.product(rows, training.vocab_size, h)
        + gpu.product(rows, h, training.vocab_size)
        + gpu.product(training.vocab_size, h, rows, 8 if training.has_fused_gradients else 2)
    )
    unfused = 0 if training.has_fused_gradients else 10 * training.vocab_size * h
    seconds["adding up gradients"] += gpu.stream(unfused)
    seconds |= {
        "row moves": gpu.stream(moved),
        "output layer": output,
        "cross-entropy": gpu.stream(
            LOSS_BYTES[training.cross_entropy] * rows * training.vocab_size
        ),
    }
    host = training.num_layers * gpu.host_seconds + dropped * gpu.host_seconds_dropping
    # While the GPU has enough to do, Python is ahead of it.
    seconds["waiting for launches"] = max(0.0, host - sum(seconds.values()))
    return {name: part / joined for name, part in seconds.items()}


def step(gpu: Gpu, training: Training, kept: int, joined: int = 1) -> dict[str, float]:
    """Return the seconds of a step, by what they go into."""
    one = micro_batch(gpu, training, kept, joined)
    seconds = {name: training.micro_batches * part for name, part in one.items()}
    updated = ADAM_BYTES * training.parameters / training.optimizer_shards
    return seconds | {"optimizer": gpu.stream(updated)}


@functools.cache
def seconds_of(gpu: Gpu, training: Training, kept: int, joined: int = 1) -> float:
    """Return the seconds of a step."""
    return sum(step(gpu, training, kept, joined).values())


def saved(
    gpu: Gpu,
    training: Training,
    weights: Iterable[tuple[int, float]],
    joined: Callable[[int], int] = lambda kept: 1,
) -> dict[str, Any]:
    """Return what is saved over a run, in theory and in time, each as a share of a dense one.

    Args:
        weights: (Kept length, its share of the samples).
        joined: Micro-batches that one pass takes at a kept length.

    Returns:
        "operations" and "time"; "realised" is the second as a share of the first, None if nothing
        is saved; "seconds", of the mean step.
    """
    s = training.seq_length
    dense, operations = seconds_of(gpu, training, s), training.operations(s)
    shares = list(weights)
    mean = sum(w * seconds_of(gpu, training, kept, joined(kept)) for kept, w in shares)
    in_theory = 1 - sum(w * training.operations(kept) for kept, w in shares) / operations
    in_time = 1 - mean / dense
    return {
        "operations": in_theory,
        "time": in_time,
        "realised": in_time / in_theory if in_theory else None,
        "seconds": mean,
    }
