"""The table printed at start-up is what was replaced in the process, no more and no less."""

import importlib
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.megatron.test_training import BASE, LTD
from tests.parallel import run_all

PACKAGES = ("megatron", "torch")


def _symbols() -> dict[str, int]:
    """Return the identity of all that modules, their classes and specs hold, by "module:name"."""
    found = {}
    specs = set()
    for module_name, module in sorted(sys.modules.items()):
        if module_name.split(".")[0] not in PACKAGES:
            continue
        for name, value in list(getattr(module, "__dict__", {}).items()):
            found[f"{module_name}:{name}"] = id(value)
            is_own = isinstance(value, type) and value.__module__ == module_name
            # A spec has several names; what it holds is found under the first.
            is_spec = type(value).__name__ == "ModuleSpec" and id(value) not in specs
            if is_spec:
                specs.add(id(value))
            if is_own or is_spec:
                for attribute, member in list(vars(value).items()):
                    found[f"{module_name}:{name}.{attribute}"] = id(member)
    return found


def _replaced(arguments: list[str], has_gpu: bool) -> list[str]:
    """Return what `prepare` replaces in this process, and print what it prints."""
    import torch

    from megatron_rltd.commands.run import BUNDLED, prepare

    with mock.patch.object(torch.cuda, "is_available", lambda: has_gpu):
        importlib.import_module("megatron.core.datasets.bert_dataset")  # else it is new afterwards
        before = _symbols()
        prepare(Path(BUNDLED["pretrain_gpt"]), arguments)
        after = _symbols()
    # A member that a known class did not hold itself hides the one it inherits.
    hidden = [name for name in after.keys() - before.keys() if name.rpartition(".")[0] in before]
    changed = [name for name, value in before.items() if after[name] != value]
    return sorted(changed + hidden)


@pytest.mark.parametrize("flags", ["", LTD], ids=["dense", "random-LTD"])
@pytest.mark.parametrize("has_gpu", [True, False], ids=["gpu", "cpu"])
def test_the_printed_table_is_what_was_replaced(flags, has_gpu):
    line = f"{BASE} {flags}" + ("" if has_gpu else " --cpu")
    ((result),) = run_all(1, _replaced, line.split(), has_gpu)
    replaced, output = result["value"], result["output"]
    table = output.partition("replaced symbols\n")[2]
    printed = set(re.findall(r"\b[\w.]+:[\w.]+", table))
    assert printed - set(replaced) == set()
    assert set(replaced) - printed == set()
    counts = {("gpu", ""): 1, ("gpu", LTD): 9, ("cpu", ""): 40, ("cpu", LTD): 50}
    assert len(replaced) >= counts["gpu" if has_gpu else "cpu", flags]
