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
# The files that take longest. Workers begin with them, so that none is left alone with one. Slurm's
# mostly waits: what comes beside it has several processes.
LONGEST = (
    "scripts/slurm/test_slurm.py",
    "megatron/test_training.py",
    "megatron/test_resume.py",
    "tools/test_hf_checkpoints.py",
    "megatron/test_hybrid_training.py",
    "scripts/test_gpt3_scripts.py",
    "scripts/test_early_bird_scripts.py",
    "benchmarks/test_convergence_study.py",
    "scripts/test_quickstart.py",
    "gpu/test_fake_gpu.py",
    "megatron/test_learning_rate.py",
    "benchmarks/test_benchmarks.py",
    "tools/test_preprocess_data.py",
    "megatron/test_cpu_models.py",
    "unit/test_kernels.py",
    "commands/test_plan_command.py",
    "scripts/test_examples.py",
    "megatron/test_run.py",
    "megatron/test_budget.py",
)


def pytest_collection_modifyitems(config, items):
    folder = Path(__file__).parent
    for item in items:
        room = item.path.relative_to(folder).parts[0]
        if room in TIERS and not item.get_closest_marker("thorough"):
            item.add_marker(TIERS[room])
    if hasattr(config, "workerinput"):  # this is a worker of pytest-xdist
        files = [folder / name for name in LONGEST]
        assert all(file.exists() for file in files)
        places = {file: place for place, file in enumerate(files)}
        items.sort(key=lambda item: places.get(item.path, len(files)))
