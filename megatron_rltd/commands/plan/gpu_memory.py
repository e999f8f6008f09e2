"""How much memory a step of training takes on a GPU, at least: a sum of what must be there at once.

Pure Python. docs/planning.md says what it leaves out.
"""

from collections.abc import Callable, Iterable

from megatron_rltd.commands.plan.gpu_time import Training

# What a logit holds when the backward pass begins, in bytes: logits, probabilities, gradients.
LOGIT_BYTES = {"unfused": 12, "native": 12, "te": 4}


def memory(training: Training, kept: int, joined: int = 1) -> dict[str, float]:
    """Return the bytes of a GPU at the start of a backward pass, by what they hold.

    Without what libraries take and what lies unused between tensors.
    """
    samples, s = joined * training.micro_batch_size, training.seq_length
    h, q, kv, mlp = (
        training.hidden_size,
        training.query_size,
        training.key_value_size,
        training.mlp_size,
    )
    # In bfloat16: inputs of both norms and of all four matrices, queries, keys and values, what
    # goes into the activation; and a byte for each element that dropout may drop, twice h.
    row = 2 * (4 * h + 2 * q + 2 * kv + mlp * (3 if training.is_gated else 2)) + 2 * h
    rows = training.layer_tokens(kept) * samples
    stored = row * rows
    if training.recomputes:
        stored = 2 * h * rows + row * s * samples
    return {
        "parameters": training.parameters * (2 + 4 + 12 / training.optimizer_shards),
        "activations": stored,
        "logits": LOGIT_BYTES[training.cross_entropy] * samples * s * training.vocab_size,
    }


def peak_memory(
    training: Training, lengths: Iterable[int], joined: Callable[[int], int] = lambda kept: 1
) -> float:
    """Return the bytes of the step that needs most: a dense one, or one with more samples.

    Args:
        lengths: The kept ones.
        joined: Micro-batches that one pass takes at a kept length.
    """
    cases = [(training.seq_length, 1), *((kept, joined(kept)) for kept in lengths)]
    return max(sum(memory(training, *case).values()) for case in cases)
