"""``python -m megatron_rltd --check``: what is installed here, and what would be patched."""

import platform
import sys
import textwrap
import warnings

from megatron_rltd import __version__
from megatron_rltd.patching import mechanism, versions

PACKAGES = ("megatron-core", "transformer-engine", "tensorboard", "matplotlib", "tokenizers")


def main() -> int:
    """Print the report; return 0 if random-LTD can run here and 1 if not."""
    warnings.filterwarnings("ignore")  # Megatron's, of what it does not find on a CPU
    if sys.version_info < (3, 12):  # noqa: UP036  not installed, only found beside a script
        print(f"{sys.executable} is Python {platform.python_version()}; 3.12 or newer is needed")
        return 1
    try:
        versions.require_installed()
    except versions.VersionError as error:
        print(error)
        return 1
    import torch

    from megatron_rltd.cpu import adapter
    from megatron_rltd.tokens import kernels
    from megatron_rltd.training import patches

    rows = [("megatron_rltd", __version__), ("Python", platform.python_version())]
    rows.append(("torch", torch.__version__))
    rows += [(name, versions.package_version(name) or "not installed") for name in PACKAGES]
    rows.append(("device", "CPU (gloo)" if adapter.is_needed() else torch.cuda.get_device_name()))
    device = "cpu" if adapter.is_needed() else "cuda"
    rows.append(("kernels", kernels.missing_for(device) or f"built for {device.upper()}"))
    rows.append(("Megatron in use", versions.megatron_version()))
    rows.append(("tested with", ", ".join(versions.tested_versions())))
    _print(rows)
    problems = versions.problems()
    no_training = adapter.why_no_training() if adapter.is_needed() else None
    problems += [no_training] if no_training else []
    print("\nPatched with --random-ltd:")
    for patch in versions.rows(patches.PATCHES):
        found = mechanism.check(patch, versions.known())
        problems += found
        print(
            f"  {'ok     ' if not found else 'PROBLEM'}  {patch.target}\n           {patch.reason}"
        )
    if adapter.is_needed():
        print("\nPatched to present the CPU to Megatron as its device:")
        rows_of_cpu = versions.rows(adapter.PATCHES)
        for reason in dict.fromkeys(patch.reason for patch in rows_of_cpu):
            text = ", ".join(patch.target for patch in rows_of_cpu if patch.reason == reason)
            print(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  "))
            print(f"           {reason}")
    print("\nOverridden on the attached model's own block and layers, or relied on:")
    for row in versions.rows(versions.RELIED_ON):
        print(f"  {row.target}")
    print("".join(f"\nPROBLEM: {problem}" for problem in problems) or "\nrandom-LTD can run here.")
    return 1 if problems else 0


def _print(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
