"""README and code say the same."""

import argparse
import re
from pathlib import Path

from megatron_rltd import config
from megatron_rltd.refusals import REFUSALS
from megatron_rltd.training import patches

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_path_in_the_readme_exists():
    paths = re.findall(r"[\w./]+/[\w.]+\.(?:py|sh|md|png|txt|json)", README)
    paths = [p for p in paths if not p.startswith(("runs/", "arxiv.org", "//"))]
    assert len(paths) >= 6
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "megatron_rltd" / path).exists(), path


def test_every_flag_is_in_the_readme_and_no_other():
    known = {config.flag(name) for name in config.FIELDS} | {"--random-ltd"}
    assert set(re.findall(r"--random-ltd[\w-]*", README)) == known
    rows = set(re.findall(r"^\| `(--[\w-]+)` \|", README, re.MULTILINE))
    parser = config.add_arguments(argparse.ArgumentParser(add_help=False))
    assert rows == {action.option_strings[0] for action in parser._actions}


def test_defaults_in_the_readme():
    for name in config.FIELDS:
        row = next(line for line in README.splitlines() if f"| `{config.flag(name)}` |" in line)
        default = getattr(config.RandomLTDConfig, name)
        if isinstance(default, int) and not isinstance(default, bool) and default:
            assert row.split("|")[2].strip() == str(default)
        if default is False:
            assert row.split("|")[2].strip() == "off"


def test_the_table_of_patches_is_in_the_readme():
    rows = re.findall(r"^\| `([\w.]+:[\w.]+)` \| (.+) \|$", README, re.MULTILINE)
    assert rows == [(patch.target, patch.reason) for patch in patches.PATCHES]


def test_modules_named_in_the_readme_exist():
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / "megatron_rltd" / name).exists(), name


def test_what_is_refused_is_in_the_documentation():
    text = (ROOT / "docs" / "features.md").read_text()
    rows = re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", text.partition("| Way out |")[2], re.M)
    assert rows == [(r.flag, r.why, r.way_out) for r in REFUSALS]


def test_tests_named_in_the_documentation_exist():
    for document in (ROOT / "docs").glob("*.md"):
        for file, name in re.findall(r"`tests/(\w+\.py)::(\w+)`", document.read_text()):
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
