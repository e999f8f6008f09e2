"""Run functions in real `torch.distributed` processes over gloo, and Megatron's training loop.

Processes are forked from a server that has imported torch and Megatron once, so that a rank starts
in milliseconds. `run` runs a function on every rank; `train` a whole Megatron training.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parents[1]
TIMEOUT_S = 300
AFTER_AN_ERROR_S = 5  # that the other ranks get: they may be waiting for the one that failed
_CONTEXT = multiprocessing.get_context("forkserver")


def start_server(megatron: Path | None = None) -> None:
    """Start the server that ranks are forked from, unless it runs already.

    Args:
        megatron: A folder to import Megatron from rather than what is installed.
    """
    # Ranks get this process's sys.path, the server that imports for them does not (Python 3.12).
    for path in (str(TOOLS), str(ROOT)):
        if path not in sys.path:
            sys.path.insert(0, path)
    paths = [*([megatron] if megatron else []), ROOT, TOOLS]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, paths), *([before] if before else [])])
    try:
        _CONTEXT.set_forkserver_preload(["rank_preload"])
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def free_port() -> int:
    """Return a TCP port that was free a moment ago.

    Below the range that the system takes ports from by itself: gloo listens on many of those.
    """
    while True:
        port = random.randrange(16000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class RankError(AssertionError):
    """A rank raised or hung; the message holds its traceback and the end of its output.

    Attributes:
        reason: What the rank that failed first said, without the traceback.
        raised: Whether it raised an exception; else it hung, or was killed.
    """

    def __init__(self, message: str, reason: str, raised: bool):
        super().__init__(message)
        self.reason = reason
        self.raised = raised


def _rank_main(function, rank, world_size, port, folder, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    os.setsid()  # a group of processes that can be killed as one
    log = Path(folder) / f"{rank}.log"
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    result: dict[str, Any] = {}
    try:
        result["value"] = function(*args)
    except BaseException as error:
        result["error"] = traceback.format_exc()
        result["reason"] = "".join(traceback.format_exception_only(error)).strip()
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
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            _CONTEXT.Process(
                target=_rank_main, args=(function, rank, world_size, port, folder, args)
            )
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            return _collect(ranks, Path(folder))
        finally:
            for process in ranks:
                if process.pid is not None:
                    # With what Megatron started from there, to write a checkpoint.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()
                    process.join()


def _collect(ranks: list[Any], folder: Path) -> list[dict[str, Any]]:
    """Return the ranks' results, or raise RankError for the one that failed first."""
    results: dict[int, dict[str, Any]] = {}
    waiting = {process.sentinel: rank for rank, process in enumerate(ranks)}
    first: RankError | None = None
    deadline = time.monotonic() + TIMEOUT_S
    while waiting:
        done = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not done:
            rank = min(waiting.values())
            raise first or RankError(f"rank {rank} hung", f"rank {rank} hung", False)
        for rank in sorted(waiting.pop(sentinel) for sentinel in done):
            file = folder / f"{rank}.json"
            ranks[rank].join()
            if file.exists():
                results[rank] = json.loads(file.read_text())
            failed = _error(rank, results.get(rank), ranks[rank].exitcode)
            if failed and not first:
                first = failed
                deadline = min(deadline, time.monotonic() + AFTER_AN_ERROR_S)
    if first:
        raise first
    return [results[rank] for rank in range(len(ranks))]


def _error(rank: int, result: dict[str, Any] | None, status: int | None) -> RankError | None:
    if result is None:
        message = f"rank {rank} died with exit status {status}"
        return RankError(message, message, False)
    if "error" not in result:
        return None
    error, output = (result[k].splitlines() for k in ("error", "output"))
    lines = [f"rank {rank}:", *error[-40:], "output ends:", *output[-15:]]
    reason = result["reason"]
    if reason.startswith("SystemExit") and output:  # argparse has printed why
        reason = output[-1]
    return RankError("\n".join(lines), reason, True)


@dataclasses.dataclass
class Training:
    """What a training run did, step by step; exact floats.

    Attributes:
        losses: Training loss of each step.
        grad_norms: Gradient norm of each step.
        validation: Loss of each evaluation.
        flops: Megatron's count for each step.
        logged_flops: Megatron's count for each log line, of which it makes TFLOP/s.
        kept: Kept tokens of each step, if logged.
        layer_tokens: ``args.random_ltd_layer_tokens`` at the end, if there.
        learning_rates: After each step.
        weight_decays: After each step.
        arguments: The numbers for the length of the run and its learning rate, at the end.
        output: What rank 0 printed.
    """

    losses: list[float]
    grad_norms: list[float]
    validation: list[float]
    flops: list[float]
    logged_flops: list[float]
    kept: list[float]
    learning_rates: list[float]
    weight_decays: list[float]
    layer_tokens: int | None
    arguments: dict[str, int | float | None]
    output: str


def train(
    arguments: list[str] | str, world_size: int = 1, script: str = "pretrain_gpt"
) -> Training:
    """Run Megatron's training loop as ``python -m megatron_rltd`` does, and record its steps.

    Args:
        script: A path, or the name of a script of the package.

    Raises:
        RankError: As `run`.
    """
    if isinstance(arguments, str):
        arguments = arguments.split()
    results = run_all(world_size, train_on_this_rank, script, arguments)
    steps = results[-1]["value"]  # the last pipeline stage knows the losses
    return Training(**steps, output=results[0]["output"])


def train_on_this_rank(script: str, arguments: list[str]) -> dict[str, Any]:
    """Be one rank of a training; return what `Training` holds of it, but for the output."""
    import torch

    torch.set_num_threads(1)
    from megatron_rltd.commands.run import BUNDLED, CPU_FLAG, prepare

    path = BUNDLED.get(script, Path(script))
    arguments = prepare(path, [*arguments, CPU_FLAG])
    record = _record_steps()
    import runpy

    sys.argv = [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as exit_:  # Megatron's way to end at --exit-interval
        if exit_.code:
            raise
    from megatron.training import get_args

    record["layer_tokens"] = getattr(get_args(), "random_ltd_layer_tokens", None)
    names = ("train_iters", "train_samples", "lr_decay_iters", "lr_decay_samples")
    record["arguments"] = {name: getattr(get_args(), name) for name in names}
    record["arguments"] |= getattr(get_args(), "random_ltd_scheduler_settings", {})
    return record


def _record_steps() -> dict[str, Any]:
    """Record what the training loop's functions return, outside of every patch."""
    from megatron.training import training

    names = "losses grad_norms validation flops logged_flops kept learning_rates weight_decays"
    record: dict[str, Any] = {name: [] for name in names.split()}
    train_step, evaluate = training.train_step, training.evaluate
    count = training.num_floating_point_operations
    in_log: list[bool] = []

    def recorded_step(*args, **kwargs):
        result = train_step(*args, **kwargs)
        losses, grad_norm, group = result[0], result[5], args[3].param_groups[0]
        record["learning_rates"].append(group["lr"])
        record["weight_decays"].append(group["weight_decay"])
        if losses:
            parts = (losses[name] for name in ("lm loss", "sop loss") if name in losses)
            record["losses"].append(sum(map(float, parts)))
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
        else:
            record["logged_flops"].append(float(flops))
        return flops

    training.train_step = recorded_step
    training.evaluate = recorded_evaluation
    training.num_floating_point_operations = recorded_count
    return record
