import argparse
import importlib.metadata
import json
import subprocess
import sys
import types

import pytest
import torch

from megatron_rltd import RandomLTD, RandomLTDConfig
from megatron_rltd.config import ModelError
from megatron_rltd.early_bird import arguments as early_bird
from megatron_rltd.patching import mechanism, versions
from megatron_rltd.patching.mechanism import PatchError
from megatron_rltd.training import patches
from megatron_rltd.training.arguments import add_arguments
from megatron_rltd.training.state import Training
from tests.parallel import ROOT, environment, run

PATCHES = patches.patches_of(Training())


def resolved():
    return {patch.target: patch.resolve()[2] for patch in versions.rows_for_release(PATCHES)}


def test_the_installed_megatron_is_tested():
    assert versions.megatron_version() in versions.tested_versions()
    assert versions.megatron_version() == importlib.metadata.version("megatron-core")


def _in_use():
    import megatron.core
    import megatron.training

    return [versions.megatron_version(), megatron.core.__file__, megatron.training.__file__]


def test_the_ranks_of_tests_run_the_same_megatron():
    assert run(2, _in_use) == [_in_use()] * 2


def contract(row):
    """Return the original if the row is for this Megatron; else its symbol must not be there."""
    if row.is_for(versions.release()):
        assert mechanism.find_problems(row, versions.tested_fingerprints()) == []
        return row.resolve()[2]
    with pytest.raises(mechanism.PatchError, match="does not exist"):
        row.resolve()
    return None


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_contract_of_each_row(patch):
    original = contract(patch)
    if original is not None:  # fused_apply_rotary_pos_emb without Transformer Engine
        stored = versions.known_fingerprints()[patch.target]
        assert stored[versions.megatron_version()] == mechanism.fingerprint(original)


@pytest.mark.parametrize("row", versions.RELIED_ON, ids=lambda row: row.target)
def test_contract_of_what_is_relied_on(row):
    stored = versions.known_fingerprints()[row.target]
    original = contract(row)
    expected = None if original is None else mechanism.fingerprint(original)
    assert stored.get(versions.megatron_version()) == expected


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
    applied = patches.apply(Training())
    changed = [name for name, value in resolved().items() if value is not before[name]]
    assert set(changed) == {name for name, value in before.items() if value is not None}
    applied.revert()
    assert all(resolved()[name] is value for name, value in before.items())


def test_the_table_is_applied_once():
    applied = patches.apply(Training())
    try:
        with pytest.raises((versions.VersionError, PatchError), match="is already patched"):
            patches.apply(Training())
    finally:
        applied.revert()


def test_an_unknown_source_stops_everything(monkeypatch):
    before = resolved()
    target = "megatron.training.training:train_step"
    monkeypatch.setitem(versions.known_fingerprints(), target, {"0.17.0": "0" * 16})
    with pytest.raises(versions.VersionError) as error:
        patches.apply(Training())
    message = str(error.value)
    assert f"megatron-core {versions.megatron_version()} is not one" in message
    assert f"{target} has source fingerprint" in message
    assert versions.ALLOW_UNTESTED in message
    assert versions.UNTESTED_FLAG in message
    assert all(resolved()[name] is value for name, value in before.items())
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    patches.apply(Training()).revert()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_unknown_source_is_named_loudly_if_the_user_goes_on(monkeypatch, capsys, rank):
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    monkeypatch.setenv("RANK", rank)
    patches.apply(Training()).revert()
    assert capsys.readouterr().err == "", "every source is as in a tested version"
    target = "megatron.training.training:train_step"
    monkeypatch.setitem(versions.known_fingerprints(), target, {"0.17.0": "0" * 16})
    patches.apply(Training()).revert()
    said = capsys.readouterr().err
    if rank == "1":
        assert said == ""
        return
    assert f"WARNING: megatron-core {versions.megatron_version()} is not one" in said
    assert [line for line in said.splitlines() if line.startswith("  - ")] == [f"  - {target}"]


def test_attach_is_as_loud(monkeypatch, capsys):
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    monkeypatch.delenv("RANK", raising=False)
    target = "megatron.core.transformer.transformer_layer:TransformerLayer.forward"
    monkeypatch.setitem(versions.known_fingerprints(), target, {"0.17.0": "0" * 16})
    with pytest.raises(ModelError, match="there is no GPTModel"):
        RandomLTD(RandomLTDConfig(constant=True)).attach(torch.nn.Linear(1, 1))
    assert f"  - {target}" in capsys.readouterr().err


def test_a_flag_asks_to_go_on(monkeypatch):
    monkeypatch.delenv(versions.ALLOW_UNTESTED, raising=False)
    versions.allow_untested(["--random-ltd"])
    assert versions.tested_fingerprints()
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "")  # so that it is undone
    versions.allow_untested(["--random-ltd", versions.UNTESTED_FLAG])
    assert not versions.tested_fingerprints()


def test_a_missing_symbol_stops_everything_even_so(monkeypatch):
    from megatron.training import checkpointing

    before = resolved()
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    monkeypatch.delattr(checkpointing, "check_checkpoint_args")
    with pytest.raises(
        versions.VersionError, match="check_checkpoint_args does not exist"
    ) as error:
        patches.apply(Training())
    for version in (versions.megatron_version(), *versions.tested_versions()):
        assert version in str(error.value)
    del before["megatron.training.checkpointing:check_checkpoint_args"]
    rows = versions.rows_for_release(PATCHES)
    rest = {p.target: p.resolve()[2] for p in rows if p.target in before}
    assert all(rest[name] is value for name, value in before.items())


def test_what_is_relied_on_must_be_there_too(monkeypatch):
    from megatron.core.transformer.transformer_block import TransformerBlock

    monkeypatch.delattr(TransformerBlock, "forward")
    with pytest.raises(versions.VersionError, match="TransformerBlock.forward"):
        patches.apply(Training())


def test_a_release_lacks_what_only_others_have(monkeypatch):
    monkeypatch.setattr(versions, "megatron_version", lambda: "0.17.0rc0")
    assert versions.release() == (0, 17)
    old = {row.target for row in versions.rows_for_release(versions.RELIED_ON + PATCHES)}
    monkeypatch.setattr(versions, "megatron_version", lambda: "0.20.0")
    new = {row.target for row in versions.rows_for_release(versions.RELIED_ON + PATCHES)}
    assert old - new == {
        "megatron.core.transformer.transformer_block:TransformerBlock._checkpointed_forward",
        "megatron.training.initialize:validate_args",
    }
    assert new - old == {
        "megatron.core.recompute:checkpointed_forward",
        "megatron.core.models.hybrid.hybrid_block:HybridStack.forward",
    }


def test_a_copy_made_too_early_stops_everything(monkeypatch):
    from megatron.training.training import train_step

    script = types.ModuleType("a_users_script")
    script.train_step = train_step
    monkeypatch.setitem(sys.modules, "a_users_script", script)
    with pytest.raises(versions.VersionError, match="a_users_script imported .*train_step by name"):
        patches.apply(Training())


def test_every_wrapper_calls_the_original():
    # In a training without random-LTD, each replacement must do what the original does.
    args = early_bird.add_arguments(add_arguments(argparse.ArgumentParser())).parse_args([])
    for patch in PATCHES:
        calls = []

        def original(*args, calls=calls, **kwargs):
            calls.append((args, kwargs))
            return ["original"]

        replacement = patch.wrapper(original)
        if patch.target.endswith("add_megatron_arguments"):
            continue  # its result is a parser, tested with the flags
        if patch.target.endswith("BERTMaskedWordPieceDataset.__init__"):
            continue  # it looks at a data set: tests/megatron/test_bert.py
        if patch.target.endswith("fused_apply_rotary_pos_emb"):
            import torch

            arguments = torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4)
        else:
            arguments = args, types.SimpleNamespace()
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
    command = [sys.executable, "tools/dev/fingerprints.py"]
    output = subprocess.run(
        command, check=True, cwd=ROOT, env=environment(), capture_output=True, text=True
    ).stdout
    stored = json.loads((ROOT / "megatron_rltd" / "patching" / "fingerprints.json").read_text())
    lines = [line.split() for line in output.splitlines()]
    version = versions.megatron_version()
    assert {symbol for _, symbol in lines} == {s for s in stored if version in stored[s]}
    for value, symbol in lines:
        assert stored[symbol][version] == value
