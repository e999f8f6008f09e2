"""The default command: run a Megatron training script, with random-LTD if its flags ask for it."""

import argparse
import os
import runpy
import socket
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import megatron_rltd
from megatron_rltd.config import ConfigError, ModelError, RankConfigError
from megatron_rltd.patching import mechanism, versions
from megatron_rltd.patching.mechanism import Patch, PatchError
from megatron_rltd.patching.versions import VersionError
from megatron_rltd.refusals import refuse_command_line

# Flags that Megatron knows only with our patches.
OUR_FLAGS = (
    *("-h", "--help", "--random-ltd", "--layer-token-lr", "--train-layer-tokens"),
    *("--early-bird", "--no-early-bird"),
)
_FOLDER = Path(megatron_rltd.__file__).parent / "pretrain"
BUNDLED = {name: _FOLDER / f"{name}.py" for name in ("pretrain_gpt", "pretrain_hybrid")}
WAIT_S = 5
CPU_FLAG, CPU_VARIABLE = "--cpu", "MEGATRON_RLTD_CPU"


def main(argv: list[str], commands: Iterable[str] = ()) -> int:
    """Run a script; return the exit status.

    Args:
        commands: What the user may have meant.
    """
    if argv[0].startswith("-"):
        return _fail_alike(f"the first argument must be a script or a command, not {argv[0]}")
    script = BUNDLED.get(argv[0], Path(argv[0]))
    if not script.is_file():
        known = f"bundled: {', '.join(BUNDLED)}; commands: {', '.join(commands)}"
        return _fail(f"there is no script {argv[0]}; {known}")
    try:
        args = prepare(script, argv[1:])
        sys.argv = [str(script), *args]
        runpy.run_path(str(script), run_name="__main__")
    except KeyboardInterrupt:
        return 130
    except (RankConfigError, VersionError, PatchError, ModelError) as error:
        return _fail(str(error))
    except ConfigError as error:
        return _fail_alike(str(error))
    return 0


def print_flags() -> None:
    """Print the flags that are added to those of a script."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # saves seconds of unneeded imports
    warnings.filterwarnings("ignore")
    from megatron_rltd.early_bird.arguments import add_arguments as add_early_bird
    from megatron_rltd.training.arguments import add_arguments

    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    parser.add_argument(
        CPU_FLAG,
        action="store_true",
        help=f"Run on the CPU, on a machine without a GPU; {CPU_VARIABLE}=1 does the same.",
    )
    print(add_early_bird(add_arguments(parser)).format_help())


def prepare(script: Path, args: list[str]) -> list[str]:
    """Prepare everything before the script imports Megatron.

    Returns:
        The arguments for the script.

    Raises:
        ConfigError: An argument prevents the check of ours.
        RankConfigError: The requested device is not there.
        VersionError: random-LTD was not tested with this Megatron.
    """
    # The script's folder comes first, as if python had been started with it: in a clone of
    # Megatron-LM it holds the megatron package to run with.
    sys.path.insert(0, str(script.resolve().parent))
    if _rank() != 0:
        warnings.filterwarnings("ignore")
    _set_rendezvous_of_one_process()
    if CPU_FLAG in args:
        args = [argument for argument in args if argument != CPU_FLAG]
        os.environ[CPU_VARIABLE] = "1"  # also for what the script starts
    versions.check_installed()
    replaced: list[Patch] = []
    on_cpu = os.environ.get(CPU_VARIABLE, "0") not in ("", "0")
    if on_cpu:
        replaced += _use_cpu()
    elif not {"-h", "--help"} & set(args):
        _check_gpu()
    from megatron_rltd.pretrain import compiled_helper

    replaced += compiled_helper.use(even_in_clone=on_cpu).patches
    if any(argument.startswith(OUR_FLAGS) for argument in args):
        refuse_command_line(args)
        versions.allow_untested(args)
        from megatron_rltd.training import patches
        from megatron_rltd.training.state import Training

        replaced += patches.apply(Training()).patches
    if replaced and _rank() == 0:
        table = mechanism.describe(replaced)
        print(f"megatron_rltd {megatron_rltd.__version__}: replaced symbols\n{table}", flush=True)
    return args


def _use_cpu() -> tuple[Patch, ...]:
    from megatron_rltd.cpu import adapter

    problem = adapter.why_no_training()
    if problem:
        raise RankConfigError([problem])
    return adapter.enable().patches


def _check_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    raise RankConfigError(
        [
            "no CUDA device is visible to this process"
            + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else "")
            + f": make one visible, or add {CPU_FLAG} to the script's arguments to run on the CPU"
        ]
    )


def _set_rendezvous_of_one_process() -> None:
    """Let a script run without torchrun: Megatron reads these variables."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    defaults = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _fail(message: str) -> int:
    """Say why this rank ends before it began; return the exit status."""
    who = f"megatron_rltd on {socket.gethostname()}, rank {_rank()}"
    print(f"{who}: {message}", file=sys.stderr, flush=True)
    return 2


def _fail_alike(message: str) -> int:
    """Say once on each node why every rank ends before it began; return the exit status."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"megatron_rltd: {message}", file=sys.stderr, flush=True)
    else:
        # torchrun ends all ranks when the first one ends, perhaps before one has said why.
        time.sleep(WAIT_S)
    return 2
