"""Tasks in processes of this machine: a pool that notices dead workers and dies with its parent.

Decision: LocalPipelineExecutor's `run` is replaced by the standard library's process pool. datatrove's own pool waits forever
for a worker that was killed (out of memory), and leaves its manager process behind when the parent is killed. Workers come
from a fork server: a process with threads or open fsspec filesystems must not be forked (s3 breaks), and only the first worker
spends time on imports. What workers print (datatrove's log, C++ libraries) goes to `console.log` in the work folder.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor

from pipeline.data.executor.markers import Reporting, raise_error
from pipeline.errors import UserError


class LocalExecutor(Reporting, LocalPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """datatrove's local executor with a pool that notices dead workers and dies with its parent."""

    in_process = False

    def run_ranks(self, ranks: list[int], *, console: Path, workers_key: str) -> None:
        if self.in_process:
            for rank in ranks:
                self.run_rank(rank)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *sorted({type(step).__module__ for step in self.pipeline})])
        pool = ProcessPoolExecutor(
            min(self.workers, len(ranks)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(dict(os.environ), str(console)),
        )
        with pool:
            try:
                futures = [pool.submit(self.run_rank, rank) for rank in ranks]
                wait(futures, return_when=FIRST_EXCEPTION)
                pool.shutdown(cancel_futures=True)  # running tasks finish: their work is kept
                for future in futures:
                    if not future.cancelled():
                        future.result()
            except KeyboardInterrupt:
                for worker in multiprocessing.active_children():  # a task may take long; it is done again
                    worker.kill()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            except BrokenProcessPool:
                raise_error(self.work)  # an exception that cannot be pickled breaks the pool as well
                raise UserError(
                    f"a worker process died (killed, or out of memory), see {console}; lower {workers_key} or free "
                    "memory and start again, finished work is kept"
                ) from None

    def run_rank(self, rank: int) -> None:
        """Run one task in a worker, on its own copy of the steps, because steps hold counts."""
        alone = deepcopy(self)
        alone._run_for_rank(rank, local_rank=1)  # ranks other than 0 do not log to the console


def _start_worker(environment: dict[str, str], console: str) -> None:
    """Take the parent's environment (the fork server may be older), redirect output to a file, exit with the parent."""
    os.environ.clear()
    os.environ.update(environment)
    handle = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # a worker of a killed run must not keep writing while the next run starts

    threading.Thread(target=watch, daemon=True).start()
