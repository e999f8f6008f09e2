import sys
import types

import pytest

from megatron_rltd.patching import mechanism
from megatron_rltd.patching.mechanism import (
    Patch,
    PatchError,
    apply,
    find_problems,
    fingerprint,
)


class Machine:
    def run(self, speed):
        """Run."""
        return speed

    @staticmethod
    def still():
        return "still"


class FastMachine(Machine):
    pass


def count(first, second=2):
    return first + second


@pytest.fixture
def target():
    """A module of its own, as Megatron's are, with a function, a class and a constant."""
    module = types.ModuleType("patch_target")
    module.count, module.Machine, module.FastMachine, module.LIMIT = count, Machine, FastMachine, 3
    sys.modules["patch_target"] = module
    yield module
    del sys.modules["patch_target"]


def doubled(original):
    def replacement(*args, **kwargs):
        return 2 * original(*args, **kwargs)

    return replacement


HERE = ("tests.unit.test_patching",)


def test_apply_and_revert(target):
    originals = target.count, Machine.run
    applied = apply(
        [
            Patch("patch_target:count", doubled, "why", parameters=("second",), copies=HERE),
            Patch("patch_target:Machine.run", doubled, "why", parameters=("speed",)),
            Patch("patch_target:LIMIT", lambda original: original + 1, "why"),
        ]
    )
    assert (target.count(1), Machine().run(5), target.LIMIT) == (6, 10, 4)
    assert FastMachine().run(5) == 10
    applied.revert()
    assert (target.count, Machine.run) == originals
    assert target.LIMIT == 3
    applied.revert()
    assert target.LIMIT == 3


def test_an_inherited_attribute_is_not_left_behind(target):
    applied = apply([Patch("patch_target:FastMachine.run", doubled, "why")])
    assert (FastMachine().run(5), Machine().run(5)) == (10, 5)
    applied.revert()
    assert "run" not in vars(FastMachine)


def test_static_methods_stay_static(target):
    applied = apply(
        [Patch("patch_target:Machine.still", lambda f: staticmethod(doubled(f.__func__)), "why")]
    )
    assert Machine.still() == Machine().still() == "stillstill"
    applied.revert()
    assert Machine.still() == Machine().still() == "still"
    assert isinstance(vars(Machine)["still"], staticmethod)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Patch("patch_target:missing", doubled, ""), "patch_target:missing does not exist"),
        (Patch("no_such_module:f", doubled, ""), "no_such_module:f does not exist"),
        (Patch("patch_target:Machine.no", doubled, ""), "Machine.no does not exist"),
        (
            Patch("patch_target:count", doubled, "", parameters=("third", "first"), copies=HERE),
            "patch_target:count has no parameter third",
        ),
        (Patch("patch_target:LIMIT", doubled, ""), "patch_target:LIMIT is listed twice"),
        (
            Patch("patch_target:count", doubled, ""),
            "tests.unit.test_patching imported patch_target:count by name",
        ),
    ],
)
def test_nothing_is_applied_if_one_does_not_fit(target, bad, message):
    fine = Patch("patch_target:LIMIT", lambda original: original + 1, "why")
    with pytest.raises(PatchError, match=message):
        apply([fine, bad])
    assert target.LIMIT == 3
    assert target.count is count


def test_a_wrapper_that_fails_leaves_nothing_applied(target):
    def fails(original):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        apply(
            [
                Patch("patch_target:LIMIT", lambda original: original + 1, "why"),
                Patch("patch_target:count", fails, "why", copies=HERE),
            ]
        )
    assert target.LIMIT == 3
    assert not mechanism._IN_FORCE


def test_a_patch_is_not_applied_twice(target):
    patch = Patch("patch_target:LIMIT", lambda original: original + 1, "why")
    applied = apply([patch])
    with pytest.raises(PatchError, match="already patched"):
        apply([patch])
    applied.revert()
    apply([patch]).revert()


def test_patches_stack_and_revert_newest_first(target):
    old = apply([Patch("patch_target:count", doubled, "", copies=HERE)])
    new = apply([Patch("patch_target:count", lambda f: lambda *a: f(*a) + 1, "")])
    assert target.count(1) == 7
    with pytest.raises(PatchError, match="revert that patch first"):
        old.revert()
    new.revert()
    assert target.count(1) == 6
    old.revert()
    assert target.count is count


def test_fingerprints(target):
    patch = Patch("patch_target:count", doubled, "", copies=HERE)
    found = fingerprint(count)
    assert len(found) == 16
    assert found != fingerprint(Machine.run)
    assert find_problems(patch, {"patch_target:count": {found, "0" * 16}}) == []
    problems = find_problems(patch, {"patch_target:count": {"0" * 16}})
    assert problems == [f"patch_target:count has source fingerprint {found}, which is not tested"]
    with pytest.raises(PatchError, match="not tested"):
        apply([patch], {"patch_target:count": {"0" * 16}})
    assert target.count is count


def test_undo_of_other_things_runs_first(target):
    order = []
    applied = apply([Patch("patch_target:LIMIT", lambda original: 4, "")])
    applied.on_revert(lambda: order.append(target.LIMIT))
    applied.revert()
    assert order == [4]


def test_rows_for_some_releases_only():
    always = Patch("m:f", doubled, "")
    old, new = Patch("m:f", doubled, "", before=(0, 18)), Patch("m:f", doubled, "", since=(0, 18))
    both = Patch("m:f", doubled, "", since=(0, 18), before=(1, 0))
    releases = [(0, 17), (0, 18), (0, 19), (1, 0)]
    assert [always.is_for(r) for r in releases] == [True] * 4
    assert [old.is_for(r) for r in releases] == [True, False, False, False]
    assert [new.is_for(r) for r in releases] == [False, True, True, True]
    assert [both.is_for(r) for r in releases] == [False, True, True, False]
