"""``python -m megatron_rltd check``: what is installed here, and what random-LTD would replace."""

import platform
import sys
import warnings

from megatron_rltd import __version__
from megatron_rltd.commands.text_table import aligned
from megatron_rltd.patching import mechanism, versions

PACKAGES = ("megatron-core", "transformer-engine", "tensorboard", "matplotlib", "tokenizers")


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 0 if random-LTD can run here and 1 if not."""
    warnings.filterwarnings("ignore")  # Megatron warns about packages that it does not find
    if sys.version_info < (3, 12):  # noqa: UP036  not installed, only found beside a script
        print(f"{sys.executable} is Python {platform.python_version()}; use Python 3.12 or newer")
        return 1
    try:
        versions.check_installed()
    except versions.VersionError as error:
        print(error)
        return 1
    import torch

    from megatron_rltd.cpu import adapter
    from megatron_rltd.tokens import kernels
    from megatron_rltd.training import patches
    from megatron_rltd.training.state import Training

    rows = [("megatron_rltd", __version__), ("Python", platform.python_version())]
    rows.append(("torch", torch.__version__))
    rows += [(name, versions.package_version(name) or "not installed") for name in PACKAGES]
    rows.append(("device", "CPU (gloo)" if adapter.is_needed() else torch.cuda.get_device_name()))
    device = "cpu" if adapter.is_needed() else "cuda"
    rows.append(("kernels", kernels.missing_for(device) or f"built for {device.upper()}"))
    rows.append(("Megatron in use", versions.megatron_version()))
    rows.append(("tested with", ", ".join(versions.tested_versions())))
    print(aligned([list(row) for row in rows]))
    problems = versions.find_problems()
    no_training = adapter.why_no_training() if adapter.is_needed() else None
    problems += [no_training] if no_training else []
    print("\nReplaced with --random-ltd:")
    tested = versions.tested_fingerprints()
    for patch in versions.rows_for_release(patches.patches_of(Training())):
        found = mechanism.find_problems(patch, tested)
        problems += found
        print(
            f"  {'ok     ' if not found else 'PROBLEM'}  {patch.target}\n           {patch.reason}"
        )
    if adapter.is_needed():
        print("\nReplaced with --cpu, to present the CPU to Megatron as its device:")
        print(mechanism.describe(versions.rows_for_release(adapter.PATCHES)))
    print("\nOverridden on the attached model's own block and layers, or relied on:")
    for row in versions.rows_for_release(versions.RELIED_ON):
        print(f"  {row.target}")
    print("".join(f"\nPROBLEM: {problem}" for problem in problems) or "\nrandom-LTD can run here.")
    return 1 if problems else 0
