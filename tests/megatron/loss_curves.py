"""The losses of four small runs, as a file: a change of numerics shows in a review.

    python -m tests.megatron.loss_curves            # how the code differs from the file
    python -m tests.megatron.loss_curves --write    # make what the code does the file

The file is tests/golden/loss_curves.json. Losses are float32 sums, which another processor rounds
differently: `TOLERANCE` lies between that and what another set of kept tokens does.
"""

import argparse
import difflib
import json
from pathlib import Path

import torch

from megatron_rltd.patching import versions
from tests.megatron.test_training import BASE, LTD
from tests.parallel import train

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_curves.json"
TOLERANCE = 1e-5  # relative
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall"
)
# {name: (processes, flags)}
RUNS = {
    "dense": (1, BASE),
    "random-LTD": (1, f"{BASE} {LTD}"),
    "random-LTD, TP 2 and SP": (
        2,
        f"{BASE} {LTD} --tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "random-LTD, MoE": (1, f"{BASE} {LTD} {MOE}"),
}


def curves(name: str) -> dict[str, list[float]]:
    """Train a run of `RUNS`; return what its steps kept, their losses and gradient norms."""
    world_size, flags = RUNS[name]
    run = train(flags, world_size)
    return {"kept": run.kept, "loss": run.losses, "grad norm": run.grad_norms}


def as_text(of_runs: dict[str, dict[str, list[float]]]) -> str:
    """Return curves as the file has them: a line for each."""
    lines = [
        f' "{name}": {{\n'
        + ",\n".join(f'  "{what}": {json.dumps(values)}' for what, values in run.items())
        + "\n }"
        for name, run in of_runs.items()
    ]
    made_with = f"torch {torch.__version__}, megatron-core {versions.megatron_version()}"
    return "{\n" + ",\n".join([f' "made with": "{made_with}"', *lines]) + "\n}\n"


def main() -> None:
    """Print how the file would change, and rewrite it if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"rewrite {GOLDEN.name}")
    options = parser.parse_args()
    before = GOLDEN.read_text() if GOLDEN.exists() else ""
    now = as_text({name: curves(name) for name in RUNS})
    diff = difflib.unified_diff(before.splitlines(), now.splitlines(), "file", "code", lineterm="")
    print("\n".join(diff) or "no difference")
    if options.write:
        GOLDEN.write_text(now)


if __name__ == "__main__":
    main()
