"""One thread a process: the ranks of a test share two cores, and sums must not depend on timing."""

import logging
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Where scripts find their neighbours when they are run.
for folder in ("benchmarks", "tools/checkpoint", "tools/dev", "tools"):
    sys.path.insert(0, str(ROOT / folder))

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine|absl).*")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
