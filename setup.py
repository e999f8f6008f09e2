"""Build megatron_rltd; everything about it but compiled code stands in pyproject.toml.

Nothing is compiled unless MEGATRON_RLTD_CUDA is set: 1 builds the kernels for GPUs and the CPU with
nvcc, for the architectures in TORCH_CUDA_ARCH_LIST; 0 those for the CPU only. They are built
against the torch of the environment (``pip install --no-build-isolation``), 2.10 or newer, and run
with any such.
"""

import os

from setuptools import setup

SOURCES = ["csrc/bindings.cpp", "csrc/sampling_cpu.cpp"]
CUDA_SOURCES = ["csrc/rows.cu", "csrc/sampling.cu"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"


def kernels(with_cuda: bool) -> dict:
    """Return the arguments of `setup` that compile the kernels."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ModuleNotFoundError as error:
        raise SystemExit(
            "MEGATRON_RLTD_CUDA builds against the torch that is installed: install torch, then "
            "pip install --no-build-isolation --no-deps ."
        ) from error
    # torch's stable ABI of 2.10, the first with all that is used.
    flags = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    options = {"name": "megatron_rltd._C", "py_limited_api": True}
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        flags.append("-DMEGATRON_RLTD_CUDA")
        extension = CUDAExtension(
            sources=SOURCES + CUDA_SOURCES,
            extra_compile_args={"cxx": flags, "nvcc": [*flags[:2], "-Xptxas=-v"]},
            # Not the shared CUDA runtime, whose version would have to be the installed torch's.
            extra_link_args=["-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread"],
            **options,
        )
        extension.libraries = ["torch_cpu"]
    else:
        extension = CppExtension(sources=SOURCES, extra_compile_args=flags, **options)
        extension.libraries = ["torch_cpu"]
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp312"}},
    }


asked = os.environ.get("MEGATRON_RLTD_CUDA", "")
if asked not in ("", "0", "1"):
    raise SystemExit(f"MEGATRON_RLTD_CUDA={asked} must be 1 (GPU and CPU), 0 (CPU only) or unset")
setup(**(kernels(asked == "1") if asked else {}))
