"""The peak of a real step, by torch's profiler."""

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def second_peak(step: Any) -> int:
    """The highest running sum of allocations of a second `step()`, which `step.model` begins without gradients."""
    step()
    step.model.zero_grad()
    return peak_of(step)


def peak_of(function: Callable[[], Any]) -> int:
    """The highest running sum of allocations of a call."""
    gc.collect()  # what earlier tests have left would be freed in between, and count as less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    results: Any = found.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest
