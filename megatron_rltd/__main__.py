"""Run a Megatron training script with random-LTD, unmodified.

    python -m megatron_rltd SCRIPT ARGS...                  one process
    torchrun ... -m megatron_rltd SCRIPT ARGS...            many
    python -m megatron_rltd --check                         what is installed and would be patched
    python -m megatron_rltd --help                          the flags that it adds to ARGS

SCRIPT is a path, or pretrain_gpt for the script that comes with this package. Without --random-ltd
among ARGS nothing of Megatron's training is patched.
"""

import argparse
import os
import runpy
import socket
import sys
import warnings
from pathlib import Path

from megatron_rltd import __version__
from megatron_rltd.config import ConfigError, add_arguments
from megatron_rltd.patching import versions
from megatron_rltd.patching.versions import VersionError
from megatron_rltd.refusals import refuse_command_line

OURS = ("-h", "--help", "--random-ltd", "--layer-token-lr", "--train-layer-tokens")
BUNDLED = {"pretrain_gpt": Path(__file__).parent / "pretrain_gpt.py"}


def main(argv: list[str]) -> int:
    """Run the script or the check; return the exit status."""
    if argv and argv[0] == "--check":
        from megatron_rltd.commands.check import main as check

        return check()
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip(), flush=True)
        return _print_flags() if argv else 2
    if argv[0].startswith("-"):
        return _error(f"the first argument must be a script, not {argv[0]}")
    script = BUNDLED.get(argv[0], Path(argv[0]))
    if not script.is_file():
        return _error(f"there is no script {argv[0]}; bundled: {', '.join(BUNDLED)}")
    try:
        prepare(script, argv[1:])
        sys.argv = [str(script), *argv[1:]]
        runpy.run_path(str(script), run_name="__main__")
    except KeyboardInterrupt:
        return 130
    except (ConfigError, VersionError) as error:
        # The user's to mend: every rank finds it alike, one says it, and none needs a traceback.
        return _error(str(error)) if _is_first() else 2
    return 0


def _print_flags() -> int:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # seconds of importing what is not needed
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    print(add_arguments(parser).format_help())
    return 0


def prepare(script: Path, args: list[str]) -> None:
    """Do what must be done before the script imports Megatron.

    Raises:
        ConfigError: There is no GPU here, and Megatron cannot do without in this environment.
        RuntimeError: This Megatron is not one that random-LTD was tested with.
    """
    # The script's folder comes first, as if python had been started with it: in a clone of
    # Megatron-LM it holds the megatron package to run with.
    sys.path.insert(0, str(script.resolve().parent))
    is_first = _is_first()
    if not is_first:
        warnings.filterwarnings("ignore")
    _single_process_rendezvous()

    versions.require_installed()
    from megatron_rltd.cpu import adapter

    on_cpu = adapter.is_needed()
    if on_cpu:
        problem = adapter.why_no_training()
        if problem:
            raise ConfigError([problem])
        adapter.enable()
        if is_first:
            print("megatron_rltd: no CUDA device here, running on the CPU (gloo)", flush=True)
    from megatron_rltd.training import patches

    patches.use_compiled_helper(even_in_clone=on_cpu)
    if any(a.startswith(OURS) for a in args):
        refuse_command_line(args)
        patches.apply()
        if is_first:
            print(f"megatron_rltd {__version__}: patched symbols\n{patches.table()}", flush=True)


def _single_process_rendezvous() -> None:
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


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _error(message: str) -> int:
    print(f"megatron_rltd: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
