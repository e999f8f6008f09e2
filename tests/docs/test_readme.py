"""README and code say the same."""

import argparse
import re
from pathlib import Path

import pytest

from megatron_rltd import __main__, __version__, config
from megatron_rltd.patching.versions import UNTESTED_FLAG
from megatron_rltd.pretrain import compiled_helper, sgd_momentum
from megatron_rltd.refusals import REFUSALS
from megatron_rltd.training import arguments, patches
from megatron_rltd.training.state import Training

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_path_in_the_readme_exists():
    paths = re.findall(r"[\w./]+/[\w.]+\.(?:py|sh|md|png|txt|json)", README)
    paths = [p for p in paths if not p.startswith(("runs/", "arxiv.org", "//"))]
    assert len(paths) >= 6
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "megatron_rltd" / path).exists(), path


def test_every_flag_is_in_the_readme_and_no_other():
    known = {config.flag(name) for name in config.FIELDS} | {"--random-ltd", UNTESTED_FLAG}
    assert set(re.findall(r"--random-ltd[\w-]*", README)) == known
    rows = set(re.findall(r"^\| `(--[\w-]+)` \|", README, re.MULTILINE))
    parser = arguments.add_arguments(argparse.ArgumentParser(add_help=False))
    assert rows == {action.option_strings[0] for action in parser._actions}


def test_defaults_in_the_readme():
    for name in config.FIELDS:
        row = next(line for line in README.splitlines() if f"| `{config.flag(name)}` |" in line)
        default = getattr(config.RandomLTDConfig, name)
        if isinstance(default, int) and not isinstance(default, bool) and default:
            assert row.split("|")[2].strip() == str(default)
        if default is False:
            assert row.split("|")[2].strip() == "off"


def test_the_tables_of_patches_are_in_the_documentation():
    text = (ROOT / "docs" / "patches.md").read_text()
    rows = re.findall(r"^\| `([\w.]+:[\w.]+)` \| (.+) \|$", text, re.MULTILINE)
    table = (
        *patches.patches_of(Training()),
        *compiled_helper.PATCHES,
        *sgd_momentum.PATCHES,
    )
    assert rows == [(patch.target, patch.reason) for patch in table]


@pytest.mark.parametrize("page", ["README.md", "docs/method.md", "CONTRIBUTING.md"])
def test_modules_and_rooms_named_exist(page):
    text = (ROOT / page).read_text()
    package = ROOT / "megatron_rltd"
    for name in re.findall(r"`(\w+\.py)`", text):
        assert [*package.rglob(name), *(ROOT / "tools").rglob(name)], name
    rooms = set(re.findall(r"^\| .*", README.partition("| Room of")[2], re.MULTILINE))
    named = {name for line in rooms for name in re.findall(r"`(\w+)/`", line)}
    assert named == {init.parent.name for init in package.glob("*/__init__.py")}


def test_commands_in_the_readme_are_those_there_are():
    named = set(re.findall(r"^\| `python -m megatron_rltd ([\w-]+)` \|", README, re.MULTILINE))
    assert named == {name for name in __main__.COMMANDS if not name.startswith("-")}


def test_the_version_is_the_changelogs_and_the_readmes():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## ([\d.]+)", changelog, re.MULTILINE)[0] == __version__
    assert f"megatron_rltd {__version__}: replaced symbols" in README


def test_what_is_refused_is_in_the_documentation():
    text = (ROOT / "docs" / "features.md").read_text()
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", text.partition("| Way out |")[2], re.M)
    assert rows == [(r.flag, r.why, r.way_out) for r in REFUSALS]


def test_tests_named_in_the_documentation_exist():
    for document in (ROOT / "docs").glob("*.md"):
        for file, name in re.findall(r"`tests/([\w/]+\.py)::(\w+)`", document.read_text()):
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
