"""How many ops random-LTD launches for one micro-batch, as a formula in n dropped layers.

    python -m tests.gpu.op_counts            # how the code differs from tests/golden/op_counts.json
    python -m tests.gpu.op_counts --write    # rewrite it, and print how it differed

Counted on the GPU that is made up (`fake_gpu`): what our code launches in the forward and in the
backward pass, views and allocations left out. A compiled kernel is one op (megatron_rltd.*), and
so is each op of plain torch, of which some (a sort) launch several kernels on a GPU.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from tests.gpu import fake_gpt, fake_gpu
from tests.gpu.fake_gpt import Case
from tests.parallel import run

GOLDEN = Path(__file__).parents[1] / "golden" / "op_counts.json"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PLAIN_TORCH = "plain torch, rope, documents"

COUNTED: dict[str, Case] = {
    "learned positions": Case(),
    "rope": Case(rotary=True),
    "causal mask": Case(mask="causal"),
    "rope, documents": Case(rotary=True, mask="documents"),
    "rope, fused": Case(rotary=True, options={"apply_rope_fusion": True}),
    "rope, documents, recompute": Case(rotary=True, mask="documents", options=FULL),
    # Angles that would take more memory than the hidden states that are not stored.
    "large rope, recompute": Case(rotary=True, options={**FULL, "num_attention_heads": 1}),
    "rope, TP and SP": Case(rotary=True, tensor_parallel=2, rank=1),
    "rope, CP, TP and SP": Case(rotary=True, context_parallel=2, tensor_parallel=2, rank=3),
    "rope, packed": Case(rotary=True, packed="dense"),
    PLAIN_TORCH: Case(rotary=True, mask="documents", backend="torch"),
}


def with_more_layers(case: Case) -> Case:
    """Return a case with two more dropped layers."""
    return dataclasses.replace(case, layers=case.layers + 2)


def formula(fewer: int, more: int, layers: int) -> str:
    """Return a linear function of n as text.

    Args:
        fewer: Its value at n = `layers`.
        more: Its value at n = `layers` + 2.
    """
    each, rest = divmod(more - fewer, 2)
    if rest:
        raise ValueError(f"{fewer} at {layers} dropped layers and {more} at {layers + 2}")
    once = fewer - each * layers
    in_n = {0: "", 1: "n"}.get(each, f"{each}n")
    if not in_n or not once:
        return in_n or str(once)
    return f"{in_n} {'+' if once > 0 else '-'} {abs(once)}"


def formulas(fewer: dict[str, Any], more: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return the counts of a case as formulas, of each op and of all.

    Args:
        fewer: What `fake_gpt.Result` holds of the case, as a dictionary.
        more: The same of the case `with_more_layers`.
        layers: Dropped layers of the first.
    """
    result = {}
    for direction in ("forward", "backward"):
        a, b = fewer[direction], more[direction]
        ops = {op: formula(a.get(op, 0), b.get(op, 0), layers) for op in sorted({*a, *b})}
        total = formula(sum(a.values()), sum(b.values()), layers)
        result[direction] = {"all": total, **ops}
    return result


def count(name: str, results: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return the formulas of a case of `COUNTED` from what `run_cases` returned of both sizes."""
    return formulas(results[name], more[name], COUNTED[name].layers - 2)


def run_cases(cases: dict[str, Case]) -> dict[str, Any]:
    """Run cases in this process, which cannot be used for a real device from then on."""
    fake_gpu.install()
    return {name: dataclasses.asdict(fake_gpt.run(case)) for name, case in cases.items()}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what changed, one line for each op of a case."""
    lines = []
    for name in {**before, **now}:
        for direction in ("forward", "backward"):
            a, b = (counts.get(name, {}).get(direction, {}) for counts in (before, now))
            for op in {**a, **b}:
                if a.get(op) != b.get(op):
                    lines.append(f"{name}, {direction}: {op} {a.get(op, 0)} -> {b.get(op, 0)}")
    return lines


def main() -> None:
    """Compare the golden file with the code, and rewrite it if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {GOLDEN.name}")
    args = parser.parse_args()
    (results,) = run(1, run_cases, COUNTED)
    (more,) = run(1, run_cases, {name: with_more_layers(c) for name, c in COUNTED.items()})
    wrong = [line for r in (*results.values(), *more.values()) for line in r["found"]]
    if wrong:
        raise SystemExit("\n".join(wrong))
    counts = {name: count(name, results, more) for name in COUNTED}
    before = json.loads(GOLDEN.read_text())["micro-batch"] if GOLDEN.exists() else {}
    print("\n".join(_differences(before, counts)) or "no difference")
    if args.write:
        GOLDEN.parent.mkdir(exist_ok=True)
        golden = {"torch": torch.__version__.split("+")[0], "micro-batch": counts}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
