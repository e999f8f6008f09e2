"""The study of Early-Bird tickets: how it draws, cuts, goes on, and shares its cores.

Breaking any of it makes arms differ in something else than what is asked.
"""

import sys

import pytest
import torch

from tests.benchmarks.test_early_bird_study import TINY
from tests.parallel import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from early_bird import arms, study


@pytest.fixture(scope="module")
def training():
    from early_bird import training
    from lib import small_models

    with small_models.megatron():
        yield training
    # Other tests of this process begin without the adapter.
    if not torch.cuda.is_available():
        small_models.ADAPTED.revert()


@pytest.fixture
def texts(training):
    numbers = torch.randint(2048, (2000,), generator=torch.Generator().manual_seed(1))
    own = training.Texts(numbers, [numbers[:100], numbers[100:200]])
    return {arms.PRETRAINING: own, arms.TUNING: own}


def seed_of(training, texts, folder, size=TINY):
    return training.Seed(size, 3, texts, folder / "dense.pt")


@pytest.mark.parametrize("units", [arms.NORM, arms.RANDOM, arms.LARGEST_REMOVED])
def test_a_ticket_is_the_dense_model_with_zeroed_columns(training, texts, tmp_path, units):
    from early_bird import tickets

    from megatron_rltd.early_bird.units import FFN, HEADS

    dense = seed_of(training, texts, tmp_path).at_draw(arms.ARMS["ticket"])
    model = training.model_of(dense, TINY)
    mask = tickets.choose(units, model, dense.step, TINY, 3)
    ticket = training.model_of(tickets.cut(dense, mask, TINY), TINY).double()
    model.double()
    head = TINY.dense().kv_channels
    with torch.no_grad():
        for number, layer in enumerate(model.decoder.layers, start=1):
            pruned = mask.of_layer(HEADS, number)
            assert pruned.sum() == TINY.heads - TINY.kept_heads
            layer.self_attention.linear_proj.weight[:, pruned.repeat_interleave(head)] = 0
            layer.mlp.linear_fc2.weight[:, mask.of_layer(FFN, number)] = 0
        own = texts[arms.PRETRAINING].train[:51].view(3, 17)
        ids, positions = own[:, :-1], torch.arange(16).expand(3, -1)
        # Megatron's own loss is in float32.
        ours, theirs = (
            torch.nn.functional.cross_entropy(
                m(ids, positions, None).flatten(0, 1), own[:, 1:].flatten(), reduction="none"
            )
            for m in (ticket, model)
        )
    assert ours.dtype == torch.float64
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_choices(training, texts, tmp_path):
    from early_bird import tickets

    from megatron_rltd.early_bird.model import layers_of
    from megatron_rltd.early_bird.units import importance

    model = training.model_of(seed_of(training, texts, tmp_path).at_draw(arms.ARMS["ticket"]), TINY)
    units = (arms.NORM, arms.LARGEST_REMOVED, arms.RANDOM)
    least, most, drawn = (tickets.choose(each, model, 4, TINY, 3) for each in units)
    other = tickets.choose(arms.RANDOM, model, 4, TINY, 4)
    for number, weights in layers_of(model).items():
        for kind, values in importance(weights, TINY.dense()).items():
            pruned, removed = least.of_layer(kind, number), most.of_layer(kind, number)
            assert values[pruned].max() < values[~pruned].min()
            assert values[removed].min() > values[~removed].max()
            assert pruned.sum() == removed.sum() == drawn.of_layer(kind, number).sum()
            assert not torch.equal(drawn.of_layer(kind, number), other.of_layer(kind, number))


def test_a_ticket_carries_the_moments_of_what_it_keeps(training, texts, tmp_path):
    from early_bird import tickets

    from megatron_rltd.early_bird.units import FFN, HEADS

    seed = seed_of(training, texts, tmp_path)
    dense, ticket = seed.at_draw(arms.ARMS["ticket"]), seed.drawn(arms.ARMS["ticket"])
    mask = tickets.choose(arms.NORM, training.model_of(dense, TINY), 4, TINY, 3)
    head = TINY.dense().kv_channels
    for number in range(1, TINY.num_layers + 1):
        heads, neurons = ~mask.of_layer(HEADS, number), ~mask.of_layer(FFN, number)
        columns, rows = heads.repeat_interleave(head), heads.repeat_interleave(3 * head)
        parts = {
            "self_attention.linear_qkv.weight": lambda m, r=rows: m[r],
            "self_attention.linear_qkv.bias": lambda m, r=rows: m[r],
            "self_attention.linear_proj.weight": lambda m, c=columns: m[:, c],
            "self_attention.linear_proj.bias": lambda m: m,
            "mlp.linear_fc1.weight": lambda m, n=neurons: m[n],
            "mlp.linear_fc2.weight": lambda m, n=neurons: m[:, n],
        }
        for name, part in parts.items():
            name = f"decoder.layers.{number - 1}.{name}"
            for key in ("exp_avg", "exp_avg_sq"):
                whole = dense.moments[name][key]
                assert whole.any()
                assert torch.equal(ticket.moments[name][key], part(whole))
            assert ticket.moments[name]["step"] == dense.step == ticket.step == 4
    assert seed.drawn(arms.ARMS["ticket-reset"]).moments == {}
    # Rewound: the same choice, but the weights and moments of step 1.
    rewound = seed.drawn(arms.ARMS["rewind-long"])
    assert rewound.step == 1 and rewound.moments["output_layer.weight"]["step"] == 1


def test_a_state_goes_on_as_if_it_had_not_stopped(training, texts, tmp_path):
    seed = seed_of(training, texts, tmp_path)
    whole = seed.train(arms.ARMS["dense"])
    stopped = seed.at_draw(arms.ARMS["unstructured"])  # the same schedule
    assert stopped.step == 4
    again = seed.run(arms.ARMS["dense"]).train(stopped, TINY.steps)
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)
    assert not torch.equal(
        whole.weights["output_layer.weight"], stopped.weights["output_layer.weight"]
    )


@pytest.mark.parametrize("name", ["unstructured", "unstructured-random", "2:4"])
def test_masks_of_weights_are_enforced(training, texts, tmp_path, name):
    seed = seed_of(training, texts, tmp_path)
    trained = seed.train(arms.ARMS[name])
    for layer in range(TINY.num_layers):
        weight = trained.weights[f"decoder.layers.{layer}.mlp.linear_fc1.weight"]
        assert (weight == 0).float().mean() == 0.5
        fours = (weight == 0).view(-1, 4).sum(1)
        assert bool((fours == 2).all()) == (name == "2:4")


def test_a_seed_of_another_process_is_left_to_it(tmp_path, training, texts, monkeypatch, capsys):
    monkeypatch.setattr(training, "read_texts", lambda folder: texts)
    monkeypatch.setattr(study, "size_of", lambda options: TINY)
    words = ["--folder", str(tmp_path), "--seeds", "1", "--arms", "dense"]
    options = study.parse_args(words)

    def train_one(*_):
        study.train_all(options)  # as another process would, meanwhile
        return {"run": {"validation_loss": 1.0}}

    monkeypatch.setattr(study, "train_one", train_one)
    study.train_all(options)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "seed 1: another process trains it"
    assert said[1].startswith("[1/1] seed 1 dense: validation loss 1.0000")
