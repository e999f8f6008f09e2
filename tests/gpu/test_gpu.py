"""The ops on every device here against plain indexing on the CPU, bit for bit.

On a machine with a GPU and kernels for it, tools/dev/gpu_check.sh runs these tests, with inputs
from a new seed each time; MEGATRON_RLTD_TEST_SEED repeats one. What no CPU has, streams and graphs,
is skipped without a GPU.

Shapes: s sequence length, b micro batch, h hidden size, k kept tokens, m those of the next layer.
"""

import contextlib
import os
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_rltd.model.block import BorrowedRows
from megatron_rltd.tokens import kernels, reference
from megatron_rltd.tokens.sampling import kept_indices
from tests.unit.op_cases import OPERATIONS, Case, check, compare, places, random_case

SEED = int(os.environ.get("MEGATRON_RLTD_TEST_SEED") or random.SystemRandom().randrange(2**31))
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8),
]
# s, b, h, k, m: odd widths, widths of each vector load, of more than a warp's, none and all kept.
SHAPES = [
    *((40, 3, 1, 20, 13), (17, 1, 3, 5, 17), (33, 4, 7, 33, 1), (64, 2, 33, 0, 9)),
    *((9, 5, 127, 4, 0), (128, 2, 300, 100, 90), (50, 3, 1023, 25, 25), (31, 2, 4097, 8, 30)),
    *((1, 1, 64, 1, 1), (96, 2, 2048, 48, 40), (12, 7, 5120, 6, 3), (3, 130, 8, 2, 1)),
]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=["kernels", "torch"])
def library(request):
    """The ops as they are dispatched, to compiled kernels if there are any, and in plain torch."""
    if request.param == "torch":
        return reference
    missing = kernels.missing_for("cuda")
    if HAS_GPU and missing:
        pytest.skip(f"kernels for GPUs: {missing}")
    return torch.ops.megatron_rltd


@contextlib.contextmanager
def no_synchronisation(device: torch.device):
    """Raise an error if anything waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill all that is allocated with NaN or 255, so that what is not written shows."""
    print(f"MEGATRON_RLTD_TEST_SEED={SEED}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


each_operation = pytest.mark.parametrize("name", OPERATIONS)


@each_operation
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(name, shape, library, device):
    number = SHAPES.index(shape)
    for dtype in DTYPES:
        check(name, library, random_case(shape, dtype, SEED + number).to(device))


LOOSE: dict[str, Callable[[Tensor], Tensor]] = {
    "samples first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of each row": lambda x: torch.cat([x, x], -1)[..., 1 : x.size(-1) + 1],
    "every second element": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one for all samples": lambda x: x[:, :1].expand(-1, x.size(1), -1),
    "misaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@each_operation
@pytest.mark.parametrize("kind", LOOSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_strides(name, kind, dtype, library, device):
    for number, shape in enumerate([(24, 3, 40, 10, 12), (10, 2, 33, 10, 3)]):
        case = random_case(shape, dtype, SEED + number).to(device)
        loosen = LOOSE[kind]
        indices = [torch.stack([i, i], 2)[..., 0] for i in (case.indices, case.next_indices)]
        mask = case.mask.transpose(0, 1).contiguous().transpose(0, 1)
        loose = Case(
            loosen(case.hidden), loosen(case.tokens), *indices, mask, case.layers, case.samples
        )
        check(name, library, loose)
        check(name, library, replace(loose, mask=case.mask[:1].expand(case.mask.shape)))


@pytest.mark.parametrize("length", [1, 255, 2048, 2049, 5000, 40_000])
@pytest.mark.parametrize("strata", [1, 4])
def test_samples(length, strata, library, device):
    random_ = random.Random(SEED)
    layers, samples = torch.tensor([1, 24]), torch.tensor([0, 2**31 + 3, 2**45 - 1])
    for kept in {0, 1, length // 2, length}:
        sizes = (length * strata, kept * strata, strata)
        seed = random_.randrange(-(2**63), 2**63)
        drawn = library.sample(seed, layers.to(device), samples.to(device), *sizes)
        assert torch.equal(drawn.cpu(), kept_indices(seed % 2**64, layers, samples, *sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_run_forward_and_backward(dtype, library, device):
    """A run of layers with poisoned buffers, against plain indexing and its gradients."""
    torch.use_deterministic_algorithms(False)  # whose index_copy_ is another one
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(50, 3, 40, generator=generator).to(device, dtype).requires_grad_()
    upstream = torch.randn(50, 3, 40, generator=generator).to(device, dtype)
    cases = [random_case((50, 3, 1, k, 0), dtype, SEED + k) for k in (20, 30, 50, 7)]
    sets = [case.indices.to(device) for case in cases]

    def by_run(hidden: Tensor) -> Tensor:
        borrowed = BorrowedRows(library)
        for number, indices in enumerate(sets):
            tokens = borrowed.borrow(hidden, indices)
            rows = reference.flat_rows(indices).long()
            borrowed._buffer.detach().view(-1, 40).index_fill_(0, rows, float("nan"))
            hidden = borrowed.give_back(tokens * (number - 1.5), last=number == len(sets) - 1)
        return hidden

    def by_indexing(hidden: Tensor) -> Tensor:
        for number, indices in enumerate(sets):
            rows = places(indices)
            hidden = hidden.index_put(rows, hidden[rows] * (number - 1.5))
        return hidden

    results = []
    for run in (by_run, by_indexing):
        with no_synchronisation(device) if run is by_run else contextlib.nullcontext():
            output = run(start)
            results.append((output, *torch.autograd.grad(output, start, upstream)))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


class FarCase(Case):
    """A case of hidden states too large to be copied; it is used once."""

    def buffer(self) -> Tensor:
        return self.hidden


@pytest.mark.parametrize("name", ["gather", "scatter", "split", "exchange", "merge"])
def test_offsets_beyond_32_bits(name, library, device):
    """The last rows lie 2^31 elements and more behind the first ones."""
    torch.use_deterministic_algorithms(False)  # all that memory need not be touched
    ends, batch, width = 4, 2, 2048
    length = 2**31 // (batch * width) + 2 * ends
    dtype = torch.uint8 if device.type == "cpu" else torch.bfloat16
    if device.type == "cpu" and name in ("scatter", "split"):
        pytest.skip("copies gigabytes on the CPU")
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    # A case of the first and the last rows only, and one in which they lie far apart.
    small = random_case((2 * ends, batch, width, 5, 6), dtype, SEED)
    rows = torch.cat([torch.arange(ends), torch.arange(length - ends, length)])
    hidden = torch.empty(length, batch, width, dtype=dtype, device=device)
    hidden[rows.to(device)] = small.hidden.to(device)
    sets = [rows[i.long()].to(device, torch.int32) for i in (small.indices, small.next_indices)]
    moved = small.to(device)
    far = FarCase(hidden, moved.tokens, *sets, moved.mask, moved.layers, moved.samples)
    assert hidden.numel() > 2**31
    results = OPERATIONS[name](library, far)
    near = [x[rows.to(device)] if x.size(0) == length else x for x in results]
    compare(name, tuple(near), small)
    if device.type == "cuda" and name in ("scatter", "split"):
        between = slice(ends, length - ends)
        copied, original = (x[between].view(torch.int16) for x in (results[-1], hidden))
        assert torch.equal(copied, original)


@needs_gpu
@each_operation
def test_current_stream(name, library):
    """On a stream whose inputs are not there yet when the op is called."""
    torch.use_deterministic_algorithms(False)
    case = random_case((64, 2, 300, 30, 40), torch.bfloat16, SEED).to(torch.device("cuda"))
    late = ("hidden", "tokens", "mask", "layers", "samples")
    waiting = replace(case, **{key: torch.zeros_like(getattr(case, key)) for key in late})
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for key in late:
            getattr(waiting, key).copy_(getattr(case, key))
        results = OPERATIONS[name](library, waiting)
    side.synchronize()
    compare(name, results, case)


@needs_gpu
@each_operation
def test_graph(name, library):
    """Captured once, replayed on other inputs."""
    torch.use_deterministic_algorithms(False)
    shape = (64, 2, 300, 30, 40)
    static = random_case(shape, torch.bfloat16, SEED).to(torch.device("cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        OPERATIONS[name](library, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = OPERATIONS[name](library, static)
    for number in (1, 2):
        case = random_case(shape, torch.bfloat16, SEED + number)
        for ours, theirs in zip(vars(static).values(), vars(case).values(), strict=True):
            ours.copy_(theirs)
        graph.replay()
        compare(name, results, case)


@needs_gpu
@each_operation
def test_no_synchronisation(name, library):
    torch.use_deterministic_algorithms(False)
    case = random_case((64, 2, 300, 30, 40), torch.bfloat16, SEED).to(torch.device("cuda"))
    with no_synchronisation(case.hidden.device):
        results = OPERATIONS[name](library, case)
    compare(name, results, case)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here")
@each_operation
def test_second_device(name, library):
    """While the first device is the current one."""
    with torch.cuda.device(0):
        check(name, library, random_case(SHAPES[2], torch.float32, SEED).to(torch.device("cuda:1")))
