"""The compiled kernels: built here, and held against the reference by the tests of the ops."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_rltd.tokens import kernels, ops
from tests.parallel import ROOT, environment
from tests.unit.op_cases import OPERATIONS

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
    not (CUDA and torch.version.cuda and shutil.which("c++")),
    reason="no CUDA toolkit with nvcc here, or a torch without CUDA",
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


def python(code: str, library: Path, **more: str) -> subprocess.CompletedProcess:
    """Run code in a new Python that loads a library."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**environment(), "MEGATRON_RLTD_KERNELS": str(library), **more},
        capture_output=True,
        text=True,
    )


def kernels_of(library: Path, device: str) -> str:
    """Return what `kernels.missing_for` says with a library."""
    code = f"from megatron_rltd.tokens import kernels, ops; print(kernels.missing_for({device!r}))"
    result = python(code, library)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


@pytest.fixture(scope="module")
def for_gpus(tmp_path_factory) -> tuple[Path, str]:
    """The library for GPUs, which takes long to build, and what building it printed."""
    return build(tmp_path_factory.mktemp("gpu"), cuda="1")


@needs_compiler
def test_kernels_for_the_cpu(tmp_path):
    library, _ = build(tmp_path, cuda="0")
    assert kernels_of(library, "cpu") == "None"
    assert "built without CUDA" in kernels_of(library, "cuda")
    assert "passed" in run_tests(library, "tests/unit/test_ops.py", "tests/megatron/test_layer.py")
    # torch's own errors, such as that of too little memory, reach the user.
    result = python(TOO_MUCH_MEMORY, library)
    assert "RuntimeError: megatron_rltd: " in result.stderr
    assert "can't allocate memory" in result.stderr


TOO_MUCH_MEMORY = """
import torch
from megatron_rltd.tokens import ops
hidden, indices = torch.zeros(2**20, 1, 1), torch.arange(2**20, dtype=torch.int32)[None]
ops.gather_tokens(hidden.expand(-1, -1, 2**27), indices)
"""


@pytest.mark.thorough
@needs_nvcc
def test_kernels_for_gpus_compile_without_spills(for_gpus):
    library, output = for_gpus
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", output)
    # 5 moves of 5 widths, 2 masks, 2 samplings, each for 3 architectures.
    assert len(spills) == (5 * 5 + 2 + 2) * 3
    assert set(spills) == {("0", "0", "0")}
    # An SM has 65,536 registers: four blocks of 256 threads, for enough loads in flight.
    used = re.findall(r"'(\w+)' for 'sm_90'.*?Used (\d+) registers", output, re.DOTALL)
    wide = {name: int(n) for name, n in used if "move_kernel" in name and "uint4" in name}
    assert len(wide) == 5
    assert max(wide.values()) <= 64, wide
    assert kernels_of(library, "cuda") == "None"
    # No CUDA library beside torch's own, whose version would have to agree.
    needed = subprocess.run(["ldd", str(library)], capture_output=True, text=True).stdout
    assert "libtorch_cpu" in needed
    assert "libcudart" not in needed
    assert "passed" in run_tests(library, "tests/unit/test_ops.py", "-k", EXACT)


EVERY_OP = """
import json, torch
from megatron_rltd.tokens import kernels, ops
from megatron_rltd.model.random_ltd import ConfigError, RandomLTD, RandomLTDConfig
from tests.unit.op_cases import OPERATIONS, random_case
said = {"missing": kernels.missing_for("cuda")}
case = random_case((6, 2, 8, 4, 2), torch.float32, seed=0)
for name, operation in OPERATIONS.items():
    try:
        operation(torch.ops.megatron_rltd, case)
    except RuntimeError as error:
        said[name] = str(error)
try:
    RandomLTD(RandomLTDConfig(ramp_iters=9, backend="cuda"))
except ConfigError as error:
    said["refused"] = str(error)
RandomLTD(RandomLTDConfig(ramp_iters=9, backend="auto"))
print(json.dumps(said))
"""


def errors_of_ops(library: Path, folder: Path, *flags: str) -> dict[str, str]:
    """Return what each op says of tensors that tests/unit/gpu_stand_in.cpp makes the GPU's."""
    stand_in = folder / "stand_in.so"
    source = ["tests/unit/gpu_stand_in.cpp", "-o", str(stand_in)]
    subprocess.run(["c++", "-shared", "-fPIC", *flags, *source], cwd=ROOT, check=True)
    # Where there is a GPU, CUDA would take their addresses for its own.
    result = python(EVERY_OP, library, LD_PRELOAD=str(stand_in), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    said = json.loads(result.stdout)
    assert {name.rstrip("_") for name in ops._SCHEMAS} <= set(OPERATIONS)
    assert set(OPERATIONS) <= set(said), "an op took these for tensors on the CPU"
    printed = "an error in torch, which has printed it"  # before 2.13
    return {k: v and v.replace(printed, result.stderr) for k, v in said.items()}


@pytest.mark.thorough
@needs_nvcc
@pytest.mark.parametrize("error", ["CUDA error: ", ""], ids=["torch's", "the launch's"])
def test_every_op_on_a_gpu_gets_to_cuda_and_says_what_fails(for_gpus, tmp_path, error):
    said = errors_of_ops(for_gpus[0], tmp_path, *([] if error else ["-DSTREAM"]))
    assert said["missing"] is None
    assert "refused" not in said
    no_gpu = f"megatron_rltd: .*{error}(CUDA driver version|no CUDA-capable device)"
    for name in OPERATIONS:
        assert re.search(no_gpu, said[name], re.DOTALL)
        assert ("CUDA error: " in said[name]) == bool(error)


@pytest.mark.thorough
@needs_nvcc
def test_a_torch_without_cuda_streams_has_no_kernels_for_gpus(for_gpus, tmp_path):
    said = errors_of_ops(for_gpus[0], tmp_path, "-DWITHOUT_LIBTORCH_CUDA")
    reason = (
        "built for CUDA, but this torch has no function aoti_torch_get_current_cuda_stream: "
        "its libtorch_cuda.so is not loaded"
    )
    assert reason in said["missing"]
    assert re.search(f"--random-ltd-backend cuda: .*{reason}.*backend auto", said["refused"])
    for name in OPERATIONS:
        assert f"megatron_rltd: the kernels are {reason}" in said[name]


@pytest.mark.thorough
@needs_compiler
def test_the_code_of_the_gpu_kernels_on_a_cpu(tmp_path):
    # tests/unit/emulated_cuda.h runs each CUDA thread as one of the CPU's.
    library = tmp_path / "emulated.so"
    sources = ["csrc/bindings.cpp", "csrc/sampling_cpu.cpp"]
    subprocess.run(
        ["c++", "-O2", "-std=c++20", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        + ["-DMEGATRON_RLTD_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        + [f"-I{TORCH / 'include'}", "-include", "tests/unit/emulated_cuda.h", *sources]
        + ["-x", "c++", "csrc/rows.cu", "csrc/sampling.cu", "-o", str(library)]
        + [f"-L{TORCH / 'lib'}", "-ltorch_cpu"],
        cwd=ROOT,
        check=True,
    )
    exact = "auto and (equal_the_ref or as_the_ref)"
    assert "passed" in run_tests(library, "tests/unit/test_ops.py", "-k", exact)


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
    assert "plain torch, because the kernels are not built" in caplog.text
