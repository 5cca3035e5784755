"""A pool of persistent gloo ranks for tests: real processes, real collectives, started once a session.

Processes come from a `forkserver` with torch preloaded (`spawn` costs over 10 s a start, `fork` after a backward hangs).
Each call gets a fresh process group over the first `ranks` processes.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_METHOD = "forkserver"
PRELOAD = ["torch", "torch.distributed", "steerscale.testing.preload"]


class RankPool:
    """`pool.run(function, *args, ranks=4)` calls the module-level `function` on 4 ranks and returns their 4 results."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context(START_METHOD)
        self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, ranks: int, timeout_s: float = 300.0) -> list[Any]:
        """Results of `function(*args)` in rank order.

        Raises RuntimeError with the first failing rank's traceback; the pool is restarted then, since the other ranks may
        be waiting in a collective.
        """
        while len(self._workers) < ranks:
            self._workers.append(self._start())
        connections = [connection for _, connection in self._workers[:ranks]]
        with tempfile.TemporaryDirectory(prefix="steerscale-ranks-") as directory:
            store = str(Path(directory) / "store")
            for rank, connection in enumerate(connections):
                connection.send((function, args, rank, ranks, store))
            return self._collect(connections, timeout_s)

    def _collect(self, connections: list[Connection], timeout_s: float) -> list[Any]:
        ranks = len(connections)
        answers: dict[int, Any] = {}
        while len(answers) < ranks:
            waiting = {connections[rank]: rank for rank in range(ranks) if rank not in answers}
            ready = multiprocessing.connection.wait(list(waiting), timeout=timeout_s)
            if not ready:
                self.close()
                raise RuntimeError(f"ranks {sorted(waiting.values())} did not answer within {timeout_s} s")
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    ok, answer = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, answer = False, "the process died"
                if not ok:
                    self.close()
                    raise RuntimeError(f"rank {rank} of {ranks} failed:\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(ranks)]

    def close(self) -> None:
        """Stop all ranks; a later `run` starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what is loaded by now stays: collections after calls need not look at it
    while True:
        try:
            function, args, rank, size, store = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, _call(function, args, rank, size, store)))
        except BaseException:  # noqa: BLE001 - everything a rank raises is the caller's to see
            connection.send((False, traceback.format_exc()))


def _call(function: Callable[..., Any], args: tuple[Any, ...], rank: int, size: int, store: str) -> Any:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    counter = dist.FileStore(store, size)
    dist.init_process_group("gloo", store=counter, rank=rank, world_size=size)
    try:
        answer = function(*args)
        # A rank that left early would cut off one still in its last collective. A barrier is itself a collective: count.
        counter.add("done", 1)
        while counter.add("done", 0) < size:
            time.sleep(0.002)
        return answer
    finally:
        dist.destroy_process_group()
        # Models and optimizers go around in circles, and hold process groups: some fifty threads each time.
        gc.collect()
