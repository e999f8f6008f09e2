import random
import sys

import pytest
import torch

from megatron_rltd.config import RandomLTDConfig, RankConfigError
from megatron_rltd.model.block import BorrowedRows
from megatron_rltd.model.random_ltd import RandomLTD
from megatron_rltd.tokens import kernels, ops, reference
from megatron_rltd.tokens.sampling import kept_indices

SHAPES = [(5, 2, 3, 2), (7, 3, 4, 7), (4, 1, 2, 1), (6, 2, 5, 3), (3, 2, 4, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8]


CHOSEN = "auto"  # the backend of a test


@pytest.fixture(autouse=True, params=["auto", "torch"])
def backend(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CHOSEN", request.param)
    return request.param


def gather_tokens(*arguments):
    return ops.gather_tokens(*arguments, backend=CHOSEN)


def scatter_tokens(*arguments):
    return ops.scatter_tokens(*arguments, backend=CHOSEN)


def borrowed_rows():
    return BorrowedRows(ops.find_library(CHOSEN))


def random_indices(rows, batch, kept, generator):
    chosen = [torch.randperm(rows, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(chosen).to(torch.int32)


@pytest.fixture(params=SHAPES, ids=str)
def case(request):
    rows, batch, width, kept = request.param
    generator = torch.Generator().manual_seed(sum(request.param))
    hidden = torch.randn(rows, batch, width, generator=generator, dtype=torch.float64)
    tokens = torch.randn(kept, batch, width, generator=generator, dtype=torch.float64)
    return hidden, tokens, random_indices(rows, batch, kept, generator)


def by_hand(hidden, indices):
    """The kept rows, one by one."""
    batch, kept = indices.shape
    rows = [torch.stack([hidden[indices[j, i], j] for j in range(batch)]) for i in range(kept)]
    return torch.stack(rows) if rows else hidden[:0]


def scattered_by_hand(hidden, tokens, indices):
    result = hidden.clone()
    for j in range(indices.size(0)):
        for i in range(indices.size(1)):
            result[indices[j, i], j] = tokens[i, j]
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_scatter_copy_bit_for_bit(case, dtype):
    hidden, tokens, indices = case
    hidden, tokens = (hidden * 50).to(dtype), (tokens * 50).to(dtype)
    before = hidden.clone()
    assert torch.equal(gather_tokens(hidden, indices), by_hand(hidden, indices))
    expected = scattered_by_hand(hidden, tokens, indices)
    assert torch.equal(scatter_tokens(hidden, tokens, indices), expected)
    assert torch.equal(hidden, before)


def test_inputs_need_not_be_contiguous(case):
    hidden, tokens, indices = case
    loose = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(gather_tokens(loose, indices), by_hand(hidden, indices))
    expected = scattered_by_hand(hidden, tokens, indices)
    loose_tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(scatter_tokens(loose, loose_tokens, indices), expected)
    expanded = hidden[:1].expand(hidden.size(0), -1, -1)
    assert torch.equal(gather_tokens(expanded, indices), by_hand(expanded, indices))


def test_gradients_of_each_op_alone(case):
    hidden, tokens, indices = case
    if not tokens.numel():  # gradcheck wants an output
        assert gather_tokens(hidden, indices).shape == tokens.shape
        assert torch.equal(scatter_tokens(hidden, tokens, indices), hidden)
        return
    hidden.requires_grad_()
    tokens.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: gather_tokens(h, indices), hidden)
    assert torch.autograd.gradgradcheck(lambda h: gather_tokens(h, indices), hidden)
    assert torch.autograd.gradcheck(lambda h, t: scatter_tokens(h, t, indices), (hidden, tokens))
    assert torch.autograd.gradgradcheck(
        lambda h, t: scatter_tokens(h, t, indices), (hidden, tokens)
    )


def test_library_ops_pass_opcheck():
    generator = torch.Generator().manual_seed(0)
    hidden, tokens = torch.randn(5, 2, 3, generator=generator), torch.randn(2, 2, 3)
    indices = random_indices(5, 2, 2, generator)
    library = torch.ops.megatron_rltd
    torch.library.opcheck(library.gather, (hidden.requires_grad_(), indices))
    torch.library.opcheck(library.scatter, (hidden, tokens.requires_grad_(), indices))
    plain, rows = hidden.detach(), tokens.detach()
    # Rows that nobody may read differ from call to call; without any, outputs can be compared.
    some = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(library.split, (plain, indices), test_utils=some)
    exchanged = (plain.clone(), rows, indices, indices)
    torch.library.opcheck(library.exchange_, exchanged, test_utils=some)
    none = indices[:, :0]
    torch.library.opcheck(library.split, (plain, none))
    torch.library.opcheck(library.exchange_, (plain.clone(), rows, indices, none))
    torch.library.opcheck(library.merge_, (plain.clone(), rows, indices))
    numbers = torch.tensor([2, 3])
    torch.library.opcheck(library.sample, (7, numbers, numbers, 8, 4, 2))
    mask = torch.rand(2, 1, 5, 5, generator=generator) > 0.5
    torch.library.opcheck(library.select_mask, (mask, indices, indices))


def same_bytes(a, b):
    return a.shape == b.shape and torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))


MOVED = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("seed", range(12))
def test_library_ops_equal_the_reference_bit_for_bit(seed):
    """Random shapes, dtypes, strides and index sets: what a compiled implementation must equal."""
    random_ = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    library = torch.ops.megatron_rltd
    rows, batch = random_.randint(1, 40), random_.randint(1, 4)
    width = [1, 3, 8, 16, 33, 64, 1100][seed % 7]
    dtype = MOVED[seed % len(MOVED)]
    kept, next_kept = random_.randint(0, rows), random_.randint(0, rows)
    indices = random_indices(rows, batch, kept, generator)
    next_indices = random_indices(rows, batch, next_kept, generator)

    def values(*shape):
        return (torch.randn(*shape, generator=generator) * 20).to(dtype)

    hidden = [
        values(rows, batch, width),
        values(batch, rows, width).transpose(0, 1),
        values(rows, batch, 2 * width)[..., ::2],
        values(rows, 1, width).expand(-1, batch, -1),
    ][seed % 4]
    tokens = values(kept, batch, width)
    before = hidden.clone()
    assert same_bytes(library.gather(hidden, indices), reference.gather(hidden, indices))
    whole = reference.scatter(hidden, tokens, indices)
    assert same_bytes(library.scatter(hidden, tokens, indices), whole)
    moved, buffer = library.split(hidden, indices)
    assert same_bytes(moved, reference.gather(hidden, indices))
    poisoned = reference.flat_rows(indices).long()
    buffer.view(torch.uint8).view(rows * batch, -1)[poisoned] = 255
    following = library.exchange_(buffer, tokens, indices, next_indices)
    assert same_bytes(following, reference.gather(whole, next_indices))
    poisoned = reference.flat_rows(next_indices).long()
    buffer.view(torch.uint8).view(rows * batch, -1)[poisoned] = 255
    library.merge_(buffer, following, next_indices)
    assert same_bytes(buffer, whole)
    assert same_bytes(hidden, before)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 200, 2048, 2049, 4100])
@pytest.mark.parametrize("strata", [1, 3])
def test_library_samples_equal_the_reference(backend, length, strata):
    layers = torch.tensor([2, 23])
    samples = torch.tensor([2**32 - 1, 2**33 + 5])
    few = length > 100
    for seed in (2**63 + 9,) if few else (0, 2**64 - 1):
        for kept in {1, length // 3} if few else {0, 1, length // 3, length - 1, length}:
            arguments = (layers, samples, length * strata, kept * strata, strata)
            ours = ops.sample_positions(ops.find_library(backend), seed, *arguments)
            assert torch.equal(ours, kept_indices(seed, *arguments))


# Kernels store four columns at once where their number allows it, a thousand in a pass of a block.
@pytest.mark.parametrize("shape", [(9, 4, 7), (40, 30, 36), (1300, 5, 1284)], ids=str)
def test_library_selects_masks_as_the_reference(shape):
    length, *kept = shape
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 2, length, length, generator=generator) > 0.5
    rows, columns = (random_indices(length, 3, k, generator) for k in kept)
    loose = torch.cat([columns.new_zeros(1), columns.flatten()])[1:].view(columns.shape)
    library = torch.ops.megatron_rltd
    for part in (mask, mask[:, :, :1], mask[:1].expand(3, -1, -1, -1), mask[:, :1]):
        for index in (columns, loose):
            ours = library.select_mask(part, rows, index)
            assert torch.equal(ours, reference.select_mask(part, rows, index))
    by_hand = mask[2, 1][rows[2].long()][:, columns[2].long()]
    assert torch.equal(library.select_mask(mask, rows, columns)[2, 1], by_hand)


def test_library_ops_compile():
    hidden, tokens = torch.randn(5, 2, 3), torch.randn(2, 2, 3)
    indices = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)

    def both(hidden, tokens):
        return gather_tokens(hidden * 2, indices), scatter_tokens(hidden, tokens, indices)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(hidden, tokens), both(hidden, tokens), strict=True):
        assert torch.equal(a, b)


# A chain of layers, once through a run and once with plain indexing.


def plain_layer(hidden, indices, weight):
    index = indices.t().long()[..., None].expand(-1, -1, hidden.size(-1))
    tokens = hidden.gather(0, index)
    return hidden.scatter(0, index, some_layer(tokens, weight))


def some_layer(tokens, weight):
    mixed = torch.softmax(tokens.mean(0, keepdim=True) @ weight, -1)
    return tokens + torch.tanh(tokens @ weight) * mixed


def poison(buffer, indices):
    """Overwrite the rows that nobody may read, in place and unseen by autograd."""
    rows = reference.flat_rows(indices).long()
    buffer.detach().view(-1, buffer.size(-1))[rows] = float("nan")


def run_layers(hidden, index_sets, weights, poisoned=True):
    borrowed = borrowed_rows()
    for i, (indices, weight) in enumerate(zip(index_sets, weights, strict=True)):
        tokens = borrowed.borrow(hidden, indices)
        if poisoned:
            poison(borrowed._buffer, indices)
        last = i == len(index_sets) - 1
        hidden = borrowed.give_back(some_layer(tokens, weight), last)
    return hidden


@pytest.fixture(params=[(6, 2, 4, (3, 3, 3)), (5, 1, 3, (1, 4, 2, 5)), (4, 3, 2, (2,))], ids=str)
def chain(request):
    rows, batch, width, counts = request.param
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, batch, width, generator=generator, dtype=torch.float64)
    index_sets = [random_indices(rows, batch, k, generator) for k in counts]
    weights = [
        torch.randn(width, width, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in counts
    ]
    return hidden.requires_grad_(), index_sets, weights


def plain_chain(hidden, index_sets, weights):
    for indices, weight in zip(index_sets, weights, strict=True):
        hidden = plain_layer(hidden, indices, weight)
    return hidden


def gradients(output, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    kept = upstream.clone()
    result = torch.autograd.grad(output, inputs, upstream)
    assert torch.equal(upstream, kept), "a caller's gradient was written to"
    return result


def test_borrowed_rows_equal_plain_indexing_bit_for_bit(chain):
    hidden, index_sets, weights = chain
    before = hidden.detach().clone()
    ours, plain = run_layers(hidden, index_sets, weights), plain_chain(hidden, index_sets, weights)
    assert torch.equal(ours, plain)
    assert torch.equal(hidden, before)
    assert ours._base is None
    inputs = [hidden, *weights]
    for a, b in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        assert torch.equal(a, b)


def test_borrowed_rows_pass_gradcheck(chain):
    hidden, index_sets, weights = chain
    # gradcheck perturbs the same tensors again and again; poison would stay in them.
    assert torch.autograd.gradcheck(
        lambda h, *w: run_layers(h, index_sets, w, poisoned=False), (hidden, *weights)
    )


def test_rows_of_the_wrong_index_set_are_noticed(chain):
    hidden, index_sets, weights = chain
    wrong = index_sets[0].clone()
    free = sorted(set(range(hidden.size(0))) - set(wrong[0].tolist()))[0]
    wrong[0, 0] = free
    wrong = wrong.sort(1).values
    ours = run_layers(hidden, [wrong, *index_sets[1:]], weights)
    assert not torch.equal(ours, plain_chain(hidden, index_sets, weights))


def test_expanded_and_transposed_gradients(chain):
    hidden, index_sets, weights = chain
    inputs = [hidden, *weights]
    for reduce in (torch.sum, lambda h: h.transpose(0, 2).contiguous()[0].sum(), torch.mean):
        ours = torch.autograd.grad(reduce(run_layers(hidden, index_sets, weights)), inputs)
        plain = torch.autograd.grad(reduce(plain_chain(hidden, index_sets, weights)), inputs)
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b)


def test_other_consumers_of_the_hidden_states(chain):
    hidden, index_sets, weights = chain

    def loss(layers):
        start = hidden * 2
        middle = layers(start, index_sets, weights)
        # Consumers of the input and the output, made before and after the run.
        return (start * 3 + middle).sum() + (middle * middle).sum() + start.tanh().sum()

    ours = torch.autograd.grad(loss(run_layers), [hidden, *weights])
    plain = torch.autograd.grad(loss(plain_chain), [hidden, *weights])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_captured_gradients_of_the_output_stay_whole(chain):
    hidden, index_sets, weights = chain

    def captured(layers):
        start = hidden * 1
        output = layers(start, index_sets, weights)
        return torch.autograd.grad((output**2).sum(), [start, output])

    for a, b in zip(captured(run_layers), captured(plain_chain), strict=True):
        assert torch.equal(a, b)


def test_frozen_input_or_layers(chain):
    hidden, index_sets, weights = chain
    inputs = list(weights)
    ours = gradients(run_layers(hidden.detach(), index_sets, weights), inputs)
    plain = gradients(plain_chain(hidden.detach(), index_sets, weights), inputs)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a, b)
    frozen = [w.detach() for w in weights]
    ours = gradients(run_layers(hidden, index_sets, frozen), [hidden])
    plain = gradients(plain_chain(hidden, index_sets, frozen), [hidden])
    assert torch.equal(ours[0], plain[0])


def test_layers_that_stop_gradients(chain):
    hidden, index_sets, weights = chain

    def stopped(enter, leave, last_only):
        state = hidden * 1
        for i, (indices, weight) in enumerate(zip(index_sets, weights, strict=True)):
            tokens = enter(state, indices)
            out = some_layer(tokens, weight)
            out = out.detach() if i == 0 or not last_only else out
            state = leave(state, out, indices, i == len(index_sets) - 1)
        return state

    borrowed = borrowed_rows()
    for last_only in (True, False):
        ours = stopped(
            borrowed.borrow, lambda _, out, __, last: borrowed.give_back(out, last), last_only
        )
        plain = stopped(gather_tokens, lambda h, out, i, _: scatter_tokens(h, out, i), last_only)
        assert torch.equal(ours, plain)
        assert torch.equal(gradients(ours, [hidden])[0], gradients(plain, [hidden])[0])


def test_without_gradients(chain):
    hidden, index_sets, weights = chain
    plain = plain_chain(hidden, index_sets, weights).detach()
    with torch.no_grad():
        assert torch.equal(run_layers(hidden, index_sets, weights), plain)
    with torch.inference_mode():
        assert torch.equal(run_layers(hidden.detach(), index_sets, weights, False), plain)


def test_double_backward_is_an_error(chain):
    hidden, index_sets, weights = chain
    output = run_layers(hidden, index_sets, weights, poisoned=False)
    (grad,) = torch.autograd.grad((output**2).sum(), [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_replaced_buffer_is_an_error(chain):
    hidden, index_sets, weights = chain
    borrowed = borrowed_rows()
    state = borrowed.give_back(
        some_layer(borrowed.borrow(hidden, index_sets[0]), weights[0]), last=False
    )
    with pytest.raises(RuntimeError, match="replaced the hidden states.*--random-ltd-layers"):
        borrowed.borrow(state * 1, index_sets[-1])


def test_only_indices_are_saved_for_backward(chain):
    hidden, index_sets, weights = chain
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        borrowed, state = borrowed_rows(), hidden
        for i, indices in enumerate(index_sets):
            tokens = borrowed.borrow(state, indices)
            state = borrowed.give_back(tokens, last=i == len(index_sets) - 1)
    assert saved
    assert {t.dtype for t in saved} == {torch.int32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t, i: (h[0], t, i), r"hidden_states must be \[s, b, h\]"),
        (lambda h, t, i: (h, t, i[:1]), r"indices must be \[b, k\] with b = 2"),
        (lambda h, t, i: (h, t, i.repeat(1, 9)), r"k <= 5"),
        (lambda h, t, i: (h, t, i.long()), "indices must be int32"),
        (lambda h, t, i: (h, t[:1], i), r"tokens must be \[k, b, h\] = \[2, 2, 3\]"),
        (lambda h, t, i: (h, t.float(), i), "tokens are torch.float32"),
        (lambda h, t, i: (h, t, i.to("meta")), "indices on meta"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    hidden, tokens = torch.zeros(5, 2, 3).double(), torch.zeros(2, 2, 3).double()
    indices = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        scatter_tokens(*change(hidden, tokens, indices))


def test_unknown_backend():
    with pytest.raises(ValueError, match="'fast' must be one of auto, cuda, torch"):
        ops.find_library("fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be kernels for a GPU")
def test_kernels_that_are_not_there(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: "not built")
    with pytest.raises(ValueError, match="the kernels are not built"):
        ops.find_library("cuda")
    message = (
        "--random-ltd-backend cuda: the kernels are not built; or use --random-ltd-backend auto"
    )
    # One node's kernels may be missing: that rank must say so.
    with pytest.raises(RankConfigError, match=message):
        RandomLTD(RandomLTDConfig(ramp_iters=9, backend="cuda"))


class _OwnOps(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the ops of our library, which compiled kernels implement."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "megatron_rltd"
        return function(*args, **(kwargs or {}))


def test_plain_torch_calls_no_kernel(backend):
    hidden, tokens = (torch.ones(n, 2, 3, requires_grad=True) for n in (5, 2))
    indices = torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)
    with _OwnOps() as own:
        kept = gather_tokens(hidden, indices)
        scatter_tokens(hidden, tokens * kept, indices).sum().backward()
    assert (own.count == 0) == (backend == "torch")
