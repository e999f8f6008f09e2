"""Say what is installed here, what random-LTD replaces in it, and whether it can run.

    python -m megatron_rltd check                      with the Megatron in use
    python -m megatron_rltd check --against PATH       what another Megatron changed of it

The exit status is 0 if random-LTD can run (with the other Megatron) and 1 if not. Put the output of
the first command into a bug report.
"""

import argparse
import platform
import sys
import warnings
from pathlib import Path

from megatron_rltd import __version__
from megatron_rltd.commands import upstream
from megatron_rltd.commands.text_table import aligned
from megatron_rltd.patching import mechanism, versions
from megatron_rltd.patching.mechanism import Patch

PACKAGES = ("megatron-core", "transformer-engine", "tensorboard", "matplotlib", "tokenizers")


def main(argv: list[str] | None = None) -> int:
    """Print the report; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_rltd check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="PATH",
        help="a Megatron-LM checkout, or a site-packages folder with a megatron package",
    )
    against = parser.parse_args(argv).against
    warnings.filterwarnings("ignore")  # Megatron's, about what it does not find on a CPU
    if sys.version_info < (3, 12):  # noqa: UP036  not installed, only found beside a script
        print(f"{sys.executable} is Python {platform.python_version()}; use Python 3.12 or newer")
        return 1
    try:
        versions.check_installed()
        return _check_against(against) if against else _check_here()
    except versions.VersionError as error:
        print(error)
        return 1


def _touched() -> tuple[Patch, ...]:
    """Return a row for each function of Megatron that is replaced or relied on."""
    from megatron_rltd.cpu import adapter
    from megatron_rltd.pretrain import compiled_helper
    from megatron_rltd.training import patches
    from megatron_rltd.training.state import Training

    rows = patches.patches_of(Training()) + versions.RELIED_ON
    rows += compiled_helper.PATCHES + adapter.PATCHES
    return tuple(row for row in rows if row.target.startswith("megatron."))


def _check_against(other: Path) -> int:
    import megatron.core

    version = upstream.read_version(other)
    release = tuple(int(number) for number in version.split(".")[:2])
    rows = [row for row in _touched() if row.is_for(release)]
    report, changed = upstream.compare(other, Path(megatron.core.__file__).parents[2], rows)
    print(f"megatron-core {version} against {versions.megatron_version()}, the one in use:")
    print(report)
    if changed:
        print(f"\n{changed} functions are not as in any tested version.")
        return 1
    print("\nEvery function is as in a tested version.")
    return 0


def _check_here() -> int:
    import torch

    from megatron_rltd.cpu import adapter
    from megatron_rltd.pretrain import compiled_helper
    from megatron_rltd.tokens import kernels
    from megatron_rltd.training import patches
    from megatron_rltd.training.state import Training

    on_cpu = adapter.is_needed()
    rows = [("megatron_rltd", __version__), ("Python", platform.python_version())]
    rows.append(("torch", torch.__version__))
    rows += [(name, versions.package_version(name) or "not installed") for name in PACKAGES]
    rows.append(("device", "CPU (gloo)" if on_cpu else torch.cuda.get_device_name()))
    device = "cpu" if on_cpu else "cuda"
    rows.append(("kernels", kernels.missing_for(device) or f"built for {device.upper()}"))
    rows.append(("Megatron in use", versions.megatron_version()))
    rows.append(("tested with", ", ".join(versions.tested_versions())))
    print(aligned([list(row) for row in rows], left_aligned=True))
    problems = versions.find_problems()
    no_training = adapter.why_no_training() if on_cpu else None
    problems += [no_training] if no_training else []
    is_wheel = not compiled_helper.can_be_made()
    if is_wheel or on_cpu:
        when = "always, because this Megatron is a wheel" if is_wheel else "with --cpu"
        print(f"\nReplaced {when}:")
        print(mechanism.describe(compiled_helper.PATCHES))
    print("\nReplaced with --random-ltd:")
    tested = versions.tested_fingerprints()
    for patch in versions.rows_for_release(patches.patches_of(Training())):
        found = mechanism.find_problems(patch, tested)
        problems += found
        print(
            f"  {'ok     ' if not found else 'PROBLEM'}  {patch.target}\n           {patch.reason}"
        )
    print("\nReplaced with --cpu, to present the CPU to Megatron as its device:")
    print(mechanism.describe(versions.rows_for_release(adapter.PATCHES)))
    print("\nOverridden on the attached model's own block and layers, or relied on:")
    for row in versions.rows_for_release(versions.RELIED_ON):
        print(f"  {row.target}")
    where = "here with --cpu" if on_cpu else "here"
    lines = "".join(f"\nPROBLEM: {problem}" for problem in problems)
    print(lines or f"\nrandom-LTD can run {where}.")
    return 1 if problems else 0
