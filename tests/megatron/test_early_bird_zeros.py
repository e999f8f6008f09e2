"""Weights that a ticket sets to zero, and that stay there while Megatron trains, on any layout."""

import re

import pytest
import torch

from megatron_rltd.early_bird.units import MATRICES
from tests.megatron.test_training import BASE, LTD
from tests.parallel import RankError, train
from tests.tools.test_draw_ticket import DISTRIBUTED, FORMAT, LLAMA, contents, draw, draw_ticket

KEEP = "--early-bird-keep-zeros"
RATIO = 0.4
RUN = f"{BASE} {FORMAT} --weight-decay 0.1"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
VPP = "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
OVERLAP = f"{DISTRIBUTED} --overlap-grad-reduce --overlap-param-gather"
SAVED = "--save-interval 2 --exit-interval 2"


# Checkpoints of every kind of Megatron's optimizers.
DENSE = {
    "fp32": DISTRIBUTED,
    "bf16": f"--bf16 {LLAMA} {DISTRIBUTED}",
    "plain fp32": "",
    "plain bf16": f"--bf16 {LLAMA}",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """{kind: the --save folder of a dense run of 2 iterations out of 6}."""
    folders = {}
    for number, (name, flags) in enumerate(DENSE.items()):
        folders[name] = tmp_path_factory.mktemp("dense") / str(number)
        train(f"{RUN} {flags} {SAVED} --save {folders[name]}")
    return folders


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    """{(kind, pattern): the folder of a ticket}."""
    folder = tmp_path_factory.mktemp("sparse")
    patterns = {"unstructured": ("--ratio", RATIO), "2:4": ()}
    drawn = {}
    for name, load in dense.items():
        for pattern, options in patterns.items():
            save = folder / str(len(drawn))
            drawn[name, pattern] = draw(load, save, "--pattern", pattern, *options)
    return drawn


def is_matrix(name):
    return re.search(rf"layers\..*\.({'|'.join(MATRICES)})\.weight$", name) is not None


def is_moment(name):
    return ".exp_avg" in name


def zeros_of(tensors):
    """Return {name: mask} of all layers' matrices, of the model and the main parameters."""
    return {n: t == 0 for n, t in tensors.items() if is_matrix(n) and not is_moment(n)}


@pytest.mark.parametrize("kind", DENSE)
def test_the_smallest_weights_are_zero_and_the_rest_is_kept(dense, sparse, kind):
    before, common = contents(dense[kind], 2)
    after, ours = contents(sparse[kind, "unstructured"], 2)
    assert before.keys() == after.keys()
    names = [name for name in before if is_matrix(name) and not is_moment(name)]
    # The main parameters, too, where there are any.
    assert len(names) == len(MATRICES) * (1 if kind == "plain fp32" else 2)
    for name, tensor in before.items():
        if name not in names:
            assert torch.equal(after[name], tensor), name
            continue
        model = before[name[name.index("decoder.") :]]
        for layer, weights in enumerate(tensor):
            magnitudes = model[layer].abs()
            pruned = after[name][layer] == 0
            assert torch.equal(after[name][layer], weights.masked_fill(pruned, 0))
            assert pruned.sum() <= RATIO * pruned.numel()
            assert magnitudes[pruned].max() < magnitudes[~pruned].min()
            # One more magnitude would be too many.
            more = (magnitudes <= magnitudes[~pruned].min()).sum()
            assert more > RATIO * pruned.numel()
    args, theirs = vars(ours.pop("args")), vars(common.pop("args"))
    assert str(ours) == str(common)
    changed = {key for key in args if key not in theirs or args[key] != theirs[key]}
    assert changed <= {"early_bird", "early_bird_emerged", "early_bird_ticket"}


def test_two_of_four(dense, sparse):
    before, after = contents(dense["fp32"], 2)[0], contents(sparse["fp32", "2:4"], 2)[0]
    for name, zeros in zeros_of(after).items():
        assert (zeros.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
        lost = before[name].masked_fill(~zeros, 0).abs().unflatten(-1, (-1, 4)).amax(-1)
        left = before[name].masked_fill(zeros, torch.inf).abs().unflatten(-1, (-1, 4)).amin(-1)
        assert (lost <= left).all()


def test_random_weights_are_the_control(dense, tmp_path, capsys):
    options = ("--pattern", "unstructured", "--ratio", RATIO, "--signal", "random")
    drawn = draw(dense["fp32"], tmp_path / "a", *options)
    printed = capsys.readouterr().out
    assert re.search(r"39\.9\d% of the weights of 4 layers are zero \(unstructured\)", printed)
    assert "--pattern unstructured --ratio 0.4 --signal random --seed 2" in printed
    assert "from scratch" not in printed
    again = draw(dense["fp32"], tmp_path / "b", *options, "--seed", 1, "--reset-optimizer")
    # What is printed is another ticket, but for the choice as this one.
    assert "--reset-optimizer --signal random --seed 2" in capsys.readouterr().out
    other = draw(dense["fp32"], tmp_path / "c", *options, "--seed", 2)
    one, same, another = (zeros_of(contents(f, 2)[0]) for f in (drawn, again, other))
    for name, zeros in one.items():
        assert torch.equal(zeros, same[name])
        assert not torch.equal(zeros, another[name])
        assert abs(zeros.double().mean() - RATIO) < 0.001
        assert not torch.equal(zeros[0], zeros[1])


TP2_PP2 = f"{TP2} --pipeline-model-parallel-size 2"


def test_fewer_zeros_than_there_are(sparse, tmp_path, capsys):
    arguments = ["--load", sparse["fp32", "2:4"], "--save", tmp_path / "ticket"]
    arguments += ["--pattern", "unstructured", "--ratio", RATIO]
    assert draw_ticket.main([str(a) for a in arguments]) == 2
    assert "--ratio 0.4 prunes no weight, because more than that is zero" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# name: (kind, ranks, flags)
LAYOUTS = {
    "one": ("plain fp32", 1, ""),
    "bf16, DP, distributed": ("bf16", 2, f"--bf16 {LLAMA} {OVERLAP}"),
    "bf16, TP, PP": ("plain bf16", 4, f"--bf16 {LLAMA} {TP2_PP2}"),
    "TP, distributed": ("fp32", 2, f"{DISTRIBUTED} {TP2}"),
    "bf16, PP, distributed": ("bf16", 4, f"--bf16 {LLAMA} {OVERLAP} {VPP}"),
}
THOROUGH = ("TP, distributed", "bf16, PP, distributed")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, marks=[pytest.mark.thorough] if n in THOROUGH else []) for n in LAYOUTS],
)
def test_zeros_stay_and_all_else_moves(sparse, tmp_path, layout, pattern):
    kind, ranks, flags = LAYOUTS[layout]
    load, save = sparse[kind, pattern], tmp_path / "run"
    found = train(f"{RUN} {flags} {KEEP} --load {load} --save {save} --save-interval 2", ranks)
    assert len(found.losses) == 4
    before, after = contents(load, 2)[0], contents(save, 6)[0]
    expected, zeros = zeros_of(before), zeros_of(after)
    assert expected.keys() >= zeros.keys() >= {n for n in expected if n.startswith("decoder")}
    for name, mask in zeros.items():
        assert torch.equal(mask, expected[name]), name
        assert not torch.equal(after[name], before[name])
    share = sum(m.sum() for m in zeros.values()) / sum(m.numel() for m in zeros.values())
    assert f"early-bird: {share:.2%} of the layers' weights are zero and stay zero" in found.output


def test_layouts_agree_and_a_resumed_run_is_the_uninterrupted_one(sparse, tmp_path):
    load = sparse["fp32", "2:4"]
    options = f"{RUN} {DISTRIBUTED}"
    whole = train(f"{options} {KEEP} --load {load} --save {tmp_path / 'one'} --save-interval 4")
    two = train(f"{options} {KEEP} {OVERLAP} --load {load}", 2)
    assert two.losses == pytest.approx(whole.losses, rel=1e-5)
    # What the flag does shows in the losses.
    without = train(f"{options} --no{KEEP[1:]} --load {load}")
    assert without.losses[0] == whole.losses[0]
    assert without.losses[2:] != whole.losses[2:]
    # Of what the run has saved itself, the zeros are kept, too, and nobody loses them by mistake.
    saved = f"--load {tmp_path / 'one'} --ckpt-step 4"
    assert train(f"{options} {KEEP} {saved}").losses == whole.losses[2:]
    with pytest.raises(RankError, match=f"add {KEEP} to keep them there, or --no{KEEP[1:]}"):
        train(f"{options} {LTD} {saved}")


def test_nothing_to_keep_and_forgotten_flags_stop_a_run(dense, sparse):
    with pytest.raises(RankError, match="no weight of the loaded layers is zero"):
        train(f"{RUN} {KEEP} --load {dense['plain fp32']}")
    with pytest.raises(RankError, match="weights that were pruned to zero"):
        train(f"{RUN} {LTD} --load {sparse['plain fp32', 'unstructured']}")
    with pytest.raises(RankError, match="weights that were pruned to zero"):
        train(f"{RUN} {LTD} --finetune --load {sparse['plain fp32', 'unstructured']}")
    with pytest.raises(RankError, match=f"{KEEP}: keeps the zeros of the checkpoint .* --load"):
        train(f"{RUN} {KEEP}")


def test_zeros_outlast_steps_that_fp16_skips(tmp_path):
    # A loss scale so large that gradients overflow until it has been halved often enough.
    options = f"{RUN} --fp16 --hysteresis 1 --initial-loss-scale {2**19}"
    train(f"{options} {SAVED} --save {tmp_path / 'dense'}")
    load = draw(tmp_path / "dense", tmp_path / "sparse", "--pattern", "2:4")
    save = tmp_path / "run"
    found = train(f"{options} {KEEP} --load {load} --save {save} --save-interval 2")
    skipped = re.findall(r"number of skipped iterations: +(\d)", found.output)
    assert set(skipped) == {"0", "1"} and len(skipped) == 4
    before, after = contents(load, 2)[0], contents(save, 6)[0]
    expected, zeros = zeros_of(before), zeros_of(after)
    assert len(zeros) == 2 * len(MATRICES)
    for name, mask in zeros.items():
        assert torch.equal(mask, expected[name]), name
        assert not torch.equal(after[name], before[name])
