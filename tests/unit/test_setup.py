"""What setup.py finds of CUDA, and how it refuses what it cannot build with."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parallel import ROOT

ALL = "80 90 100"


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("setup_of_megatron_rltd", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch, tmp_path, setup):
    """No CUDA is set, on PATH or in the usual place."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    monkeypatch.setattr(setup, "USUAL_HOME", str(tmp_path / "usual"))


def toolkit(home: Path, architectures: str = ALL, runtime: str = "lib64", top: str = "") -> Path:
    """Make a CUDA toolkit of a runtime and an nvcc that says what it knows and where it is from."""
    listed = "; ".join(f"echo compute_{number}" for number in architectures.split())
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"--list-gpu-arch) {listed or 'echo nvcc fatal: unknown option >&2; exit 1'};;\n"
        f"--dryrun) echo '#$ TOP={top or home}/bin/..' >&2; exit 1;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    if runtime:
        library = home / runtime / "libcudart_static.a"
        library.parent.mkdir(parents=True)
        library.touch()
    return home


def refusal(function, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.startswith("MEGATRON_RLTD_CUDA=1: ")
    assert message.endswith(", or build for the CPU only with MEGATRON_RLTD_CUDA=0")
    assert "\n" not in message
    return message


def test_a_torch_without_cuda(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    message = refusal(setup.kernels, True)
    assert f"torch {torch.__version__} has no CUDA; install a torch with CUDA" in message


def test_no_nvcc(setup, monkeypatch, tmp_path):
    message = refusal(setup.cuda_toolkit)
    assert f"{tmp_path}/usual (from the usual place, because no nvcc is on PATH) has no" in message
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    message = refusal(setup.cuda_toolkit)
    assert f"no whole CUDA toolkit: {tmp_path} (from CUDA_HOME) has no bin/nvcc; set" in message
    toolkit(tmp_path / "cuda").joinpath("bin/nvcc").chmod(0o644)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert "has no bin/nvcc" in refusal(setup.cuda_toolkit)


@pytest.mark.parametrize("runtime", ["lib64", "lib", "targets/x86_64-linux/lib"])
@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "the usual place"])
def test_a_toolkit_in_a_named_folder(setup, monkeypatch, tmp_path, runtime, name):
    home = toolkit(tmp_path / ("usual" if " " in name else "cuda"), runtime=runtime)
    if " " not in name:
        monkeypatch.setenv(name, str(home))
    assert setup.cuda_toolkit() == (home, home / runtime / "libcudart_static.a")


def test_a_toolkit_on_the_path(setup, monkeypatch, tmp_path):
    home = toolkit(tmp_path / "cuda")
    monkeypatch.setenv("PATH", f"{home / 'bin'}")
    assert setup.cuda_toolkit()[0] == home


@pytest.mark.parametrize("linked", [True, False], ids=["link", "script"])
def test_nvcc_on_the_path_that_leads_elsewhere(setup, monkeypatch, tmp_path, linked):
    home = toolkit(tmp_path / "cuda")
    programs = tmp_path / "local" / "bin"
    if linked:
        programs.mkdir(parents=True)
        (programs / "nvcc").symlink_to(home / "bin" / "nvcc")
    else:
        toolkit(programs.parent, runtime="", top=str(home))
    monkeypatch.setenv("PATH", str(programs))
    assert setup.cuda_toolkit() == (home, home / "lib64/libcudart_static.a")


def test_a_toolkit_without_the_static_runtime(setup, monkeypatch, tmp_path):
    home = toolkit(tmp_path / "cuda", runtime="")
    monkeypatch.setenv("PATH", f"{home / 'bin'}")
    message = refusal(setup.cuda_toolkit)
    assert f"{home} (from {home}/bin/nvcc on PATH) has no" in message
    assert "no libcudart_static.a in lib64, lib, targets/x86_64-linux/lib" in message
    assert "; set CUDA_HOME to the folder of a whole toolkit" in message


@pytest.mark.parametrize(
    ("known", "built"),
    [(ALL, "8.0;9.0;10.0+PTX"), ("75 80 89 90", "8.0;9.0+PTX"), ("90 100 120", "9.0;10.0+PTX")],
)
def test_default_architectures_are_those_that_nvcc_knows(setup, tmp_path, known, built):
    assert setup.architectures(toolkit(tmp_path / "cuda", known) / "bin/nvcc") == built


def test_an_nvcc_that_knows_no_architecture_of_the_default(setup, tmp_path):
    nvcc = toolkit(tmp_path / "new", "110 120") / "bin/nvcc"
    message = refusal(setup.architectures, nvcc)
    assert f"{nvcc} knows none of 8.0 9.0 10.0 (it knows 11.0 12.0)" in message
    nvcc = toolkit(tmp_path / "ancient", "") / "bin/nvcc"
    message = refusal(setup.architectures, nvcc)
    assert f"{nvcc} --list-gpu-arch names no architecture (nvcc fatal: unknown option)" in message


@pytest.mark.parametrize("asked", ["9.0", "8.0 9.0a+PTX", "8.0;9.0", "Hopper", "native"])
def test_architectures_that_the_user_names(setup, monkeypatch, tmp_path, asked):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup.architectures(toolkit(tmp_path / "cuda", "80 90") / "bin/nvcc") == asked


def test_an_architecture_of_the_user_that_nvcc_lacks(setup, monkeypatch, tmp_path):
    nvcc = toolkit(tmp_path / "cuda", "80 90") / "bin/nvcc"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;10.0a+PTX")
    message = refusal(setup.architectures, nvcc)
    asks = f"{nvcc} lacks 10.0, which TORCH_CUDA_ARCH_LIST=9.0;10.0a+PTX asks for"
    assert f"{asks} (it knows 8.0 9.0)" in message


def test_a_refused_build_prints_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "MEGATRON_RLTD_CUDA": "1", "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("MEGATRON_RLTD_CUDA=1: ")
