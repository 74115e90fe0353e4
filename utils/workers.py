"""Worker processes for tools that read and write many images: none is left behind, whatever ends the parent."""

import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager


class InProcess(Executor):
    """The pool of no workers: what is submitted is done at once."""

    def submit(self, function: Callable, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """An executor of so many processes, or of this one for 0. At the end, also after an error or Ctrl-C, what waits is
    dropped and what runs is finished, so that no file is left half-written.
    """
    if workers == 0:
        yield InProcess()
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else None)  # fork: no second import of the tool
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise OSError("a worker process was ended from outside (out of memory?); try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_unordered(pool: Executor, function: Callable, items: Iterable, window: int) -> Iterator:
    """function(item) for each item, results as they come; at most `window` items are under way at a time."""
    pending: set[Future] = set()
    for item in items:
        pending.add(pool.submit(function, item))
        while len(pending) >= window:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    for future in pending:
        yield future.result()


def start_loader_worker(_: int) -> None:
    """The worker_init_fn of a DataLoader: the training process alone answers Ctrl-C, and hears of a full /dev/shm."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A batch that finds no shared memory is dropped by the thread that sends it, and would be waited for without end.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _cannot_send(error: Exception, _: object) -> None:
    print(f"a loader process cannot hand over a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _start_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end soon after a parent that was killed: its queues would never say so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
