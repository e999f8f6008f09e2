"""Run a Megatron training script with random-LTD, unmodified.

    python -m megatron_rltd SCRIPT ARGS...               one process
    torchrun ... -m megatron_rltd SCRIPT ARGS...         many
    python -m megatron_rltd --help                       the flags that it adds to ARGS
    python -m megatron_rltd check                        what is installed, and what is replaced
    python -m megatron_rltd plan ...                     what a run will cost and save
    python -m megatron_rltd compare ...                  how finished runs compare
    python -m megatron_rltd convert-deepspeed ...        a DeepSpeed configuration as flags

SCRIPT is a path, or the name of a script that comes with this package: pretrain_gpt,
pretrain_hybrid or pretrain_bert. Add --cpu to ARGS (or set MEGATRON_RLTD_CPU=1) to run on the CPU
of a machine without a GPU. Each command has its own --help.
"""

import importlib
import sys

COMMANDS = {
    "check": "megatron_rltd.commands.check",
    "--check": "megatron_rltd.commands.check",  # the spelling of 0.1
    "plan": "megatron_rltd.commands.plan.command",
    "compare": "megatron_rltd.commands.compare.command",
    "convert-deepspeed": "megatron_rltd.commands.convert_deepspeed.command",
}


def main(argv: list[str]) -> int:
    """Run a command or a training script; return the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip(), flush=True)
        if argv:
            from megatron_rltd.commands.run import print_flags

            print_flags()
        return 0 if argv else 2
    command = COMMANDS.get(argv[0])
    if command:
        return importlib.import_module(command).main(argv[1:])
    from megatron_rltd.commands.run import main as run

    return run(argv, [name for name in COMMANDS if not name.startswith("-")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
