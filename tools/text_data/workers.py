"""Worker processes that keep the order, end with the main process and leave Ctrl-C to it.

Used by preprocess_data.py; what the workers do is none of this file's business. Not
concurrent.futures: its map reads the whole input first, and it waits forever if a worker is killed
while it sends a result, because its workers share one pipe.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, resource_tracker
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WorkerKilled(RuntimeError):
    """A worker ended without having been told to."""


@contextlib.contextmanager
def held(*signals: signal.Signals) -> Iterator[None]:
    """Let these signals wait until the end; processes started meanwhile never see them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerPool:
    """Up to `count` processes, started when needed, that end with the `with` block."""

    def __init__(self, count: int):
        self.count = count
        self._processes: list = []
        self._idle: list[connection.Connection] = []
        # Not fork: it would inherit the threads and the memory of torch.
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with held(*STOP_SIGNALS):
            for process in self._processes:
                process.terminate()
            for process in self._processes:
                process.join()

    def call(self, function: Callable, *args: Any) -> Any:
        """Return `function(*args)`, computed in a worker."""
        return next(self.in_order(function, [args[-1]], *args[:-1]))

    def in_order(self, function: Callable, items: Iterable[Any], *args: Any) -> Iterator[Any]:
        """Yield `function(*args, item)` for each item, in the order of the items.

        Items are read as they are needed. One that takes long holds back at most two results of
        each worker, so that memory is bounded.

        Args:
            function: One that a new process can import.
            items: Sent to the workers one by one.
            args: The same for all items.

        Raises:
            WorkerKilled: A worker ended on its own.
            Exception: What the function raised, at the place of its item.
        """
        numbered = enumerate(items)
        busy: dict[connection.Connection, int] = {}
        results: dict[int, tuple[bool, Any]] = {}
        wanted, more = 0, True
        while more or busy or results:
            while more and len(busy) < self.count and len(busy) + len(results) < 2 * self.count:
                number, item = next(numbered, (None, None))
                if number is None:
                    more = False
                    break
                worker = self._idle.pop() if self._idle else self._start()
                _exchange(worker.send, (function, (*args, item)))
                busy[worker] = number
            ready = connection.wait(busy) if busy and wanted not in results else []
            for worker in [w for w in busy if w in ready]:
                results[busy.pop(worker)] = _exchange(worker.recv)
                self._idle.append(worker)
            while wanted in results:
                succeeded, result = results.pop(wanted)
                if not succeeded:
                    raise result
                yield result
                wanted += 1

    def _start(self) -> connection.Connection:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        # multiprocessing starts its tracker with the first process, and lets SIGINT through then.
        resource_tracker.ensure_running()
        with held(signal.SIGINT):
            process.start()
        self._processes.append(process)
        # With no other copy of its end, a worker's death is the end of the data.
        theirs.close()
        return ours


def _exchange(send_or_receive: Callable, *args: Any) -> Any:
    try:
        return send_or_receive(*args)
    except (EOFError, OSError):
        raise WorkerKilled from None


def _serve(pipe: connection.Connection) -> None:
    """Answer calls until the main process is gone."""

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    # At once, and not after a call that may take minutes.
    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, args = pipe.recv()
            try:
                answer = (True, function(*args))
            except Exception as problem:
                problem.add_note(f"In a worker:\n{traceback.format_exc()}")
                answer = (False, problem)
            pipe.send(answer)
