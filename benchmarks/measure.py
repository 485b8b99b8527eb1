"""Time and extra memory of a step in a separate process, and the tables of these numbers."""

import ctypes
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console

from benchmarks.timed_rows import NotMeasured, seconds, size
from hf_distill.report import markdown, table

SAMPLING_INTERVAL = 0.002  # seconds


class Measurement(NamedTuple):
    times: list[float]  # seconds, one per step
    memory: int  # bytes: the largest peak of a step minus the memory before it

    @property
    def time(self) -> float:
        return statistics.median(self.times)


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """The result of `function(*args)` in a new process, without memory, caches or compiled kernels of other variants.

    Raises:
        `NotMeasured`: `function` raised it, or the process died, most likely because it ran out of memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise NotMeasured("the process was killed (out of memory?)") from None
        except torch.OutOfMemoryError:
            raise NotMeasured("out of GPU memory") from None


def measure(
    step: Callable[[Any], Any], inputs: Sequence[Any], *, reset: Callable[[], Any], device: str, warmup: int = 1
) -> Measurement:
    """Calls `step` once on each of `inputs`, after `warmup` calls on the first.

    `reset` runs before each step, outside the measurement. It drops the gradients of the previous step, so that the
    gradients of a step count as its memory.
    """
    times, memories = [], []
    for i, value in enumerate([*inputs[:1] * warmup, *inputs]):
        reset()
        with watched(device) as found:
            step(value)
        if i >= warmup:
            times.append(found["time"])
            memories.append(found["memory"])
    return Measurement(times, max(memories))


def watched(device: str) -> AbstractContextManager[dict[str, float]]:
    """Yields a dict. After the context, it has the `time` of the code inside and its peak `memory`."""
    return _cuda_step() if device.startswith("cuda") else _cpu_step()


@contextmanager
def _cpu_step() -> Iterator[dict[str, float]]:
    # glibc keeps freed blocks below 32 MB. Memory that a step takes from them would not be counted.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    process, done, found = psutil.Process(), threading.Event(), {}
    before = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLING_INTERVAL):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        start = time.perf_counter()
        yield found
        found["time"] = time.perf_counter() - start
    finally:  # after an error, the thread must not keep the process running
        done.set()
        sampler.join()
    found["memory"] = max(peak, process.memory_info().rss) - before


@contextmanager
def _cuda_step() -> Iterator[dict[str, float]]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, found = torch.cuda.memory_allocated(), {}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    yield found
    end.record()
    torch.cuda.synchronize()
    found["time"] = start.elapsed_time(end) / 1000
    found["memory"] = torch.cuda.max_memory_allocated() - before


def columns(found: Measurement, ours: Measurement | None) -> dict[str, str]:
    """Time and memory as text, with ratios ours / this row."""
    row = {"time": seconds(found.time), "time ratio": "", "extra memory": size(found.memory), "memory ratio": ""}
    if ours is not None:
        row["time ratio"] = f"{ours.time / found.time:.2f}x"
        row["memory ratio"] = f"{ours.memory / max(found.memory, 1):.2f}x"
    return row


def print_table(
    title: str, rows: Sequence[Mapping[str, Any]], as_markdown: bool, not_measured: Mapping[str, str] | None = None
) -> None:
    """Prints one table, and below it the reasons for rows without numbers. Missing cells are empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name, "") for name in names} for row in rows]
    if as_markdown:
        print(f"**{title}**\n\n{markdown(rows)}", flush=True)
    else:
        console = Console()
        console.width = console.width if console.is_terminal else 120
        console.print(table(rows, title))
    for name, reason in (not_measured or {}).items():
        print(f"{name}: not measured: {reason}\n", flush=True)


def machine(device: str) -> str:
    """The description of this machine."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
