"""Markers by folder; one thread a process, as ranks share two cores and sums must repeat."""

import logging
import os
import signal
import warnings
from pathlib import Path

import local_ranks

os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background jobs ignore Ctrl-C, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|transformer-engine|absl).*")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

# Two workers of pytest-xdist never choose the same port, nor one of examples/gpt3_1.3b/launch.sh,
# which end in 4: a port that is free when it is chosen may be taken when it is used.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
local_ranks.PORTS = range(16005 + WORKER % 9, 32000, 10)

TIERS = {"unit": "unit", "megatron": "core"}


def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in TIERS and not item.get_closest_marker("thorough"):
            item.add_marker(TIERS[folder])
