"""What the benchmarks share: options, the machine they ran on, tables and files."""

import argparse
import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_rltd import __version__
from megatron_rltd.commands.text_table import aligned
from megatron_rltd.patching.versions import package_version
from megatron_rltd.tokens import kernels

RESULTS = Path("benchmarks/results")
Row = dict[str, Any]


class BenchmarkError(Exception):
    """What was asked for cannot be measured or read."""


def add_options(parser: argparse.ArgumentParser, rounds: str) -> None:
    """Add the options that all benchmarks have.

    Args:
        rounds: What the default number of rounds is, in words.
    """
    parser.add_argument("--device", type=torch.device, help="default: the GPU if there is one")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="on a CPU that others use too: one thread, and its own time instead of the clock's",
    )
    parser.add_argument("--rounds", type=int, help=f"times that each is measured ({rounds})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it works")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of CSV and JSON")
    parser.add_argument("--plot", action="store_true", help="also draw the JSON file as PNG")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="JSON",
        help="measure nothing: show, and with --plot draw, the results in this file",
    )


def chosen_device(options: argparse.Namespace) -> torch.device:
    """Return the device to measure on, with its index if it is a GPU, and set torch up for it.

    Raises:
        BenchmarkError: There is no such device, or ``--cpu-time`` is for another.
    """
    if options.threads or options.cpu_time:
        torch.set_num_threads(1 if options.cpu_time else options.threads)
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise BenchmarkError(f"--device {device}: there is no such device here")
    if options.cpu_time:
        raise BenchmarkError("--cpu-time says nothing of a GPU's time: --device cpu")
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    return device


def machine(device: torch.device) -> dict[str, Any]:
    """Return where and with what a benchmark runs, every value a plain one."""
    missing = kernels.missing_for(device.type)
    facts = {
        "device": _cpu_name(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "megatron_rltd": __version__,
        "megatron_core": package_version("megatron-core"),
        "transformer_engine": package_version("transformer-engine"),
        "kernels": f"none ({missing})" if missing else "compiled",
        "command": shlex.join(["python", *sys.argv]),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "device": gpu.name,
            "driver": _driver(),
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "l2_bytes": gpu.L2_cache_size,
        }
    return facts


def _cpu_name() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        facts = ""
    names = re.findall(r"^model name\s*: (.+)$", facts, re.MULTILINE)
    return names[0].strip() if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        return None


def described(facts: Mapping[str, Any]) -> str:
    """Return a machine in a line for people."""
    load = f"load average {facts['load_average']} to {facts['load_average_after']}"
    place = f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, {load}"
    if "driver" in facts:
        place = f"{facts['device']}, driver {facts['driver']}, CUDA {facts['cuda']}"
    versions = [f"torch {facts['torch']}", f"megatron_rltd {facts['megatron_rltd']}"]
    for name in ("megatron_core", "transformer_engine"):
        versions.append(f"{name.replace('_', '-')} {facts[name] or 'not installed'}")
    return f"{place}; {', '.join(versions)}; kernels: {facts['kernels']}"


def table(columns: Mapping[str, tuple[str, str]], rows: Sequence[Row]) -> str:
    """Return rows as an aligned table.

    Args:
        columns: {heading: (key of a row, format)}; a None is shown as "-".
    """
    lines = [list(columns)]
    lines += [
        ["-" if row[key] is None else format(row[key], form) for key, form in columns.values()]
        for row in rows
    ]
    return aligned(lines)


def write_results(folder: Path, tool: str, results: dict[str, Any]) -> Path:
    """Write a benchmark's results as JSON and its rows as CSV; return the path of the JSON.

    Args:
        results: "machine", "settings", "notes" and "rows"; the CSV leaves out what is a list in a
            row and repeats in each what one needs to know of the machine.
    """
    facts = results["machine"]
    facts["load_average_after"] = round(os.getloadavg()[0], 2)
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = folder / f"{tool}-{slug}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    shared = {key: facts[key] for key in ("device", "torch", "megatron_rltd", "kernels")}
    rows = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in results["rows"]]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *shared])
        writer.writeheader()
        writer.writerows(row | shared for row in rows)
    return path


def read_results(path: Path) -> dict[str, Any]:
    """Return what `write_results` wrote.

    Raises:
        BenchmarkError: The file is not such a one.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path}: {error}") from error
    if not {"machine", "settings", "notes", "rows"} <= set(results):
        raise BenchmarkError(f"{path} holds no results of a benchmark")
    return results


def run(
    tool: str,
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    draw: Callable[[dict[str, Any], Path], None],
) -> int:
    """Measure or read, show, and write or draw, as the options say; return the exit status.

    Args:
        measure: Returns the results; not called with ``--from``.
        show: Prints them.
        draw: Draws them, as they were read from the file, as PNG.
    """
    try:
        path = options.source or write_results(options.output, tool, measure(options))
        results = read_results(path)
        show(results)
        print(f"\n{described(results['machine'])}\n$ {results['machine']['command']}")
        print(*(f"- {note}" for note in results["notes"]), f"results: {path}", sep="\n")
        if options.plot:
            draw(results, path.with_suffix(".png"))
            print(f"plot: {path.with_suffix('.png')}")
    except torch.OutOfMemoryError as error:
        print(
            f"{tool}: {str(error).splitlines()[0]} A smaller micro-batch may fit.", file=sys.stderr
        )
        return 2
    except (BenchmarkError, ModuleNotFoundError) as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return 2
    return 0
