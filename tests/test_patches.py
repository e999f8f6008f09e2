import importlib.metadata
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_rltd import patches, patching, versions

ROOT = Path(__file__).parent.parent


def resolved():
    return {patch.target: patch.resolve()[2] for patch in patches.PATCHES}


def test_the_installed_megatron_is_tested():
    assert versions.megatron_version() in versions.tested_versions()
    assert versions.megatron_version() == importlib.metadata.version("megatron-core")


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.target)
def test_contract_of_each_row(patch):
    assert patching.check(patch, versions.known()) == []
    original = patch.resolve()[2]
    if original is not None:  # fused_apply_rotary_pos_emb without Transformer Engine
        stored = versions.known_fingerprints()[patch.target]
        assert stored[versions.megatron_version()] == patching.fingerprint(original)


@pytest.mark.parametrize("symbol", versions.RELIED_ON)
def test_contract_of_what_is_relied_on(symbol):
    stored = versions.known_fingerprints()[symbol]
    original = patching.Patch(symbol, lambda f: f, "").resolve()[2]
    assert stored[versions.megatron_version()] == patching.fingerprint(original)


def test_versions_are_within_the_declared_window():
    lowest, highest = versions.OLDEST, versions.NEWER_THAN_TESTED
    for version in versions.tested_versions():
        assert lowest <= tuple(int(n) for n in version.split(".")[:2]) < highest
    extras = (ROOT / "pyproject.toml").read_text()
    window = f">={lowest[0]}.{lowest[1]},<{highest[0]}.{highest[1]}"
    assert f"megatron-core[training]{window}" in extras
    constraints = (ROOT / "constraints.txt").read_text().split()
    assert f"megatron-core=={versions.tested_versions()[-1]}" in constraints


def test_apply_and_revert_leave_no_trace():
    before = resolved()
    applied = patches.apply()
    changed = [name for name, value in resolved().items() if value is not before[name]]
    assert set(changed) == {name for name, value in before.items() if value is not None}
    applied.revert()
    assert all(resolved()[name] is value for name, value in before.items())


def test_an_unknown_source_stops_everything(monkeypatch):
    before = resolved()
    target = "megatron.training.training:train_step"
    monkeypatch.setitem(versions.known_fingerprints(), target, {"0.17.0": "0" * 16})
    with pytest.raises(versions.VersionError) as error:
        patches.apply()
    message = str(error.value)
    assert f"megatron-core {versions.megatron_version()} is not one" in message
    assert f"{target} has source fingerprint" in message
    assert versions.ALLOW_UNTESTED in message
    assert all(resolved()[name] is value for name, value in before.items())
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    patches.apply().revert()


def test_a_missing_symbol_stops_everything_even_so(monkeypatch):
    from megatron.training import checkpointing

    before = resolved()
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    monkeypatch.delattr(checkpointing, "check_checkpoint_args")
    with pytest.raises(versions.VersionError, match="check_checkpoint_args does not exist"):
        patches.apply()
    del before["megatron.training.checkpointing:check_checkpoint_args"]
    rest = {p.target: p.resolve()[2] for p in patches.PATCHES if p.target in before}
    assert all(rest[name] is value for name, value in before.items())


def test_a_copy_made_too_early_stops_everything(monkeypatch):
    from megatron.training.training import train_step

    script = types.ModuleType("a_users_script")
    script.train_step = train_step
    monkeypatch.setitem(sys.modules, "a_users_script", script)
    with pytest.raises(versions.VersionError, match="a_users_script imported .*train_step by name"):
        patches.apply()


def test_every_wrapper_calls_the_original(monkeypatch):
    # With no run active, each replacement must do what the original does.
    monkeypatch.setattr("megatron_rltd.megatron_loop._random_ltd", None)
    monkeypatch.setattr("megatron_rltd.megatron_loop.start", lambda args: None)
    for patch in patches.PATCHES:
        calls = []

        def original(*args, calls=calls, **kwargs):
            calls.append((args, kwargs))
            return ["original"]

        replacement = patch.wrapper(original)
        if patch.target.endswith("add_megatron_arguments"):
            continue  # its result is a parser, tested with the flags
        if patch.target.endswith("fused_apply_rotary_pos_emb"):
            import torch

            arguments = torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4)
        else:
            arguments = types.SimpleNamespace(), types.SimpleNamespace()
        assert replacement(*arguments) == ["original"], patch.target
        assert calls == [(arguments, {})], patch.target


def test_importing_the_package_is_free():
    code = (
        "import sys, megatron_rltd; megatron_rltd.__version__; "
        "bad = {'torch', 'megatron.core', 'numpy'} & set(sys.modules); assert not bad, bad; "
        "import megatron_rltd.config, megatron_rltd.refusals, megatron_rltd.schedule; "
        "assert not {'torch', 'megatron.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_exist():
    import megatron_rltd

    for name in megatron_rltd.__all__:
        assert getattr(megatron_rltd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = megatron_rltd.nothing


def test_the_fingerprint_tool_agrees_with_the_file():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "tools/fingerprints.py"]
    output = subprocess.run(
        command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True
    ).stdout
    stored = json.loads((ROOT / "megatron_rltd" / "fingerprints.json").read_text())
    lines = [line.split() for line in output.splitlines()]
    assert len(lines) == len(stored)
    for value, symbol in lines:
        assert stored[symbol][versions.megatron_version()] == value
