"""The ``--early-bird`` flags, and what they ask for."""

import argparse
from dataclasses import dataclass
from typing import Any

from megatron_rltd.config import ConfigError
from megatron_rltd.early_bird import zeros
from megatron_rltd.early_bird.masks import PATTERNS, STRUCTURED
from megatron_rltd.early_bird.refusals import find_refused_in_run
from megatron_rltd.early_bird.rule import PRESETS, Rule
from megatron_rltd.early_bird.target import Target
from megatron_rltd.early_bird.units import ModelShape

FLAG = "--early-bird"
PREFIX = f"{FLAG}-"
_PRESET = "early-bird"
_DEFAULTS: dict[str, Any] = {
    "pattern": STRUCTURED,
    "num_attention_heads": None,
    "ffn_hidden_size": None,
    "ratio": None,
    "interval": None,
    "start": None,
    "preset": None,
    "window": None,
    "threshold": None,
    "until": None,
    "exit": True,
}
# On args, so that a checkpoint holds it: iterations at which the ticket emerged; 0: not yet.
EMERGED = "early_bird_emerged"


@dataclass(frozen=True)
class Options:
    """What a run searches for, and when.

    Attributes:
        target: What the ticket keeps.
        rule: When it has emerged.
        interval: Iterations between checks.
        start: First iteration to check, if the learning rate's warm-up has ended by then.
        until: Take the ticket of the first check from here on, emerged or not.
        exit: Whether the run ends when the ticket has emerged.
    """

    target: Target
    rule: Rule
    interval: int
    start: int = 0
    until: int | None = None
    exit: bool = True

    def is_due(self, iteration: int) -> bool:
        """Return whether to check weights of so many iterations, but for the warm-up."""
        return iteration >= max(self.start, 1) and iteration % self.interval == 0


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--early-bird`` and its options; do nothing if they are already there."""
    if any(FLAG in action.option_strings for action in parser._actions):
        return parser
    group = parser.add_argument_group("Early-Bird tickets")
    group.add_argument(
        FLAG,
        action="store_true",
        help="While training, look for a ticket: a smaller model inside this one. When it has "
        "emerged, save a checkpoint and exit with status 0; tools/checkpoint/draw_ticket.py makes "
        "the smaller model of it. Weights, losses and learning rate do not change meanwhile.",
    )

    def add(name: str, text: str, **options: Any) -> None:
        flag = PREFIX + name.replace("_", "-")
        group.add_argument(flag, default=_DEFAULTS[name], help=text, **options)

    add(
        "pattern",
        "What to prune. structured: query groups and FFN neurons. unstructured: single weights. "
        "2:4: two of each four weights in a row. Only the first gives a smaller model.",
        choices=PATTERNS,
    )
    add(
        "num_attention_heads",
        "Query heads that the ticket keeps in each layer. Default: all.",
        type=int,
        metavar="N",
    )
    add(
        "ffn_hidden_size",
        "FFN neurons that the ticket keeps in each layer. Default: all.",
        type=int,
        metavar="N",
    )
    add("ratio", "Share of the weights to prune, if unstructured.", type=float, metavar="P")
    add(
        "interval",
        "Iterations between checks. Masks that are taken closer to each other differ less, so that "
        "the ticket emerges earlier. 1 to 2 percent of the run is usual.",
        type=int,
        metavar="N",
    )
    add(
        "start",
        "First iteration to check. No check is made before the warm-up of the learning rate ends, "
        "which is also the default.",
        type=int,
        metavar="N",
    )
    add(
        "preset",
        "The rule of a paper: window and threshold. early-bird and early-bert: 5 and 0.1. "
        "early-transformers: 2 and 0.01; for vision 2 and 0.1. Default: early-bird.",
        choices=tuple(PRESETS),
    )
    add(
        "window",
        "Number of masks that must agree, the newest included.",
        type=int,
        metavar="W",
    )
    add(
        "threshold",
        "Share of the units that the newest mask may differ in from each other mask of the window.",
        type=float,
        metavar="E",
    )
    add(
        "until",
        "Take the ticket of the first check from this iteration on, even if it has not emerged.",
        type=int,
        metavar="N",
    )
    add(
        "exit",
        "Save and exit when the ticket has emerged (default), or save and go on.",
        action=argparse.BooleanOptionalAction,
    )
    group.add_argument(
        zeros.FLAG,
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Weights of the layers that are zero in the loaded checkpoint stay zero, such as "
        "those that draw_ticket.py --pattern pruned. Also without --early-bird. Saves no time.",
    )
    return parser


def refuse_without_flag(args: Any) -> None:
    """Refuse the options if ``--early-bird`` is absent, because they would do nothing.

    Raises:
        ConfigError: It names them.
    """
    given = [name for name, default in _DEFAULTS.items() if _value(args, name) != default]
    flags = [PREFIX + name.replace("_", "-") for name in given]
    flags = [f"--no{FLAG[1:]}-exit" if f == f"{PREFIX}exit" else f for f in flags]
    if flags:
        raise ConfigError(
            [f"{f} does nothing without {FLAG}: add {FLAG} or omit {f}" for f in flags]
        )


def options_of(args: Any) -> Options:
    """Return what Megatron's validated arguments ask for.

    Raises:
        ConfigError: It names every unsupported feature and every wrong option.
    """
    problems = find_refused_in_run(args)
    target = Target.searched_by(args)
    shape = ModelShape.of(args)
    ranks = args.tensor_model_parallel_size
    if ranks > shape.num_query_groups:
        ranks = 1  # one problem is enough
    wrong = target.problems(shape, ranks, PREFIX)
    problems += wrong
    if not wrong and target.pattern == STRUCTURED and target.kept(shape) == shape:
        problems.append(
            f"the ticket would keep all {shape.num_attention_heads} heads and "
            f"{shape.ffn_hidden_size} FFN neurons of a layer: give a smaller "
            f"{PREFIX}num-attention-heads or {PREFIX}ffn-hidden-size, or omit {FLAG} if this is "
            "the ticket already"
        )
    preset = PRESETS[_value(args, "preset") or _PRESET]
    window, threshold = _value(args, "window"), _value(args, "threshold")
    window = preset.window if window is None else window
    threshold = preset.threshold if threshold is None else threshold
    interval, start, until = (_value(args, name) for name in ("interval", "start", "until"))
    if interval is None or interval < 1:
        problems.append(f"give {PREFIX}interval: the iterations between checks, at least 1")
    if window < 2:
        problems.append(f"{PREFIX}window {window} compares nothing: use at least 2")
    if not 0 <= threshold < 1:
        problems.append(f"{PREFIX}threshold {threshold:g} must be from 0 to 1")
    for name, iteration in (("start", start), ("until", until)):
        if iteration is not None and iteration < 1:
            problems.append(f"{PREFIX}{name} {iteration} must be at least 1")
    if not _value(args, "exit") and getattr(args, "save_retain_interval", None):
        problems.append(
            f"--save-retain-interval would remove the ticket's checkpoint while the run goes on: "
            f"omit it, or omit --no{FLAG[1:]}-exit"
        )
    if None not in (start, until) and start > until:
        problems.append(f"{PREFIX}start {start} is after {PREFIX}until {until}")
    if not problems and args.train_iters:  # else the length is not yet known
        problems = find_beyond_end(args)
    if problems:
        raise ConfigError(problems)
    rule = Rule(window, threshold)
    return Options(target, rule, interval, start or 0, until, bool(_value(args, "exit")))


def find_beyond_end(args: Any) -> list[str]:
    """Return a sentence for every option that is beyond the end of the run.

    Args:
        args: Megatron's, when ``train_iters`` is known: with samples, after its set-up.
    """
    problems = []
    if _value(args, "interval") >= args.train_iters:
        problems.append(
            f"{PREFIX}interval {_value(args, 'interval')} leaves no check in the "
            f"{args.train_iters} iterations of the run: use a smaller one"
        )
    for name in ("start", "until"):
        iteration = _value(args, name)
        if iteration is not None and iteration >= args.train_iters:
            problems.append(
                f"{PREFIX}{name} {iteration} is not within the {args.train_iters} iterations of "
                "the run"
            )
    return problems


def _value(args: Any, name: str) -> Any:
    return getattr(args, f"early_bird_{name}")
