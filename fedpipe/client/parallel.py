"""Micro-batches on several cores: one thread for each, results in the order of the micro-batches.

On a processor, two small batches on two cores take less time than one after the other on both
cores, where most operations are too small to be divided. And each batch has one core for itself, since
kernels that divide a product among cores add in another order. So what is computed does not depend on
the number of threads, and neither does the order in which results come.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Worker = TypeVar("Worker")
Part = TypeVar("Part")
Result = TypeVar("Result")

MOST_WORKERS = 64  # a step has only so many batches

# As many as there are cores, for all that this process does at once: two cohorts in two threads
# would otherwise only get in each other's way.
_slots = threading.BoundedSemaphore(min(torch.get_num_threads(), MOST_WORKERS))


def workers_on(device: torch.device) -> int:
    """Return how many micro-batches to compute at once: one for each core, or one on a GPU, which a batch fills."""
    return min(torch.get_num_threads(), MOST_WORKERS) if device.type == "cpu" else 1


def in_turn(
    work: Callable[[Worker, Part], Result], workers: Sequence[Worker], parts: Sequence[Part]
) -> Iterator[Result]:
    """Yield `work(worker, part)` for each part, in the order of the parts.

    Every worker (a model that holds the adapters of its batch, say) is in one thread at a time.
    With one worker all happens in the calling thread.
    """
    # What the caller does with a result must not take a second core either: its helper thread would
    # go on spinning on it for a while, and a worker is there already.
    with one_core():
        if len(workers) == 1:
            yield from (work(workers[0], part) for part in parts)
        else:
            yield from _on_threads(work, workers, parts)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Compute each product in this thread on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _on_threads(
    work: Callable[[Worker, Part], Result], workers: Sequence[Worker], parts: Sequence[Part]
) -> Iterator[Result]:
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def one(part: Part) -> Result:
        worker = idle.get()
        try:
            with _slots:
                return work(worker, part)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(len(workers), "micro-batch", _use_one_core)
    try:
        yield from _ordered(pool, one, parts, ahead=2 * len(workers))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ordered(
    pool: ThreadPoolExecutor, one: Callable[[Part], Result], parts: Sequence[Part], ahead: int
) -> Iterator[Result]:
    """Keep no more than `ahead` parts under way, so that results that wait do not pile up."""
    waiting: deque[Future[Result]] = deque()
    for part in parts:
        waiting.append(pool.submit(one, part))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _use_one_core() -> None:
    torch.get_num_threads()  # a thread takes the shared number when it first asks, so ask before setting its own
    torch.set_num_threads(1)
