"""Plan a training run from its flags, before you rent a GPU for it.

    python -m megatron_rltd plan --gpus 64 -- --num-layers 24 ... --random-ltd ...
    python -m megatron_rltd plan --gpus 64 --tflops 400 --from train.sh
    python -m megatron_rltd plan --from flags.txt --plot plan.png -- --train-layer-tokens 200e9
    python -m megatron_rltd plan --gpus 64 --gpu h100 --from train.sh

Megatron itself reads and checks the flags, as in training. Give the flags after --. With --from,
flags after -- are added to those of the file. A file holds flags or a whole command; comments and
lines continued by a backslash are allowed. A shell script is run only if it knows DRY_RUN: with
DRY_RUN=1 it must print its command instead of running it.

The run is compared with dense runs on the same samples (iso-data) and on the same LayerTokens
(iso-compute). With --gpu, the plan also estimates how much time the run saves on such a GPU.
docs/planning.md explains the output.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rltd.commands.plan import gpu_estimate, report
from megatron_rltd.commands.plan.gpu_time import GPUS, Gpu
from megatron_rltd.commands.plan.megatron_arguments import PlanError
from megatron_rltd.commands.plan.planning import make_plan
from megatron_rltd.commands.run import BUNDLED

SHELL_SUFFIXES = (".sh", ".bash", ".sbatch", ".slurm")
DRY_RUN_TIMEOUT_S = 60


def split_command(words: list[str]) -> tuple[str | None, list[str]]:
    """Return the script of a training command and the flags that come after it.

    Args:
        words: Such as ``torchrun --nproc-per-node 8 -m megatron_rltd pretrain_gpt.py --lr 1``, a
            bundled script's name with flags, or flags alone.
    """
    if not words or words[0].startswith("--"):
        return None, words
    for i, word in enumerate(words):
        if word == "megatron_rltd" and words[i - 1] == "-m":
            return words[i + 1] if words[i + 1 :] else None, words[i + 2 :]
    if words[0] in BUNDLED:
        return words[0], words[1:]
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script is not None:
        return words[script], words[script + 1 :]
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    return None, words[first:]


def words_of(text: str) -> list[str]:
    """Return the words of shell text, without comments and line continuations.

    Raises:
        PlanError: A quotation does not end.
    """
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise PlanError(f"cannot read the flags: {error}") from error
    # shlex makes a word, or the end of one, of an escaped end of a line; so it does of a backslash
    # with a comment after it.
    return [word.rstrip("\n") for word in words if not word.isspace()]


def words_of_file(path: Path) -> list[str]:
    """Return the words of a file of flags or of the command that a script prints.

    Raises:
        PlanError: The file cannot be read, or is a script that does not know DRY_RUN or prints no
            command.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"--from {path}: {error}") from error
    if path.suffix not in SHELL_SUFFIXES and not re.match(r"#!.*sh\b", text):
        return words_of(text)
    if not re.search(r"^[^#\n]*DRY_RUN", text, re.MULTILINE):
        raise PlanError(
            f"--from {path}: the script does not know DRY_RUN, so running it would train; give its "
            "flags after -- or in a file of flags"
        )
    return words_of(_dry_run(path))


def _dry_run(path: Path) -> str:
    """Return the last command that a script prints with DRY_RUN=1."""
    try:
        result = subprocess.run(
            ["bash", str(path)],
            env={**os.environ, "DRY_RUN": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DRY_RUN_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlanError(f"--from {path}: {error}") from error
    if result.returncode:
        said = (result.stderr.strip() or "no message").splitlines()[-1]
        raise PlanError(f"--from {path}: exit status {result.returncode} with DRY_RUN=1: {said}")
    lines = result.stdout.replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.search(r"(^|\s)--\w", line)]
    if not commands:
        raise PlanError(f"--from {path}: it printed no command with DRY_RUN=1")
    return commands[-1]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise PlanError(f"{message} (see --help)")


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    number.__name__ = f"positive {kind.__name__}"  # what argparse calls it
    return number


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options and the words after --.

    Raises:
        PlanError: An option is wrong.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    parser = _Parser(
        prog="python -m megatron_rltd plan",
        usage="%(prog)s [options] (-- FLAGS | --from FILE [-- FLAGS])",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--from", type=Path, metavar="FILE", dest="file", help="a file of flags, or a script")
    add("--gpus", type=_positive(int), metavar="N", help="world size (default: one replica)")
    add("--tflops", type=_positive(float), metavar="X", help="TFLOP/s per GPU, to print hours")
    add("--dense-tokens", type=_positive(int), metavar="N", help="and a dense run of N tokens")
    add("--gpu", choices=GPUS, help="estimate what the run saves in time on such GPUs")
    add("--gpu-tflops", type=_positive(float), metavar="X", help="its bf16 TFLOP/s")
    add("--gpu-bandwidth", type=_positive(float), metavar="X", help="its copy bandwidth, TB/s")
    add("--gpu-sms", type=_positive(int), metavar="N", help="its number of multiprocessors")
    add("--json", action="store_true", help="print JSON with more numbers")
    add("--plot", type=Path, metavar="PNG", help="draw kept tokens and learning rate")
    options = parser.parse_args(argv[:split])
    if options.file is None and split == len(argv):
        parser.error("give the flags of training after --, or --from FILE")
    return options, argv[split + 1 :]


def chosen_gpu(options: argparse.Namespace) -> Gpu | None:
    """Return the GPU to estimate for, or None.

    Raises:
        PlanError: It is described in part.
    """
    fields = {"tflops": "tflops", "bandwidth": "bandwidth", "multiprocessors": "sms"}
    given = {field: getattr(options, f"gpu_{name}") for field, name in fields.items()}
    given = {field: value for field, value in given.items() if value}
    if options.gpu:
        return dataclasses.replace(GPUS[options.gpu], **given)
    if not given:
        return None
    if len(given) < len(fields):
        raise PlanError("give all of --gpu-tflops, --gpu-bandwidth and --gpu-sms, or --gpu")
    return Gpu(**given)


def main(argv: list[str] | None = None) -> int:
    """Print the plan, write the files asked for; return the exit status."""
    try:
        options, words = parse_args(sys.argv[1:] if argv is None else argv)
        script, flags = split_command(words_of_file(options.file) if options.file else words)
        if options.file:
            flags = flags + words
        if script and Path(script).is_file():
            # As in training: in a clone of Megatron-LM the script's folder holds its megatron.
            sys.path.insert(0, str(Path(script).resolve().parent))
        gpu = chosen_gpu(options)
        of_vit = script is not None and Path(script).stem == "finetune_vit"
        plan = make_plan(flags, options.gpus, options.dense_tokens, of_vit)
        found = gpu_estimate.estimate(plan, gpu) if gpu else None
        if options.json:
            numbers = report.as_numbers(plan, options.tflops) | {"estimate": found}
            text = json.dumps(numbers, indent=1)
        else:
            text = report.as_text(plan, options.tflops)
            text += f"\n\n{gpu_estimate.as_text(found)}" if found else ""
        if options.plot:
            report.draw(plan, options.plot)
    except (PlanError, OSError, ModuleNotFoundError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
