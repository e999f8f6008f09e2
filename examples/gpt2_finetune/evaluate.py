"""Perplexities of finetuned runs on the validation and the test set, as one table.

    python examples/gpt2_finetune/evaluate.py --data DATA RUN_DIR...

DATA is the folder of prepare_data.sh. A RUN_DIR is named METHOD-seedN, as the scripts name theirs.
Its newest checkpoint is exported to RUN_DIR/hf/iter_N with tools/checkpoint/export_hf.py, and
measured with tools/evaluation/perplexity.py: in blocks, as transformers' run_clm.py does, and in a
window that slides by half a block. What lies there already is not made again. The table gives for
each method the mean over its runs and each run; first comes the model before the finetuning.
"""

import argparse
import contextlib
import io
import json
import os
import re
import statistics
import sys
from pathlib import Path

# This checkout's package and tools.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "checkpoint"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "evaluation"))

import export_hf
import perplexity

from megatron_rltd.commands.text_table import aligned

SETS, MODES = ("valid", "test"), ("block", "window")
TRACKER = "latest_checkpointed_iteration.txt"
# {column: (set, mode, what perplexity.py calls it)}
COLUMNS = {
    f"{name} {column}": (name, mode, result)
    for name in SETS
    for column, mode, result in (
        ("block", "block", "perplexity"),
        ("window", "window", "perplexity"),
        ("word", "window", "word_perplexity"),
    )
}


class EvaluationError(Exception):
    """Something is missing or a tool failed; the message says what."""


def newest(run: Path) -> int:
    """Return the iteration of a run's newest checkpoint."""
    try:
        return int((run / "checkpoints" / TRACKER).read_text())
    except (OSError, ValueError):
        raise EvaluationError(f"{run} holds no checkpoint of a run; name its RUN_DIR") from None


def method_and_seed(run: Path) -> tuple[str, int]:
    """Return what the name of a RUN_DIR says."""
    found = re.fullmatch(r"(.+)-seed(\d+)", run.name)
    if not found:
        raise EvaluationError(f"{run} is not named METHOD-seedN; rename it")
    return found[1], int(found[2])


def export(run: Path, iteration: int) -> Path:
    """Export a checkpoint; return the folder."""
    folder = run / "hf" / f"iter_{iteration}"
    if not folder.exists():
        print(f"exporting {run}", file=sys.stderr, flush=True)
        flags = ["--load", run / "checkpoints", "--iteration", iteration, "--output", folder]
        with contextlib.redirect_stdout(io.StringIO()):
            status = export_hf.main(list(map(str, flags)))
        if status:
            raise EvaluationError(f"{run} was not exported, see above")
    return folder


def measure(model: Path, data: Path, results: Path) -> dict[str, float]:
    """Return the perplexities of a model by the table's columns.

    Args:
        model: A folder of Hugging Face.
        data: Where the texts are.
        results: The folder for what perplexity.py writes.
    """
    results.mkdir(parents=True, exist_ok=True)
    positions = json.loads((model / "config.json").read_text())["n_positions"]
    found = {}
    for name in SETS:
        for mode in MODES:
            file = results / f"perplexity_{name}_{mode}.json"
            flags = [model, data / f"{name}.jsonl", "--json", file]
            if mode == "window":
                flags += ["--stride", positions // 2]
            if not file.exists():
                print(f"measuring {model} on {name}, {mode}s", file=sys.stderr, flush=True)
                said = io.StringIO()
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    status = perplexity.main(list(map(str, flags)))
                if status:
                    raise EvaluationError(said.getvalue().splitlines()[-1])
            found[name, mode] = json.loads(file.read_text())
    return {column: found[s, m][result] for column, (s, m, result) in COLUMNS.items()}


def table(rows: list[tuple[str, list[tuple[str, int, dict[str, float]]]]]) -> str:
    """Return the table.

    Args:
        rows: For each method its name and its runs: name, iterations, perplexities by column.
    """
    lines = [["", "iterations", *COLUMNS]]
    for method, runs in rows:
        if len(runs) > 1:
            means = [statistics.fmean(values[c] for _, _, values in runs) for c in COLUMNS]
            lines.append([f"{method}, mean of {len(runs)}", "", *(f"{m:.2f}" for m in means)])
        for name, iterations, values in runs:
            numbers = [f"{values[c]:.2f}" for c in COLUMNS]
            lines.append([f"{method}, {name}" if name else method, f"{iterations:,}", *numbers])
    return aligned(lines)


def evaluate(data: Path, runs: list[Path]) -> str:
    """Export and measure runs; return the table.

    Raises:
        EvaluationError: A run or the data cannot be used.
    """
    if not (data / "settings").is_file():
        raise EvaluationError(f"--data {data} is not a folder that prepare_data.sh has completed")
    named = sorted((*method_and_seed(run), run) for run in runs)
    # All of it before anything slow.
    iterations = {run: newest(run) for _, _, run in named}
    flags = (data / "model_flags").read_text().splitlines()
    published = Path(flags[flags.index("--tokenizer-model") + 1])
    folders = {run: export(run, iterations[run]) for run in iterations}
    rows = [("before", [("", 0, measure(published, data, data / "perplexity"))])]
    for method in dict.fromkeys(method for method, _, _ in named):
        of_method = [
            (f"seed {seed}", iterations[run], measure(folders[run], data, folders[run]))
            for name, seed, run in named
            if name == method
        ]
        rows.append((method, of_method))
    return table(rows)


def main(argv: list[str] | None = None) -> int:
    """Evaluate; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.sh made")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="METHOD-seedN")
    options = parser.parse_args(argv)
    try:
        print(evaluate(options.data, options.runs))
    except EvaluationError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
