"""The compiled kernels: built here, and held against the reference by the tests of the ops."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rltd import kernels
from tests.parallel import ROOT, environment

TORCH = Path(torch.__file__).parent
CUDA = next(
    (
        str(folder)
        for folder in (Path(os.environ.get("CUDA_HOME", "/")), Path("/usr/local/cuda"))
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists()
    ),
    None,
)
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")
needs_nvcc = pytest.mark.skipif(
    not (CUDA and shutil.which("c++")), reason="no CUDA toolkit with nvcc here"
)
EXACT = "library or compile"  # the tests that compare with the reference


def build(folder: Path, cuda: str) -> tuple[Path, str]:
    """Build as ``pip install .`` does, into a folder; return the library and what was printed."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)]
    result = subprocess.run(
        [*command, "--build-temp", str(folder / "temp")],
        cwd=ROOT,
        env={**os.environ, "MEGATRON_RLTD_CUDA": cuda, **({"CUDA_HOME": CUDA} if CUDA else {})},
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    (library,) = folder.glob("megatron_rltd/_C*.so")
    return library, output


def run_tests(library: Path, *arguments: str) -> str:
    """Run tests of the ops with a library; return pytest's summary."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**environment(), "MEGATRON_RLTD_KERNELS": str(library)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    return result.stdout.splitlines()[-1]


def kernels_of(library: Path, device: str) -> str:
    """Return what `kernels.missing_for` says with a library."""
    code = f"from megatron_rltd import kernels, ops; print(kernels.missing_for({device!r}))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**environment(), "MEGATRON_RLTD_KERNELS": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


@needs_compiler
def test_kernels_for_the_cpu(tmp_path):
    library, _ = build(tmp_path, cuda="0")
    assert kernels_of(library, "cpu") == "None"
    assert "built without CUDA" in kernels_of(library, "cuda")
    assert "passed" in run_tests(library, "tests/test_ops.py", "tests/test_layer.py")


@needs_nvcc
def test_kernels_for_gpus_compile_without_spills(tmp_path):
    library, output = build(tmp_path, cuda="1")
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", output)
    # 5 moves of 5 widths, a mask, 2 samplings, each for 3 architectures.
    assert len(spills) == (5 * 5 + 1 + 2) * 3
    assert set(spills) == {("0", "0", "0")}
    assert kernels_of(library, "cuda") == "None"
    # No CUDA library beside torch's own, whose version would have to agree.
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True).stdout
    assert "libtorch_cpu" in needed
    assert "libcudart" not in needed
    assert "passed" in run_tests(library, "tests/test_ops.py", "-k", EXACT)


@needs_compiler
def test_the_code_of_the_gpu_kernels_on_a_cpu(tmp_path):
    # tests/emulated_cuda.h runs each CUDA thread as one of the CPU's.
    library = tmp_path / "emulated.so"
    sources = ["csrc/bindings.cpp", "csrc/sampling_cpu.cpp"]
    subprocess.run(
        ["c++", "-O2", "-std=c++20", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        + ["-DMEGATRON_RLTD_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        + [f"-I{TORCH / 'include'}", "-include", "tests/emulated_cuda.h", *sources]
        + ["-x", "c++", "csrc/rows.cu", "csrc/sampling.cu", "-o", str(library)]
        + [f"-L{TORCH / 'lib'}", "-ltorch_cpu"],
        cwd=ROOT,
        check=True,
    )
    exact = "auto and (equal_the_ref or as_the_ref)"
    assert "passed" in run_tests(library, "tests/test_ops.py", "-k", exact)


@needs_compiler
@pytest.mark.parametrize("value", ["yes", "2"])
def test_unknown_way_to_build(tmp_path, value):
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "MEGATRON_RLTD_CUDA": value},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert f"MEGATRON_RLTD_CUDA={value} must be" in result.stderr


def test_a_library_that_does_not_load(tmp_path):
    library = tmp_path / "_C.so"
    library.write_text("no library")
    assert "built for another torch" in kernels_of(library, "cpu")


def test_a_model_on_a_gpu_without_kernels_says_how_to_build_them(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "load", lambda: "not built")
    kernels.warn_if_missing("cpu")
    assert not caplog.records
    kernels.warn_if_missing("cuda")
    assert "plain torch, for the kernels are not built" in caplog.text
