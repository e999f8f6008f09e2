"""Tests: of the package, of its tools and benchmarks, and of what its pages say."""

import sys
from pathlib import Path

# Where scripts find their neighbours when they are run.
for _folder in ("benchmarks", "tools/checkpoint", "tools/dev", "tools"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _folder))
