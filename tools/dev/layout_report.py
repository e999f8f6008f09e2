"""How check_layouts.py shows its results: lines while it runs, and a page."""

import os
import platform
import re
from collections import Counter
from pathlib import Path

import layout_matrix as matrix
from layout_runs import AS_PLAIN, REFUSED, TIMES_PLAIN, TOLERANCE, WARM_UP, Result

HEADINGS = tuple("layout processes model features loss limit norm plain plain-norm result".split())
# What to know of a model or a feature when reading its rows.
NOTES = {
    "mtp": "under CP each rank divides the loss of Megatron's multi-token prediction by its own "
    "number of tokens, in plain Megatron too; it shows in the norm",
    "documents, eod-mask": "middle pipeline stages get no attention mask from Megatron, so that "
    "from three stages on they differ from one process; with --eod-mask-loss context-parallel "
    "ranks average over different numbers of tokens unless per-token-loss is on",
    "dropout": "comparable with recomputation on one layout. Megatron draws attention's dropout "
    "from a stream of each tensor-parallel rank",
    "hidden-dropout": "comparable under TP without SP, where Megatron draws it from one stream on "
    "all tensor-parallel ranks. Elsewhere the streams differ: a seed for each pipeline stage and, "
    "under SP, each rank; other rows under CP; the same stream again on each data-parallel rank",
    "other-seed": "keeps other tokens on the layout, so the losses must differ",
}
_NUMBERS = (1, 4, 5, 6, 7, 8)


def cells(result: Result) -> list[str]:
    """Return a row of the table as people read it."""
    numbers = (result.loss, result.limit, result.norm, result.plain, result.plain_norm)
    shown = ["" if n is None else "0" if n == 0 else f"{n:.1e}" for n in numbers]
    row = result.row
    verdict = result.verdict + (f": {result.message}" if result.message else "")
    return [row.layout, str(result.processes), row.model, row.features, *shown, verdict]


class Columns:
    """Lines of a table whose rows are printed as they come."""

    def __init__(self, rows: list[matrix.Row]):
        texts = [list(HEADINGS), *(cells(Result(row, 1, 0.1, 0.1, 0.1, 0.1, 0.1)) for row in rows)]
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
        "  same (`--no-load-rng`). With EP they start without the optimizer's state, which",
        "  Megatron cannot load into another number of expert-parallel ranks. DO rows are compared",
        '  with a distributed optimizer in one process, but "fresh" rows, which start from the',
        "  initial weights, with an ordinary one.",
        '- "loss", "norm": largest relative difference of the loss and of the gradient norm over',
        '  the steps; "plain", "plain-norm": the same without `--random-ltd`, measured where it',
        "  decides, or everywhere `--with-plain`.",
        f'- "limit": of the loss. {TOLERANCE:.0e}, 0 where a layout adds the same numbers in the',
        "  same order as one process and has the same norm; that must be within "
        f"{TOLERANCE:.0e}. In",
        f"  bf16 {TIMES_PLAIN} times plain Megatron's own difference of the loss.",
        "- `python tools/dev/check_layouts.py --list` says what the names stand for.",
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
    used = {name for r in results for name in (r.row.model, *r.row.features.split("+"))}
    notes = [
        f"- {names}: {text}." for names, text in NOTES.items() if used & set(names.split(", "))
    ]
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
