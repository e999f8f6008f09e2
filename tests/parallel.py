"""Run functions in real `torch.distributed` processes over gloo, and Megatron's training loop.

Processes are forked from a server that has imported torch and Megatron once, so that a rank starts
in milliseconds. `run` runs a function on every rank; `train` a whole Megatron training.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 300
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """Return the environment for a Python that uses this repository and the Megatron used here."""
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join([str(ROOT), *(folder for folder in here if folder)])
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


class RankError(AssertionError):
    """A rank raised or hung; the message holds its traceback and the end of its output."""


def _rank_main(function, rank, world_size, port, folder, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.setsid()  # so that the parent can kill whatever processes Megatron starts from here
    log = Path(folder) / f"{rank}.log"
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    result: dict[str, Any] = {}
    try:
        result["value"] = function(*args)
    except BaseException:
        result["error"] = traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    result["output"] = log.read_text(errors="replace")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # no clean-up of a half-dead process group


def run(world_size: int, function: Callable, *args: Any) -> list[Any]:
    """Run ``function(*args)`` on `world_size` ranks and return their results in order.

    Args:
        function: A module-level function; its result must survive JSON.

    Raises:
        RankError: A rank raised, or did not finish in `TIMEOUT_S` seconds.
    """
    return [result["value"] for result in run_all(world_size, function, *args)]


def run_all(world_size: int, function: Callable, *args: Any) -> list[dict[str, Any]]:
    """As `run`, with what each rank printed: [{"value": ..., "output": ...}]."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            _CONTEXT.Process(
                target=_rank_main, args=(function, rank, world_size, port, folder, args)
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        results, problems = _collect(ranks, Path(folder))
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if problems:
        raise RankError(problems[0])
    return results


def _collect(ranks, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    results, problems = [], []
    for rank, process in enumerate(ranks):
        process.join(5 if problems else TIMEOUT_S)
        file = folder / f"{rank}.json"
        if process.is_alive():
            process.kill()
            process.join()
            problems.append(f"rank {rank} hung")
        elif not file.exists():
            problems.append(f"rank {rank} died with exit status {process.exitcode}")
        else:
            result = json.loads(file.read_text())
            results.append(result)
            if "error" in result:
                error, output = (result[k].splitlines() for k in ("error", "output"))
                lines = [f"rank {rank}:", *error[-40:], "output ends:", *output[-15:]]
                problems.append("\n".join(lines))
    return results, problems


@dataclasses.dataclass
class Training:
    """What a training run did, step by step; exact floats.

    Attributes:
        losses: Training loss of each step.
        grad_norms: Gradient norm of each step.
        validation: Loss of each evaluation.
        flops: Megatron's count for each step.
        kept: Kept tokens of each step, if logged.
        layer_tokens: ``args.random_ltd_layer_tokens`` at the end, if there.
        output: What rank 0 printed.
    """

    losses: list[float]
    grad_norms: list[float]
    validation: list[float]
    flops: list[float]
    kept: list[float]
    layer_tokens: int | None
    output: str


def train(
    arguments: list[str] | str, world_size: int = 1, script: str = "pretrain_gpt"
) -> Training:
    """Run Megatron's training loop as ``python -m megatron_rltd`` does, and record its steps."""
    if isinstance(arguments, str):
        arguments = arguments.split()
    results = run_all(world_size, _train, script, arguments)
    steps = results[-1]["value"]  # the last pipeline stage knows the losses
    return Training(**steps, output=results[0]["output"])


def _train(script: str, arguments: list[str]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    from megatron_rltd.__main__ import BUNDLED, prepare

    path = BUNDLED.get(script, Path(script))
    prepare(path, arguments)
    record = _record_steps()
    import runpy

    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")
    from megatron.training import get_args

    record["layer_tokens"] = getattr(get_args(), "random_ltd_layer_tokens", None)
    return record


def _record_steps() -> dict[str, Any]:
    """Record what the training loop's functions return, outside of every patch."""
    from megatron.training import training

    record: dict[str, Any] = {
        name: [] for name in ("losses", "grad_norms", "validation", "flops", "kept")
    }
    train_step, evaluate = training.train_step, training.evaluate
    count = training.num_floating_point_operations
    in_log = []

    def recorded_step(*args, **kwargs):
        result = train_step(*args, **kwargs)
        losses, grad_norm = result[0], result[5]
        if losses:
            record["losses"].append(float(losses["lm loss"]))
        if "random-ltd kept tokens" in losses:
            record["kept"].append(float(losses["random-ltd kept tokens"]))
        record["grad_norms"].append(None if grad_norm is None else float(grad_norm))
        in_log.clear()
        return result

    def recorded_evaluation(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        if result[0]:
            record["validation"].append(float(result[0]["lm loss"]))
        return result

    def recorded_count(*args, **kwargs):
        flops = count(*args, **kwargs)
        if not in_log:  # Megatron counts a step once for the total and again for the log line
            record["flops"].append(float(flops))
            in_log.append(True)
        return flops

    training.train_step = recorded_step
    training.evaluate = recorded_evaluation
    training.num_floating_point_operations = recorded_count
    return record
