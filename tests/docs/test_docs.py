"""The documentation builds without a broken link, and names only what exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rltd import _PUBLIC, config
from megatron_rltd.patching.versions import UNTESTED_FLAG

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("*/*/README.md")])


def build(folder, *flags):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", *flags, "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_site_builds_with_strict_links(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed")
    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/api/index.html").read_text()
    for name in _PUBLIC:
        assert f'id="megatron_rltd.{_PUBLIC[name]}.{name}"' in page, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_flags_on_a_page_exist(page):
    text = page.read_text()
    for path in re.findall(
        r"`((?:megatron_rltd|tools|tests|examples|docs|benchmarks)/[^`\s]*)", text
    ):
        path = path.partition("::")[0]
        assert list(ROOT.glob(path)), path
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", text):
        assert f"def {name}(" in (ROOT / file).read_text(), name
    known = {config.flag(name) for name in config.FIELDS} | {"--random-ltd", UNTESTED_FLAG}
    named = set(re.findall(r"--random-ltd(?:-[a-z]+)*", text))
    assert named <= known, named - known
