"""Run the trainings that a row of check_layouts.py compares, and judge the difference.

All runs of a row start from one checkpoint, which the run in one process made: initial weights
differ between pipeline and expert layouts in Megatron. With `fresh` they start from the initial
weights instead.
"""

import math
import re
import shlex
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from layout_data import DOCUMENTS, SENTENCES, TOKENIZER
from layout_matrix import (
    BERT,
    COMMON,
    MOCK_DATA,
    MODELS,
    PATTERN,
    RAMP,
    RANDOM_LTD,
    Row,
    layout_flags,
    layout_parts,
    processes,
)
from local_ranks import RankError, Training, train

WARM_UP = 2  # steps before the checkpoint: the optimizer's state is part of what is compared
TOLERANCE = 1e-5
TIMES_PLAIN = 2  # in low precision
_FORMAT = "--ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"

EQUAL, WITHIN, DIFFERS = "bit-equal", "equal", "differs, as it must"
OVER, UNNOTICED, FAILED = "OVER", "NOT NOTICED", "FAILED"
AS_PLAIN = "differs in plain Megatron too"
REFUSED = "refused by Megatron"
PASSED, WRONG = (EQUAL, WITHIN, DIFFERS), (OVER, UNNOTICED, FAILED)


@dataclass
class Result:
    """What came of a row.

    Attributes:
        loss: Largest relative difference of the loss over all steps; None if there is none.
        norm: The same of the gradient norm.
        plain: The same as `loss` without random-LTD.
        plain_norm: The same as `norm` without random-LTD.
        limit: The largest `loss` that passes; None if it must differ, or is not known.
        verdict: One of the constants above.
        message: Why there are no differences, if so.
    """

    row: Row
    processes: int
    loss: float | None = None
    norm: float | None = None
    plain: float | None = None
    plain_norm: float | None = None
    limit: float | None = None
    verdict: str = FAILED
    message: str = ""


def difference(ours: list[float], alone: list[float], steps: int) -> float:
    """Return the largest relative difference over the steps.

    Raises:
        RuntimeError: There are not `steps` of each, or one is not finite.
    """
    if not len(ours) == len(alone) == steps > 0:
        raise RuntimeError(f"{len(ours)} and {len(alone)} steps were run, not {steps}")
    if not all(map(math.isfinite, [*ours, *alone])):
        raise RuntimeError(f"not finite: {ours}, in one process {alone}")
    return max(0.0 if a == b else abs(a - b) / abs(b) for a, b in zip(ours, alone, strict=True))


def is_same_order(row: Row) -> bool:
    """Return whether a layout adds the same numbers in the same order as one process.

    Pipeline stages only divide the layers among processes; tied embeddings (BERT's, too) add the
    gradients of the first and the last stage. Of two data-parallel ranks with a micro-batch each,
    the sum of two gradients is the same either way round.
    """
    sizes, _ = layout_parts(row.layout)
    wide = {name for name, size in sizes.items() if size > 1} - {"PP", "VPP"}
    if row.model in ("tied", BERT) or {"micro-batch-1", "grow"} & set(row.features.split("+")):
        return False
    return not wide or (sizes["DP"], wide, row.features) == (2, {"DP"}, "two-micro-batches")


def is_control(row: Row) -> bool:
    """Return whether the losses of a row must differ."""
    return any(feature.control for feature in row.chosen)


def is_fresh(row: Row) -> bool:
    """Return whether the runs of a row start from the initial weights."""
    return "fresh" in layout_parts(row.layout)[1]


@dataclass
class Runs:
    """Trainings, each run once, however many rows it is in.

    Attributes:
        folder: For checkpoints and data; must exist.
        script: Of `local_ranks.train`.
        steps: That are compared.
        extra: Flags for every run.
        layout_extra: Flags for the runs that are compared with the one in one process.
    """

    folder: Path
    script: str
    steps: int
    extra: str = ""
    layout_extra: str = ""
    _done: dict[tuple[int, str], Training | RankError] = field(default_factory=dict)

    def compare(self, row: Row, with_plain: bool) -> Result:
        """Run what a row needs and return the verdict.

        Plain Megatron is run if asked for, if it is the yardstick, and if something is wrong.
        """
        result = Result(row, processes(row.layout))
        low_precision = any(feature.low_precision for feature in row.chosen)
        try:
            result.loss, result.norm = self._differences(row, plain=False)
        except (RankError, RuntimeError) as error:
            result.message = _reason(error)
        if not low_precision and not is_control(row):
            # Gradients are clipped by the norm: if that is rounded otherwise, so are the weights.
            result.limit = 0.0 if is_same_order(row) and not result.norm else TOLERANCE
        result.verdict = _verdict(result)
        if with_plain or result.verdict in (OVER, FAILED):
            try:
                result.plain, result.plain_norm = self._differences(row, plain=True)
            except (RankError, RuntimeError) as error:
                if result.loss is None and getattr(error, "raised", False):
                    result.verdict, result.message = REFUSED, _reason(error)
                    return result
                result.message = result.message or f"plain Megatron: {_reason(error)}"
            if low_precision and result.plain is not None:
                result.limit = TIMES_PLAIN * result.plain
            result.verdict = _verdict(result)
        return result

    def _differences(self, row: Row, plain: bool) -> tuple[float, float]:
        """Return the difference of loss and gradient norm between layout and one process.

        Raises:
            RankError: A run failed.
            RuntimeError: The runs cannot be compared.
        """
        start = ""
        if not is_fresh(row):
            start = f"--load {self._checkpoint(row)} --no-load-rng {_FORMAT}"
            if layout_parts(row.layout)[0]["EP"] > 1:
                start += " --no-load-optim"  # Megatron chains other optimizers than without EP
        lines = [f"{self._flags(row, alone)} {start}" for alone in (True, False)]
        if plain:
            lines = [without_random_ltd(line) for line in lines]
        alone = self._train(1, lines[0])  # first: the cheaper one to fail
        ours = self._train(processes(row.layout), lines[1])
        if ours.kept != alone.kept:
            raise RuntimeError(f"kept tokens {ours.kept}, not {alone.kept}")
        steps = self.steps + WARM_UP * is_fresh(row)
        return (
            difference(ours.losses, alone.losses, steps),
            difference(ours.grad_norms, alone.grad_norms, steps),
        )

    def _flags(self, row: Row, alone: bool) -> str:
        """Return the flags of a run of a row but for where it starts."""
        features = [f.flags for f in row.chosen if f.alone or not alone]
        after = [self.extra, "" if alone else self.layout_extra]
        given = " ".join([MODELS[row.model], *features, *after])
        parts = [COMMON, MODELS[row.model], RANDOM_LTD]
        if "--data-path" not in given:
            parts.append(MOCK_DATA)
        if "--random-ltd-ramp-samples" not in given:
            parts.append(RAMP)
        if not alone:
            parts.append(layout_flags(row.layout))
        elif "DO" in layout_parts(row.layout)[1] and not is_fresh(row):
            parts.append(layout_flags("DO"))  # it cannot load the state of another optimizer
        parts += [*features, f"--train-iters {WARM_UP + self.steps}", *after]
        names = {"documents": DOCUMENTS, "sentences": SENTENCES, "tokenizer": TOKENIZER}
        paths = {name: self.folder / file for name, file in names.items()}
        return " ".join(parts).format(**paths)

    def _checkpoint(self, row: Row) -> Path:
        """Return the folder of the checkpoint that a row starts from; make it if need be."""
        line = self._flags(row, alone=True)
        folder = self.folder / f"checkpoint-{zlib.crc32(line.encode()):08x}"
        save = f"--save {folder} --save-interval 1000 --exit-interval {WARM_UP} {_FORMAT}"
        self._train(1, f"{line} {save}")
        return folder

    def _script(self, line: str) -> str:
        """Return the script for a command line: Megatron has others for HybridModel and BERT."""
        path = Path(self.script)
        if f"/{SENTENCES} " in line:
            return str(path.with_name(f"pretrain_bert{path.suffix}"))
        if PATTERN in line:
            return str(path.with_name(f"pretrain_hybrid{path.suffix}"))
        return self.script

    def _train(self, processes: int, line: str) -> Training:
        """Run a training, or take its result from before.

        Raises:
            RankError: It failed, now or before.
        """
        key = processes, line
        if key not in self._done:
            try:
                self._done[key] = train(shlex.split(line), processes, self._script(line))
            except RankError as error:
                self._done[key] = error
        done = self._done[key]
        if isinstance(done, RankError):
            raise done
        return done


def _verdict(result: Result) -> str:
    if result.loss is None or result.norm is None:
        return FAILED
    if is_control(result.row):
        return DIFFERS if result.loss > 10 * TOLERANCE else UNNOTICED
    if result.limit is None:
        return FAILED
    # The norm is summed in another order on every layout, so it is never bit-equal by right.
    norm_limit = TOLERANCE
    if any(feature.low_precision for feature in result.row.chosen):
        norm_limit = math.inf
    if result.loss <= result.limit and result.norm <= norm_limit:
        return WITHIN if result.loss else EQUAL
    plain, plain_norm = (TIMES_PLAIN * (n or 0) for n in (result.plain, result.plain_norm))
    if result.loss <= max(result.limit, plain) and result.norm <= max(norm_limit, plain_norm):
        return AS_PLAIN
    return OVER


def _reason(error: Exception) -> str:
    return " ".join(getattr(error, "reason", str(error)).split())


def without_random_ltd(line: str) -> str:
    """Return a command line without the flags of random-LTD."""
    return " ".join(re.sub(r"--random-ltd\S*( (?!--)\S+)*", "", line).split())
