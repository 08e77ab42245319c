"""The token budget follows the memory, and micro-batches in threads give what they give in turn."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import torch

from fedpipe.client import memory, parallel
from fedpipe.client.batching import Budget
from fedpipe.client.memory import find_budget, kept_bytes, running_out_said
from fedpipe.client.parallel import in_turn, workers_on
from fedpipe.errors import TrainingError
from fedpipe.models.task import Encoded
from fedpipe.workspace import Workspace

CPU = torch.device("cpu")


def record_of(length: int) -> Encoded:
    return Encoded(np.full(length, 5), np.array([0, length]), np.array([0]), pad=0, room=length)


def test_what_is_kept_grows_with_the_tokens(workspace: Workspace) -> None:
    model = workspace.model.to_batched()
    short, long = (kept_bytes(model, record_of(n), 0, CPU, "fp32") for n in (8, 16))
    assert 1.5 < long / short < 2.5
    # Hidden states of 16 numbers, several for each of two layers: more than the inputs, less than megabytes.
    assert 8 * 16 * 4 < short < 2**20


def test_less_is_kept_where_less_is_differentiated(workspace: Workspace) -> None:
    model = workspace.model.to_batched()
    only_b = [spec for spec in model.specs if spec.factor != "A"]
    all_of_it, less = (kept_bytes(model, record_of(16), 0, CPU, "fp32", active) for active in (None, only_b))
    assert less < all_of_it


def test_the_budget_follows_the_memory(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = workspace.model.to_batched(), record_of(16)
    per_token = kept_bytes(model, records, 0, CPU, "fp32") / 16
    monkeypatch.setattr(memory, "CPU_TOKENS", 10**9)
    monkeypatch.setattr(memory, "workers_on", lambda device: 2)

    def tokens(total: float) -> int:
        monkeypatch.setattr(memory, "device_memory", lambda device: total)
        return find_budget("auto", model, records, CPU, "fp32").tokens

    # Two workers, each with batches of 2000 tokens, twice over for the backward pass, in a quarter of the memory.
    assert tokens(2 * 2000 * per_token * 2 / 0.25) == 1024
    assert tokens(2 * 2100 * per_token * 2 / 0.25) == 2048
    assert tokens(1.0) == memory.SMALLEST
    assert tokens(1e18) == memory.LARGEST


def test_a_number_is_a_bound_and_a_processor_has_its_own(workspace: Workspace) -> None:
    model, records = workspace.model.to_batched(), record_of(16)
    assert find_budget(100, model, records, CPU, "fp32").tokens == 100
    assert find_budget(10**6, model, records, CPU, "fp32").tokens == memory.CPU_TOKENS
    assert find_budget("auto", model, records, CPU, "fp32") == find_budget("auto", model, records, CPU, "fp32")


def test_copies_of_large_factors_count_as_tokens(workspace: Workspace) -> None:
    model, records = workspace.model.to_batched(), record_of(16)
    factors = sum(spec.numel for spec in model.specs if spec.factor != "head")
    kept = kept_bytes(model, records, 0, CPU, "fp32") / 16
    assert find_budget("auto", model, records, CPU, "fp32").record == round(2 * 4 * factors / kept)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: not enough")])
def test_running_out_of_memory_names_the_cure(error: Exception) -> None:
    with (
        pytest.raises(TrainingError, match=r"up to 512 tokens.*set runtime\.tokens_per_batch to 256"),
        running_out_said(Budget(512)),
    ):
        raise error
    with pytest.raises(RuntimeError, match="another"), running_out_said(Budget(512)):
        raise RuntimeError("another mistake")


def test_memory_is_that_of_the_machine_or_less() -> None:
    with open("/proc/meminfo", encoding="utf-8") as lines:
        machine = int(next(line for line in lines if line.startswith("MemTotal")).split()[1]) * 1024
    assert 0 < memory.device_memory(CPU) <= machine


# Threads


def test_results_come_in_the_order_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_slots", threading.BoundedSemaphore(3))
    generator, busy, both = random.Random(0), [], threading.Lock()

    def work(worker: str, part: int) -> int:
        with both:
            assert worker not in busy, "a worker is in two threads"
            busy.append(worker)
        time.sleep(generator.random() / 200)
        with both:
            busy.remove(worker)
        return part * part

    assert list(in_turn(work, ["a", "b", "c"], range(40))) == [n * n for n in range(40)]


def test_no_more_than_a_few_results_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by the threads, however slowly results are taken."""
    monkeypatch.setattr(parallel, "_slots", threading.BoundedSemaphore(2))
    begun: list[int] = []
    results = in_turn(lambda worker, part: begun.append(part), ["a", "b"], range(100))
    next(results)
    time.sleep(0.05)
    assert len(begun) <= 5
    results.close()
    assert len(begun) < 100


def test_an_error_ends_it_and_threads_are_as_before() -> None:
    threads = torch.get_num_threads()

    def work(worker: int, part: int) -> int:
        assert torch.get_num_threads() == 1
        if part == 3:
            raise ValueError("part three")
        return part

    with pytest.raises(ValueError, match="part three"):
        list(in_turn(work, [0, 1], range(50)))
    assert torch.get_num_threads() == threads
    found: list[int] = []
    fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert found == [threads]


def test_one_worker_works_in_the_calling_thread() -> None:
    here = threading.get_ident()
    assert list(in_turn(lambda worker, part: threading.get_ident() == here, ["a"], range(3))) == [True] * 3


def test_a_gpu_has_one_worker() -> None:
    assert workers_on(torch.device("cuda")) == 1
    assert workers_on(CPU) == min(torch.get_num_threads(), parallel.MOST_WORKERS)
