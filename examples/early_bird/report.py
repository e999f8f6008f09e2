"""What the checkpoints of examples/early_bird say: whether the ticket has emerged, and the table.

    python report.py emerged RUN/dense/checkpoints --heads 12 --ffn 4864
    python report.py table RUN

`emerged` ends with status 0 if the latest checkpoint's search has its ticket, with 3 if it has not,
and with 2 if nobody can say, or if it searched for a ticket of other sizes. `table` compares the
dense model at the draw with the tickets, and with the small model from scratch, as far as they are
there. RUN is the scripts' RUN_DIR.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "checkpoint"), str(ROOT / "tools")]
EMERGED, NOT_YET, WRONG = 0, 3, 2


def main(argv: list[str] | None = None) -> int:
    """Answer, or print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    emerged = commands.add_parser("emerged")
    emerged.add_argument("checkpoints", type=Path)
    emerged.add_argument("--heads", type=int, required=True)
    emerged.add_argument("--ffn", type=int, required=True)
    table = commands.add_parser("table")
    table.add_argument("run", type=Path)
    options = parser.parse_args(argv)

    import hf_checkpoint
    from hf_weights import ConversionError

    try:
        with hf_checkpoint.alone():
            if options.command == "emerged":
                return _has_emerged(options.checkpoints, options.heads, options.ffn)
            print(_table(options.run))
    except (ConversionError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return WRONG
    return 0


def _has_emerged(checkpoints: Path, heads: int, ffn: int) -> int:
    import hf_checkpoint

    if not (checkpoints / hf_checkpoint.TRACKER).is_file():
        return NOT_YET
    args = hf_checkpoint.stored_args(hf_checkpoint.find(checkpoints, None))
    searched = args.early_bird_num_attention_heads, args.early_bird_ffn_hidden_size
    if searched != (heads, ffn):
        print(
            f"report: {checkpoints} has searched for {searched[0]} heads and {searched[1]} FFN "
            f"neurons, not for TICKET_HEADS={heads} and TICKET_FFN={ffn}: set these, or another "
            "RUN_DIR",
            file=sys.stderr,
        )
        return WRONG
    return EMERGED if args.early_bird_emerged else NOT_YET


def _table(run: Path) -> str:
    import hf_checkpoint

    from megatron_rltd.commands.text_table import aligned

    heading = ["", "iterations", "parameters", "FLOPs so far", "train loss", "validation loss"]
    names = ["dense", *sorted((path.name for path in run.glob("ticket*")), key=len), "scratch"]
    there = [
        name for name in names if (run / name / "checkpoints" / hf_checkpoint.TRACKER).is_file()
    ]
    lines = [
        ["dense, at the draw" if name == "dense" else name, *_row(run / name)] for name in there
    ]
    return aligned([heading, *lines])


def _row(run: Path) -> list[str]:
    import hf_checkpoint
    from megatron.core import dist_checkpointing

    from megatron_rltd.commands.compare.run_logs import LOSS, VALIDATION, LogError, read_run

    folder = hf_checkpoint.find(run / "checkpoints", None)
    with hf_checkpoint.readable(folder):
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(folder))
    iteration = common["iteration"]
    shapes = hf_checkpoint.tensor_shapes(folder).values()
    row = [f"{iteration:,}", f"{sum(math.prod(shape) for shape in shapes):,}"]
    row.append(f"{common['num_floating_point_operations_so_far']:.4e}")
    try:
        logged = read_run(run / "tensorboard")
    except (LogError, ModuleNotFoundError):
        return [*row, "?", "?"]
    for tag in (LOSS, VALIDATION):
        # A run that was killed may have logged more than its checkpoint has.
        points = {at: value for at, value in logged.points(tag).items() if at <= iteration}
        at = max(points, default=None)
        text = "?" if at is None else f"{points[at]:.4f}"
        row.append(text if at in (None, iteration) else f"{text} after {at:,}")
    return row


if __name__ == "__main__":
    sys.exit(main())
