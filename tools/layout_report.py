"""How check_layouts.py shows its results: lines while it runs, and a page."""

import os
import platform
import re
from collections import Counter
from pathlib import Path

import layout_matrix as matrix
from layout_runs import AS_PLAIN, REFUSED, TIMES_PLAIN, TOLERANCE, WARM_UP, Result

HEADINGS = (
    "layout",
    "processes",
    "model",
    "features",
    "loss",
    "gradient norm",
    "plain",
    "limit",
    "result",
)
_NUMBERS = (1, 4, 5, 6, 7)


def cells(result: Result) -> list[str]:
    """Return a row of the table as people read it."""
    numbers = (result.loss, result.norm, result.plain, result.limit)
    shown = ["" if n is None else "0" if n == 0 else f"{n:.1e}" for n in numbers]
    row = result.row
    verdict = result.verdict + (f": {result.message}" if result.message else "")
    return [row.layout, str(result.processes), row.model, row.features, *shown, verdict]


class Columns:
    """Lines of a table whose rows are printed as they come."""

    def __init__(self, rows: list[matrix.Row]):
        texts = [list(HEADINGS), *(cells(Result(row, 1, 0.1, 0.1, 0.1, 0.1)) for row in rows)]
        self._widths = [max(map(len, column)) for column in zip(*texts, strict=True)]

    def heading(self) -> str:
        """Return the line above the rows."""
        return self._aligned(list(HEADINGS))

    def line(self, result: Result) -> str:
        """Return the line of a result."""
        return self._aligned(cells(result))

    def _aligned(self, texts: list[str]) -> str:
        specs = [f"{'>' if i in _NUMBERS else '<'}{w}" for i, w in enumerate(self._widths)]
        return "  ".join(format(t, s) for t, s in zip(texts, specs, strict=True)).rstrip()


def summary(results: list[Result]) -> str:
    """Return how many rows came to which verdict."""
    counts = Counter(result.verdict for result in results)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{len(results)} rows: {said}"


def names() -> str:
    """Return every name, for --list."""
    sizes = [f"  {name + 'n':<24}{what}" for name, (_, what) in matrix.SIZES.items()]
    switches = [f"  {name:<24}{what}" for name, (_, what) in matrix.SWITCHES.items()]
    models = [f"  {name:<24}{flags}" for name, flags in matrix.MODELS.items()]
    features = [f"  {name:<24}{f.flags}" for name, f in matrix.FEATURES.items()]
    rows = [f"  {r.layout:<32}{r.model:<18}{r.features}" for r in matrix.blocks(matrix.MATRIX)]
    return "\n".join(
        ["layouts, of parts joined with x or +:", *sizes, *switches, "", "models:", *models, ""]
        + ["features, joined with +:", *features, "", f"rows of --all ({len(rows)}):", *rows]
    )


def page(results: list[Result], command: str, versions: dict[str, str], minutes: float) -> str:
    """Return the results as a Markdown page, with the command that made it and the machine."""
    lines = [
        "# Layouts against one process",
        "",
        "The training loss with random-LTD dropping, on a parallel layout and in one process,",
        "through Megatron's own training loop in real processes. Written by:",
        "",
        f"    {command}",
        "",
        f"{_versions(versions)}; {_cpu()}, {len(os.sched_getaffinity(0))} cores, no GPU, float32",
        f"unless a feature says otherwise; {minutes:.0f} minutes.",
        "",
        f"**{summary(results)}.**",
        "",
        f"- All runs of a row start from a checkpoint that one process made after {WARM_UP} steps:",
        "  initial weights differ between pipeline and expert layouts in Megatron. Seeds are the",
        '  same (`--no-load-rng`). "fresh": from the initial weights.',
        '- "loss", "norm": largest relative difference of the loss and of the gradient norm over',
        '  the steps; "plain": of the loss without `--random-ltd`, measured where it decides, or',
        "  everywhere `--with-plain`.",
        f'- "limit": {TOLERANCE:.0e}; 0 where a layout adds the same numbers in the same order as',
        f"  one process; in bf16 {TIMES_PLAIN} times plain Megatron's own difference.",
        "- `python tools/check_layouts.py --list` says what the names stand for.",
        "",
        *_table(results),
        "",
        *_notes(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(results: list[Result]) -> list[str]:
    rules = ["---:" if i in _NUMBERS else "---" for i in range(len(HEADINGS))]
    rows = [list(HEADINGS), rules, *(cells(result) for result in results)]
    return [f"| {' | '.join(text.replace('|', '&#124;') for text in row)} |" for row in rows]


def _notes(results: list[Result]) -> list[str]:
    """Say what to know of the features and the verdicts that occur."""
    used = {name for result in results for name in result.row.features.split("+")}
    notes = [f"- {name}: {matrix.FEATURES[name].note}" for name in matrix.FEATURES if name in used]
    notes = [note for note in notes if not note.endswith(": ")]
    verdicts = {result.verdict for result in results}
    if AS_PLAIN in verdicts:
        notes.append(
            f'- "{AS_PLAIN}": over the limit, and at most {TIMES_PLAIN} times the difference '
            "that plain Megatron has. Not counted as equal."
        )
    if REFUSED in verdicts:
        notes.append(f'- "{REFUSED}": fails without random-LTD too; the message is Megatron\'s.')
    return notes


def _versions(versions: dict[str, str]) -> str:
    found = {"Python": platform.python_version(), **versions}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
