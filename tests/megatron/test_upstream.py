"""`check --against` reads sources as fingerprints do and finds what another Megatron changed."""

import re
import shutil
from pathlib import Path

import megatron.core
import pytest

from megatron_rltd.commands import check, upstream
from megatron_rltd.patching import versions
from megatron_rltd.patching.mechanism import hash_source

CORE = "megatron.core"
INSTALLED = Path(megatron.core.__file__).parents[2]


def test_sources_are_those_of_the_fingerprints():
    known = versions.known_fingerprints()
    read = 0
    for row in versions.rows_for_release(check._touched()):
        if versions.megatron_version() in known.get(row.target, {}):
            source = upstream.find_source(INSTALLED, row.target)
            assert hash_source(source) == known[row.target][versions.megatron_version()], row.target
            read += 1
    assert read > 25


def test_changes_are_found(tmp_path, capsys):
    other = tmp_path
    for folder in ("megatron/core", "megatron/training"):
        for file in INSTALLED.glob(f"{folder}/**/*.py"):
            copy = other / file.relative_to(INSTALLED)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    assert check.main(["--against", str(other)]) == 0
    assert "CHANGED" not in capsys.readouterr().out

    block = other / "megatron/core/transformer/transformer_block.py"
    block.write_text(block.read_text().replace("nullcontext()", "nullcontext(None)"))
    schedules = other / "megatron/core/pipeline_parallel/schedules.py"
    schedules.write_text(schedules.read_text().replace("def forward_step_calc_loss(", "def gone("))
    assert check.main(["--against", str(other)]) == 1
    report = capsys.readouterr().out
    changed = re.findall(r"^  (CHANGED|GONE) +(\S+)$", report, re.MULTILINE)
    assert ("GONE", f"{CORE}.pipeline_parallel.schedules:forward_step_calc_loss") in changed
    blocks = {name for how, name in changed if how == "CHANGED"}
    assert f"{CORE}.transformer.transformer_block:TransformerBlock.forward" in blocks
    assert all(name.startswith(f"{CORE}.transformer.transformer_block:") for name in blocks)
    assert "+++ other" in report.partition("CHANGED")[2]
    assert f"{len(changed)} functions are not as in any tested version" in report


@pytest.mark.parametrize("folder", ["", "megatron/core"])
def test_a_folder_without_megatron(tmp_path, capsys, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    assert check.main(["--against", str(tmp_path)]) == 1
    assert "give --against the folder that holds" in capsys.readouterr().out
