"""Training killed without warning, then started again with the same command."""

import os
import signal

import pytest

from tests.megatron.test_training import BASE, FORMAT, LTD
from tests.parallel import RankError, run, train, train_on_this_rank

OPTIONS = BASE.replace("dropout 0", "dropout 0.1")


def _train_until_killed(arguments: list[str], place: str, count: int) -> None:
    """Train as `tests.parallel.train` does; SIGKILL the last rank at the count-th `place`.

    Args:
        place: "micro-batch": after a backward pass; "save": before a
            checkpoint is written; "saved": when it is written but not named the latest yet.
    """
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import checkpointing

    seen = []

    def killing(original, before: bool):
        def wrapper(*args, **kwargs):
            result = None if before else original(*args, **kwargs)
            seen.append(1)
            if len(seen) == count and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs) if before else result

        return wrapper

    if place == "micro-batch":
        schedules.backward_step = killing(schedules.backward_step, before=False)
    else:
        module = checkpointing.dist_checkpointing
        module.save = killing(module.save, before=place == "save")
    train_on_this_rank("pretrain_gpt", arguments)


def _tensors_differ(ours: str, theirs: str) -> list[str]:
    """Return the names of the tensors that differ between two checkpoints."""
    import torch
    from megatron.core.dist_checkpointing import load_plain_tensors

    torch.distributed.init_process_group("gloo")
    a, b = (
        {name: value for name, value in load_plain_tensors(path).items() if torch.is_tensor(value)}
        for path in (ours, theirs)
    )
    assert len(a) > 20
    assert any(name.startswith("optimizer") for name in a)
    return sorted(set(a) ^ set(b)) + [n for n in a if n in b and not torch.equal(a[n], b[n])]


PIPELINE = (2, "--pipeline-model-parallel-size 2")
OVERLAP = (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")


def thorough(*case):
    return pytest.param(*case, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    ("layout", "place", "count"),
    [
        ((1, ""), "micro-batch", 14),  # in step 4 of 6, of 4 micro-batches each
        thorough((1, "--use-distributed-optimizer"), "saved", 2),
        thorough(PIPELINE, "micro-batch", 19),
        thorough(PIPELINE, "save", 2),
        thorough((2, "--tensor-model-parallel-size 2 --sequence-parallel"), "saved", 1),
        thorough(OVERLAP, "micro-batch", 7),  # of 2 micro-batches on each rank
    ],
)
def test_killed_and_resumed_is_bit_equal(tmp_path, layout, place, count):
    world_size, flags = layout
    whole_folder, folder = tmp_path / "whole", tmp_path / "killed"

    def command(to):
        return f"{OPTIONS} {LTD} {FORMAT} {flags} --save {to} --load {to} --save-interval 2"

    whole = train(command(whole_folder), world_size)
    with pytest.raises(RankError, match="-9|closed|reset|hung"):
        run(world_size, _train_until_killed, command(folder).split(), place, count)
    assert not (folder / "iter_0000006").exists()
    resumed = train(command(folder), world_size)
    steps = len(resumed.losses)
    assert 2 <= steps < 6 or (place, count) == ("saved", 1)
    for name in ("losses", "grad_norms", "kept"):
        assert getattr(resumed, name) == getattr(whole, name)[-steps:], name
    assert resumed.validation == whole.validation
    assert resumed.layer_tokens == whole.layer_tokens
    names = [str(path / "iter_0000006") for path in (whole_folder, folder)]
    assert run(1, _tensors_differ, *names) == [[]]
