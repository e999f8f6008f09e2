"""Steps of tools/dev/gpu_check.sh that are a few lines of Python, and what all of them came to.

python tools/dev/gpu_report.py one-op --device cuda
python tools/dev/gpu_report.py deepspeed
python tools/dev/gpu_report.py losses ONE.log OTHER.log --tolerance 1e-3
python tools/dev/gpu_report.py summary WORK OUT --device cuda

The folders of this repository and of its benchmarks are on PYTHONPATH.
"""

import argparse
import json
import math
import os
import re
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

FIELDS = ("step", "result", "seconds", "why")


def one_op(device: str) -> int:
    """Move tokens by a compiled kernel, there and back; return the exit status."""
    import torch

    from megatron_rltd import gather_tokens
    from megatron_rltd.tokens import kernels

    missing = kernels.missing_for(device)
    if missing:
        print(f"kernels for {device}: {missing}")
        return 1
    hidden = torch.randn(64, 2, 40, device=device, requires_grad=True)
    kept = torch.stack([torch.arange(0, 64, 3), torch.arange(22)])
    indices = kept.to(device, torch.int32)
    tokens = gather_tokens(hidden, indices)
    rows, samples = kept.T.to(device), torch.arange(2, device=device)
    assert torch.equal(tokens, hidden[rows, samples]), "other rows than those asked for"
    (gradient,) = torch.autograd.grad(tokens.sum(), hidden)
    assert gradient.sum().item() == tokens.numel(), "the gradient is not of these rows"
    print(f"compiled kernels moved {list(tokens.shape)} of {list(hidden.shape)}, there and back")
    return 0


def deepspeed_kernels() -> int:
    """Build DeepSpeed's own kernels of random-LTD; return the exit status."""
    import torch
    from lib.moves import deepspeed

    module, why = deepspeed(torch.device("cuda", 0), torch.bfloat16, 2048, 2048)
    print(why or f"built: {module.__name__}")
    return int(module is None)


def losses(log: Path) -> list[float]:
    """Return the losses that Megatron logged, step by step."""
    return [float(text) for text in re.findall(r"lm loss: (\S+)", log.read_text())]


def largest_difference(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference; infinite if losses are missing or no numbers."""
    if not one or len(one) != len(other) or not all(map(math.isfinite, [*one, *other])):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def compare(logs: list[Path], tolerance: float) -> int:
    """Print the losses of two runs and how far they are apart; return the exit status."""
    one, other = map(losses, logs)
    print(*(log.stem for log in logs), sep="  ")
    for pair in zip_longest(one, other):
        print(*pair, sep="  ")
    difference = largest_difference(one, other)
    print(f"largest relative difference {difference:.2g}, tolerance {tolerance:g}")
    return int(difference > tolerance)


def tests(log: Path) -> str | None:
    """Return pytest's summary line in a log, or None."""
    found = re.findall(r"^=*\s?(\d+ (?:passed|failed).* in [\d.]+s).*$", log.read_text(), re.M)
    return found[-1] if found else None


def summary(work: Path, out: Path, device: str) -> int:
    """Write the steps as JSON; return 1 if one failed or is still to do, else 0.

    Args:
        work: Folder of the steps' logs.
        out: Where "gpu_check.tsv" has a line for each step, and where the JSON goes.
        device: "cuda" or "cpu".
    """
    import torch
    from lib.common import machine

    lines = (out / "gpu_check.tsv").read_text().splitlines()
    steps: list[dict[str, Any]] = [
        dict(zip(FIELDS, line.split("\t"), strict=True))
        for line in lines
        if not line.startswith("seed\t")
    ]
    for step in steps:
        log = work / f"{step['step']}.log"
        step["tests"] = tests(log) if log.exists() else None
    results = {
        "machine": machine(torch.device(device)),
        "seed": int(os.environ["MEGATRON_RLTD_TEST_SEED"]),
        "steps": steps,
        "losses": {log.stem: losses(log) for log in sorted(work.glob("gpt_*.log"))},
    }
    (out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
    failed = [step["step"] for step in steps if step["result"] in ("failed", "to do")]
    for step in steps:
        if step["tests"]:
            print(f"{step['step']}: {step['tests']}")
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed", f"(results in {out})")
    return int(bool(failed))


def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("one-op", help="move tokens by a compiled kernel")
    one.add_argument("--device", choices=("cuda", "cpu"), required=True)
    commands.add_parser("deepspeed", help="build DeepSpeed's kernels")
    two = commands.add_parser("losses", help="compare the losses that two runs logged")
    two.add_argument("logs", type=Path, nargs=2)
    two.add_argument("--tolerance", type=float, required=True)
    all_ = commands.add_parser("summary", help="write what the steps came to")
    all_.add_argument("work", type=Path)
    all_.add_argument("out", type=Path)
    all_.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options = parser.parse_args(argv)
    if options.command == "one-op":
        return one_op(options.device)
    if options.command == "deepspeed":
        return deepspeed_kernels()
    if options.command == "losses":
        return compare(options.logs, options.tolerance)
    return summary(options.work, options.out, options.device)


if __name__ == "__main__":
    sys.exit(main())
