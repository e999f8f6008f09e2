"""Draw an Early-Bird ticket: write a run's checkpoint as an ordinary smaller one that continues it.

    python tools/checkpoint/draw_ticket.py --load RUN --save TICKET \\
        --num-attention-heads 12 --ffn-hidden-size 4864

Every layer keeps the same number of query groups and of FFN neurons, those with the largest norms.
The ticket is a checkpoint of Megatron's of a smaller GPTModel. It holds the moments of the weights
that are kept, the learning rate, the samples and the LayerTokens of the run, and you continue it on
any parallel layout, with or without random-LTD, with the flags that this tool prints. The
checkpoint may come from any layout, too. Nothing of RUN is changed. If RUN searched for a ticket
(--early-bird), what to keep is known from it.

--pattern unstructured (with --ratio) and 2:4 set single weights to zero instead. The model keeps
its size, and trains on with --early-bird-keep-zeros. Nothing gets faster.

    python tools/checkpoint/draw_ticket.py --load RUN --history [PICTURE.png] ...

shows how far apart the masks of a run were: those that a search wrote, or else those of its
checkpoints, without any training. It needs no GPU.
"""

import argparse
import shlex
import sys
from pathlib import Path

# This checkout's package, installed or not, and what makes its data.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SIGNALS = ("norm", "random")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    from megatron_rltd.early_bird.masks import PATTERNS
    from megatron_rltd.early_bird.rule import PRESETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="FOLDER", help="the run's --save")
    add("--iteration", type=int, metavar="N", help="choose by these weights (the latest)")
    add("--save", type=Path, metavar="FOLDER", help="a new folder for the ticket")
    add("--num-attention-heads", type=int, metavar="N", help="query heads to keep in a layer")
    add("--ffn-hidden-size", type=int, metavar="N", help="FFN neurons to keep in a layer")
    text = (
        "structured: a smaller model, the default. unstructured, 2:4: weights that are set to zero"
    )
    add("--pattern", choices=PATTERNS, help=text)
    add("--ratio", type=float, metavar="P", help="share of weights to prune, if unstructured")
    text = "norm: the largest weights. random: a control, of the same size"
    add("--signal", choices=SIGNALS, default="norm", help=text)
    add("--seed", type=int, help="of --signal random (1)")
    text = "keep the weights and the optimizer of an earlier checkpoint: rewind to it"
    add("--weights-iteration", type=int, metavar="N", help=text)
    text = "continue with fresh moments, not with the run's"
    add("--reset-optimizer", action="store_true", help=text)
    text = "print how far apart the masks of the run were, and draw nothing without --save"
    add("--history", nargs="?", const=True, metavar="PICTURE", help=text)
    add("--preset", choices=PRESETS, help="the rule of --history (early-bird)")
    add("--window", type=int, metavar="W", help="masks that the rule compares")
    add("--threshold", type=float, metavar="E", help="distance that the rule allows")
    options = parser.parse_args(argv)
    if not options.save and not options.history:
        parser.error("give --save, --history or both")
    if options.save and options.save.exists():
        parser.error(f"--save {options.save} exists; name a new folder")
    if options.seed is not None and options.signal != "random":
        parser.error("--seed is for --signal random only")
    rule = {"--preset": options.preset, "--window": options.window}
    rule["--threshold"] = options.threshold
    if not options.history and any(value is not None for value in rule.values()):
        given = next(flag for flag, value in rule.items() if value is not None)
        parser.error(f"{given} is for --history only")
    if options.window is not None and options.window < 2:
        parser.error("--window must be at least 2")
    if options.threshold is not None and not 0 <= options.threshold < 1:
        parser.error("--threshold must be from 0 to 1")
    if isinstance(options.history, str):
        options.history = Path(options.history)
        if options.history.exists():
            parser.error(f"--history {options.history} exists; name a new picture")
        if not options.history.absolute().parent.is_dir():
            parser.error(f"--history {options.history}: there is no folder for the picture")
    return options


def main(argv: list[str] | None = None) -> int:
    """Draw, or show the history; return the exit status."""
    options = parse_args(argv)
    import hf_checkpoint
    import ticket_history
    from hf_weights import ConversionError

    from megatron_rltd.early_bird.history import HistoryError

    try:
        with hf_checkpoint.alone():
            if options.history:
                ticket_history.show(options)
            if options.save:
                _draw(options)
    except (ConversionError, HistoryError, OSError) as error:
        print(f"draw_ticket: {error}", file=sys.stderr)
        return 2
    return 0


def _draw(options: argparse.Namespace) -> None:
    import hf_checkpoint
    from ticket_checkpoint import Dense, require_pruned, target_of

    chosen = Dense(hf_checkpoint.find(options.load, options.iteration))
    target = target_of(options, chosen)
    held = chosen
    if options.weights_iteration is not None:
        held = Dense(hf_checkpoint.find(options.load, options.weights_iteration))
        held.require_model_of(chosen)
    held.require_optimizer()
    seed = None
    if options.signal == "random":
        seed = 1 if options.seed is None else options.seed
    with hf_checkpoint.new_folder(options.save) as scratch:
        mask = chosen.mask(target, seed)
        require_pruned(mask, target)
        held.write_ticket(scratch, target, mask, options.signal, options.reset_optimizer)
    print(_said(options, chosen, held, target, mask))


def _said(options: argparse.Namespace, chosen, held, target, mask) -> str:
    """Return what was drawn, and the commands to continue with."""
    from megatron_rltd.early_bird.masks import STRUCTURED

    save = shlex.quote(str(options.save))
    again = ["python", "tools/checkpoint/draw_ticket.py", "--load", str(options.load)]
    again += ["--iteration", str(chosen.iteration)]
    if options.weights_iteration is not None:
        again += ["--weights-iteration", str(options.weights_iteration)]
    for name, value in target.as_dict().items():
        if value is not None:
            again += [f"--{name.replace('_', '-')}", str(value)]
    seed = (options.seed or 1) + 1 if options.signal == "random" else 1
    again += ["--reset-optimizer"] * options.reset_optimizer
    again += ["--signal", "random", "--seed", str(seed), "--save", f"{options.save}-random"]
    is_smaller = target.pattern == STRUCTURED
    what, flags = _smaller(chosen, target) if is_smaller else _sparse(chosen, target, mask)
    lines = [
        f"{options.save}: {what}",
        f"chosen by {options.signal} at iteration {chosen.iteration}; the run continues after "
        f"iteration {held.iteration}",
        "continue with the flags of the run, without those of --early-bird, and at their end:",
        f"  {flags} --load {save} --save {save}",
        "controls, without which nobody knows whether the choice mattered:",
        f"  random ticket: {shlex.join(again)}",
    ]
    if is_smaller:
        lines.append(
            "  small model from scratch: the flags of the run, without --load, and at their end: "
            f"{flags} --save {shlex.quote(f'{options.save}-scratch')}"
        )
    return "\n".join(lines)


def _smaller(chosen, target) -> tuple[str, str]:
    """Return what a structured ticket keeps, and the flags of its sizes."""
    from ticket_checkpoint import block_parameters

    dense, kept = chosen.shape, target.kept(chosen.shape)
    flags = (
        f"--num-attention-heads {kept.num_attention_heads} --kv-channels {kept.kv_channels} "
        f"--ffn-hidden-size {kept.ffn_hidden_size}"
    )
    if getattr(chosen.args, "group_query_attention", False):
        flags += f" --group-query-attention --num-query-groups {kept.num_query_groups}"
    hidden = chosen.args.hidden_size
    share = block_parameters(kept, hidden) / block_parameters(dense, hidden)
    return (
        f"{kept.num_attention_heads} of {dense.num_attention_heads} heads, "
        f"{kept.ffn_hidden_size} of {dense.ffn_hidden_size} FFN neurons in each of "
        f"{dense.num_layers} layers; {share:.1%} of the layers' parameters"
    ), flags


def _sparse(chosen, target, mask) -> tuple[str, str]:
    """Return the same of a ticket of single weights."""
    from megatron_rltd.early_bird.units import WEIGHTS
    from megatron_rltd.early_bird.zeros import FLAG

    share = mask.count(WEIGHTS) / mask.size(WEIGHTS)
    return (
        f"{share:.2%} of the weights of {chosen.shape.num_layers} layers are zero "
        f"({target.pattern}); that saves no time, no memory and no FLOPs"
    ), FLAG


if __name__ == "__main__":
    sys.exit(main())
