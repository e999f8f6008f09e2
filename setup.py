"""Build the compiled code of megatron_rltd; everything else is in pyproject.toml.

Nothing is compiled unless MEGATRON_RLTD_CUDA is set. 1 builds the kernels for GPUs and the CPU with
nvcc, for the architectures in TORCH_CUDA_ARCH_LIST. 0 builds only those for the CPU. They are built
against the torch of the environment (``pip install --no-build-isolation``), 2.10 or newer, and run
with any such version.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

SOURCES = ["csrc/bindings.cpp", "csrc/sampling_cpu.cpp"]
CUDA_SOURCES = ["csrc/rows.cu", "csrc/sampling.cu"]
ARCHITECTURES = ("8.0", "9.0", "10.0")  # those of them that nvcc knows, and PTX of the last
USUAL_HOME = "/usr/local/cuda"
RUNTIME = "libcudart_static.a"
FOLDERS = (
    *("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"),
    f"lib/{platform.machine()}-linux-gnu",  # Debian's own packages
)
WITHOUT_GPU = "or build for the CPU only with MEGATRON_RLTD_CUDA=0"


def refuse(reason: str, way_out: str) -> SystemExit:
    """Return what ends a build for GPUs, with a message of one line."""
    return SystemExit(f"MEGATRON_RLTD_CUDA=1: {reason}; {way_out}, {WITHOUT_GPU}")


def cuda_homes() -> list[tuple[Path, str]]:
    """Return folders that may hold CUDA, from torch's guesses and from nvcc, with their source."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return [(Path(os.environ[name]), name)]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return [(Path(USUAL_HOME), "the usual place, because no nvcc is on PATH")]
    homes = [(Path(nvcc).parent.parent, f"{nvcc} on PATH")]
    # It may be a link or a script that leads elsewhere.
    asked = (str(Path(nvcc).resolve()), "--dryrun", "-c", "none.cu")
    said = re.search(r"TOP=(.+)", _run(*asked).stderr)
    if said and Path(said[1]).resolve() != homes[0][0].resolve():
        homes.append((Path(said[1]).resolve(), f"{nvcc} --dryrun"))
    return homes


def cuda_toolkit() -> tuple[Path, Path]:
    """Return the folder of a CUDA toolkit and the static CUDA runtime in it.

    Raises:
        SystemExit: There is none that is whole.
    """
    faults = []
    for home, whence in cuda_homes():
        nvcc = shutil.which(home / "bin" / "nvcc")
        runtimes = [home / folder / RUNTIME for folder in FOLDERS]
        runtime = next((path for path in runtimes if path.exists()), None)
        if nvcc and runtime:
            return home, runtime
        missing = f"{RUNTIME} in {', '.join(FOLDERS)}" if nvcc else "bin/nvcc"
        faults.append(f"{home} (from {whence}) has no {missing}")
    raise refuse(
        f"no whole CUDA toolkit: {' and '.join(faults)}",
        "set CUDA_HOME to the folder of a whole toolkit",
    )


def architectures(nvcc: Path) -> str:
    """Return what to set TORCH_CUDA_ARCH_LIST to: what the user says, or what suits nvcc.

    Raises:
        SystemExit: nvcc lacks an architecture that the user names, or all of the default.
    """
    listed = _run(str(nvcc), "--list-gpu-arch")
    known = re.findall(r"compute_(\d+)", listed.stdout)
    if not known:
        said = " ".join((listed.stderr or listed.stdout).split())
        raise refuse(f"{nvcc} --list-gpu-arch names no architecture ({said})", "set CUDA_HOME")
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    # Of a name such as Hopper torch knows the numbers.
    wanted = re.findall(r"\d+\.\d", asked) if asked else ARCHITECTURES
    lacking = [number for number in wanted if number.replace(".", "") not in known]
    there = "it knows " + " ".join(f"{number[:-1]}.{number[-1]}" for number in known)
    if asked and lacking:
        reason = f"{nvcc} lacks {' '.join(lacking)}, which TORCH_CUDA_ARCH_LIST={asked} asks for"
        raise refuse(f"{reason} ({there})", "remove them or set CUDA_HOME to a newer toolkit")
    if not asked and len(lacking) == len(wanted):
        reason = f"{nvcc} knows none of {' '.join(wanted)} ({there})"
        raise refuse(reason, "set TORCH_CUDA_ARCH_LIST or CUDA_HOME")
    return asked or ";".join(number for number in wanted if number not in lacking) + "+PTX"


def _run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


def kernels(with_cuda: bool) -> dict:
    """Return the arguments of `setup` that compile the kernels."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise SystemExit(
            "MEGATRON_RLTD_CUDA builds against the installed torch: install torch, then run "
            "pip install --no-build-isolation --no-deps ."
        ) from error
    if with_cuda:
        if torch.version.cuda is None:
            raise refuse(f"torch {torch.__version__} has no CUDA", "install a torch with CUDA")
        home, runtime = cuda_toolkit()
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(home / "bin" / "nvcc")
        os.environ["CUDA_HOME"] = str(home)  # before torch guesses, at import
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # torch's stable ABI of 2.10, the first with all that is used.
    flags = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    options = {"name": "megatron_rltd._C", "py_limited_api": True}
    if with_cuda:
        flags.append("-DMEGATRON_RLTD_CUDA")
        extension = CUDAExtension(
            sources=SOURCES + CUDA_SOURCES,
            extra_compile_args={"cxx": flags, "nvcc": [*flags[:2], "-Xptxas=-v"]},
            # Not the shared CUDA runtime: its version would have to match the installed torch.
            extra_link_args=[str(runtime), "-ldl", "-lrt", "-lpthread"],
            **options,
        )
    else:
        extension = CppExtension(sources=SOURCES, extra_compile_args=flags, **options)
    extension.libraries = ["torch_cpu"]
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp312"}},
    }


if __name__ == "__main__":
    asked = os.environ.get("MEGATRON_RLTD_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(
            f"MEGATRON_RLTD_CUDA={asked} must be 1 (GPU and CPU), 0 (CPU only) or unset"
        )
    setup(**(kernels(asked == "1") if asked else {}))
