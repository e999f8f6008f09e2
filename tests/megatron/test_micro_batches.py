"""Several micro-batches of a step in one pass, against each in a pass of its own."""

import functools

import pytest
import torch
from torch import Tensor

from megatron_rltd import RandomLTD, RandomLTDConfig, join_micro_batches
from megatron_rltd.config import ConfigError
from megatron_rltd.model.micro_batches import _join_packed
from megatron_rltd.resolved_config import ModelFacts, resolve
from megatron_rltd.training.preflight import largest_steps
from tests import gpt
from tests.parallel import train

S, L = 2048, 24  # of the paper's 1.3B


def resolved(model=None, **options):
    config = {"min_tokens": 128, "ramp_iters": 1000, "grow_micro_batch": 8, **options}
    return resolve(
        RandomLTDConfig(**config), ModelFacts(seq_length=S, num_layers=L, **(model or {}))
    )


@pytest.mark.parametrize(
    ("kept", "micro_batches", "options", "model", "expected"),
    [
        (128, 64, {}, {}, 4),  # 2 * 2048 + 22 * 128 tokens of 24 * 2048: 7.1 fit
        (64, 64, {}, {}, 8),
        (768, 64, {}, {}, 2),
        (944, 64, {}, {}, 1),  # 2.01 times 24,864 is more than 49,152
        (128, 64, {"grow_micro_batch": 3}, {}, 2),
        (128, 64, {"grow_micro_batch": 1}, {}, 1),
        (128, 6, {}, {}, 2),  # 4 does not divide 6
        (128, 7, {}, {}, 1),
        (128, 2, {}, {}, 2),
        (128, 8, {}, {"pipeline_parallel_size": 4}, 2),
        (128, 8, {"grow_min_micro_batches": 1}, {"pipeline_parallel_size": 4}, 4),
        (128, 8, {"grow_min_micro_batches": 8}, {}, 1),
        # Interleaved stages: rows of 4, of which a last one of 2 is too short for 4 stages.
        (128, 12, {}, {"pipeline_parallel_size": 4, "passes_of_chunk": 4}, 1),
        (128, 16, {}, {"pipeline_parallel_size": 4, "passes_of_chunk": 4}, 4),
        (
            *(128, 8, {"grow_min_micro_batches": 1}),
            *({"pipeline_parallel_size": 4, "passes_of_chunk": 4}, 2),
        ),
    ],
)
def test_micro_batches_of_a_pass(kept, micro_batches, options, model, expected):
    ours = resolved(model, **options)
    assert ours.micro_batches_per_pass(kept, micro_batches) == expected
    assert ours.micro_batches_per_pass(S, micro_batches) == 1


def test_micro_batches_of_the_whole_ramp():
    # docs/schedule.md has these
    assert resolved().joined_micro_batches(64) == [(128, 4), (384, 2), (944, 1)]


def test_numbers_that_make_no_sense():
    with pytest.raises(ConfigError, match="--random-ltd-grow-micro-batch 0 must be positive"):
        resolved(grow_micro_batch=0)
    with pytest.raises(ConfigError, match="--random-ltd-grow-min-micro-batches -1 must be"):
        resolved(grow_min_micro_batches=-1)


def test_preflight_runs_the_largest_step_of_each_size():
    ours = resolved(min_tokens=64, increment=64)
    kept = [k for k, _ in largest_steps(ours, 64)]
    assert kept == [64, 320, 896, 1984, 2048]
    assert [ours.micro_batches_per_pass(k, 64) for k in kept] == [8, 4, 2, 1, 1]
    assert [k for k, _ in largest_steps(resolved(grow_micro_batch=1), 64)] == [2032, 2048]


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with gpt.one_process():
        yield


MICRO_BATCHES = 8


def data() -> list[dict[str, Tensor]]:
    """Return micro-batches of different tokens and, by design, different numbers of them."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for index in range(MICRO_BATCHES):
        tokens = torch.randint(gpt.VOCAB, (gpt.BATCH, gpt.SEQ + 1), generator=generator)
        mask = (torch.rand(gpt.BATCH, gpt.SEQ, generator=generator) < 0.1 * (index + 1)).double()
        if index == 3:
            mask.zero_()
        found.append({"tokens": tokens, "loss_mask": mask})
    return found


def forward_step(iterator, model, way="sum", attention_mask=None, packed=None):
    batch = next(iterator)
    positions = torch.arange(gpt.SEQ).expand(gpt.BATCH, -1)
    tokens, labels, mask = batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch["loss_mask"]
    more = {}
    if packed is not None:
        tokens, labels, positions, mask = (
            x.reshape(1, -1) for x in (tokens, labels, positions, mask)
        )
        more["packed_seq_params"] = packed
    output = model(tokens, positions, attention_mask, **more)

    def loss_func(logits):
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none"
        )
        loss, count = (losses * mask.flatten()).sum(), mask.sum().to(torch.int)
        if way == "mean":
            loss = loss / count.clamp(min=1)
            return loss, {"loss": loss.detach().clone()}  # Megatron divides the loss itself
        return loss, count, {"loss": torch.stack([loss.detach(), count])}

    return output, loss_func


def step(limit, forward=forward_step, rotary="rope", is_packed=False, config=None, **options):
    """Return what a training step reports in all, its gradients, and the sizes of its passes."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    settings = {"min_tokens": 2, "constant": True, "increment": 1, "layers": "1-6"}
    settings |= {"grow_micro_batch": limit, **(config or {})}
    model = gpt.build(rotary, **options)
    random_ltd = RandomLTD(RandomLTDConfig(**settings)).attach(model)
    sizes = []
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["hidden_states"].shape[:2])),
        with_kwargs=True,
    )
    random_ltd.begin_step(0, 1000)
    reports = join_micro_batches(get_forward_backward_func(), random_ltd, is_packed)(
        forward_step_func=_numbered(forward, random_ltd),
        data_iterator=iter(data()),
        model=model,
        num_microbatches=MICRO_BATCHES,
        seq_length=gpt.SEQ,
        micro_batch_size=gpt.BATCH,
        forward_only=False,
    )
    random_ltd.end_step()
    values = torch.stack([report["loss"].reshape(-1).double() for report in reports])
    value = values.sum(0) if values.size(1) == 2 else values.mean(0)
    return value, [p.grad for p in model.parameters()], sizes


def _numbered(forward, random_ltd):
    # Outside of Megatron's training loop its schedules number the layers' micro-batches.
    @functools.wraps(forward)
    def forward_step(iterator, model):
        random_ltd.begin_micro_batch(model.decoder.layers[0].current_microbatch)
        return forward(iterator, model)

    return forward_step


def assert_equal_steps(ours, theirs) -> None:
    assert ours[2] != theirs[2], "nothing was joined"
    for a, b in zip([ours[0], *ours[1]], [theirs[0], *theirs[1]], strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("limit", [2, 4, 8])
@pytest.mark.parametrize("way", ["sum", "mean", "per token"])
def test_losses_and_gradients_are_those_of_each_micro_batch(way, limit):
    """Of micro-batches with different numbers of tokens, one of them without any."""
    forward = functools.partial(forward_step, way=way)
    options = {"calculate_per_token_loss": way == "per token"}
    ours, theirs = (step(n, forward, **options) for n in (limit, 1))
    assert_equal_steps(ours, theirs)
    assert theirs[2] == [(gpt.SEQ, gpt.BATCH)] * MICRO_BATCHES
    assert ours[2] == [(gpt.SEQ, gpt.BATCH * limit)] * (MICRO_BATCHES // limit)


@pytest.mark.parametrize("samples", [1, gpt.BATCH])
def test_masks(samples):
    forward = functools.partial(forward_step, attention_mask=gpt.document_mask()[:samples])
    assert_equal_steps(*(step(n, forward, rotary=None) for n in (4, 1)))


def test_masks_of_their_own():
    masks = iter([*(gpt.document_mask().roll(i, 0) for i in range(MICRO_BATCHES))] * 2)

    def forward(iterator, model):
        return forward_step(iterator, model, attention_mask=next(masks)[:1])

    assert_equal_steps(*(step(n, forward) for n in (4, 1)))


def test_packed_sequences():
    from tests.megatron.test_packed import packed

    def forward(iterator, model):
        return forward_step(iterator, model, packed=packed())

    ours, theirs = (step(n, forward, is_packed=True) for n in (4, 1))
    assert_equal_steps(ours, theirs)
    assert ours[2][0] == (gpt.SEQ * gpt.BATCH * 4, 1)
    with pytest.raises(RuntimeError, match="without is_packed=True"):
        step(4, forward)


def test_documents_keep_numbers_of_their_own():
    from tests.megatron.test_packed import T, packed

    if "seq_idx" not in vars(packed()):
        pytest.skip("this Megatron numbers no documents")
    params = [packed(total_tokens=T), packed([0, 7, T], total_tokens=T)]
    joined = _join_packed(params, T)
    assert joined.total_tokens == 2 * T
    numbers = torch.cat([params[0].seq_idx, params[1].seq_idx + 100], dim=1)
    assert torch.equal(joined.seq_idx.diff() != 0, numbers.diff() != 0)
    assert joined.cu_seqlens_q.tolist() == [*params[0].cu_seqlens_q.tolist(), T + 7, 2 * T]
    same = packed()
    same.cu_seqlens_q_padded = same.cu_seqlens_kv_padded = same.cu_seqlens_q
    joined = _join_packed([same, same], T)
    assert joined.cu_seqlens_q_padded is joined.cu_seqlens_q is joined.cu_seqlens_kv


def test_samples_that_share_their_tokens():
    config = {"shared_indices": True}
    assert_equal_steps(*(step(n, config=config) for n in (4, 1)))


def test_recomputation():
    options = {"recompute_granularity": "full", "recompute_method": "uniform"}
    assert_equal_steps(*(step(n, recompute_num_layers=2, **options) for n in (4, 1)))


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss", "z loss"])
def test_experts_are_balanced_over_each_micro_batch(kind):
    from megatron_rltd.model.routers import auxiliary_losses

    options = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "moe_router_dtype": "fp64",
    }
    if kind == "z loss":
        options["moe_z_loss_coeff"] = 0.1
    else:
        options |= {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 10.0}
    results, logged = [], []
    for limit in (4, 1):
        for values in auxiliary_losses().values():
            values.zero_()
        results.append(step(limit, **options))
        logged.append({name: values.clone() for name, values in auxiliary_losses().items()})
    assert_equal_steps(*results)
    assert any(values.any() for values in logged[0].values())
    for name, values in logged[0].items():
        torch.testing.assert_close(values, logged[1][name], rtol=1e-6, atol=0)


def test_evaluation_is_untouched():
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = gpt.build()
    config = RandomLTDConfig(min_tokens=2, constant=True, layers="1-6", grow_micro_batch=8)
    random_ltd = RandomLTD(config).attach(model.eval())
    random_ltd.begin_step(0, 0)
    reports = join_micro_batches(get_forward_backward_func(), random_ltd)(
        forward_step_func=forward_step,
        data_iterator=iter(data()),
        model=model,
        num_microbatches=4,
        seq_length=gpt.SEQ,
        micro_batch_size=gpt.BATCH,
        forward_only=True,
    )
    assert len(reports) == 4


def _uses_output(iterator, model):
    output, loss = forward_step(iterator, model)
    return output * 2, loss


def _calls_twice(iterator, model):
    forward_step(iterator, model)
    return forward_step(iterator, model)


def _numbers_its_calls(iterator, model):
    batch = next(iterator)
    return model(batch["tokens"], batch["loss_mask"].sum()), None


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (_uses_output, "uses the model's output before it returns it"),
        (_calls_twice, "does not return the output of one model call"),
        (_numbers_its_calls, "passes the model its argument 2, which cannot be laid end to end"),
    ],
)
def test_forward_steps_that_cannot_be_joined(forward, message):
    with pytest.raises(RuntimeError, match=f"--random-ltd-grow-micro-batch.*{message}: omit"):
        step(4, forward)


MODEL = (
    "--num-layers 6 --hidden-size 32 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --position-embedding-type rope --attention-dropout 0 "
    "--hidden-dropout 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 "
    "--make-vocab-size-divisible-by 8 --split 90,5,5 --num-workers 0 "
    "--no-create-attention-mask-in-dataloader --micro-batch-size 1 --global-batch-size 16 "
    "--train-iters 6 --lr 3e-3 --lr-decay-style constant --log-interval 1 --eval-interval 3 "
    "--eval-iters 1 --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"
)
LTD = (
    "--random-ltd --random-ltd-min-tokens 8 --random-ltd-ramp-iters 8 --random-ltd-increment 8 "
    "--random-ltd-strata 8 --random-ltd-layers 1-6"
)
GROW = "--random-ltd-grow-micro-batch 8"
LAYOUT = (
    "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
    "--num-layers-per-virtual-pipeline-stage 1"
)


@pytest.mark.thorough
def test_through_megatrons_loop(tmp_path):
    """Growth, saved in the middle of the ramp and continued on stages and slices of it."""
    alone = train(f"{MODEL} {LTD}")
    ours = train(f"{MODEL} {LTD} {GROW} --random-ltd-preflight --save {tmp_path} --save-interval 3")
    assert "8 from 8 kept tokens, 4 from 16 kept tokens" in ours.output
    assert "random-ltd micro-batches per pass: 8.000000E+00" in ours.output
    assert "preflight with 8, 16, 32, 56 and 64 kept tokens passed" in ours.output
    close = functools.partial(pytest.approx, rel=1e-6)
    assert ours.losses == close(alone.losses)
    assert ours.validation == close(alone.validation)
    assert ours.grad_norms == pytest.approx(alone.grad_norms, rel=1e-5)
    assert ours.layer_tokens == alone.layer_tokens
    ranks = train(f"{MODEL} {LTD} {GROW} --use-distributed-optimizer --overlap-grad-reduce", 2)
    assert "(8 in a step): 8 from 8" in ranks.output
    assert ranks.losses == close(alone.losses)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    rest = train(f"{MODEL} {LTD} --random-ltd-grow-micro-batch 4 --load {tmp_path} {LAYOUT}", 4)
    assert rest.losses == close(alone.losses[3:])
    assert "(16 in a step): 4 from 8" in rest.output
