"""The lower bound of a measured step's time, and counts of its launches, synchronisations, products and reads.

Work is a formula of shapes, the same for every implementation. It counts the FLOPs of matrix products (2 per
multiplication and addition; nothing element-wise) and the bytes that have to move through the device's memory: each
input is read once, each output is written once. The floor is the larger of `flops / ceiling` and `bytes / ceiling`. The
ceilings are measured on the same device by one large product and one large copy.

Shapes: B rows, T tokens of a row, N label-bearing positions, Ds and Dt hidden widths, V vocabulary.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

from benchmarks.measure import measure


class Work(NamedTuple):
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.bytes * factor)


class Ceilings(NamedTuple):
    flops: float  # per second
    bytes: float  # per second, read and written

    def floor(self, work: Work) -> float:
        """Seconds."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def measure_ceilings(device: str, dtype: torch.dtype, *, size: int, copied: int, repeats: int = 10) -> Ceilings:
    """The ceilings of this device: from a product of random (size, size) matrices, and a copy of `copied` bytes."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    options = {"reset": lambda: None, "device": device, "warmup": 3}
    product = measure(lambda _: torch.mm(left, right), [None] * repeats, **options).time
    copy = measure(lambda _: target.copy_(source), [None] * repeats, **options).time
    return Ceilings(2 * size**3 / product, 2 * copied / copy)


# --------------------------------------------------------------------------------------------------------------- work


def loss_work(rows: int, vocab: int, student_width: int, teacher_width: int, *, item: int, frozen_head=False) -> Work:
    """The work of the loss: the student's logits, their two gradients, and the teacher's logits.

    Both hidden states and both heads are read; the gradients of the student's are written. A frozen head saves one
    product and one gradient.
    """
    student, teacher = rows * vocab * student_width, rows * vocab * teacher_width
    written = rows * student_width + (0 if frozen_head else vocab * student_width)
    read = (rows + vocab) * (student_width + teacher_width)
    return Work(2 * ((2 if frozen_head else 3) * student + teacher), item * (read + written))


def layer_parameters(config: Any) -> int:
    """The parameters of the linear layers of all blocks: queries, keys, values, output, and a gated MLP."""
    width, heads = config.hidden_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * head_width, config.num_key_value_heads * head_width
    return config.num_hidden_layers * (2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size)


def backbone_work(
    config: Any, lengths: Sequence[int], *, item: int, trained: str = "nothing", weight_bytes: float | None = None
) -> Work:
    """The work of all blocks over separate texts of these lengths, without embeddings, norms and head.

    Attention counts the pairs of a token with itself and with earlier tokens, in two products.

    Args:
        trained (`str`):
            "nothing": the forward only. "weights": forward and backward, with three times the products, and the
            gradients are written. "adapters": forward and the gradients of hidden states, with twice the products of
            the linear layers.
        weight_bytes (`float`, *optional*): bytes of a block's weights, if they are quantised.
    """
    linear, attention = {"nothing": (1, 1), "adapters": (2, 3), "weights": (3, 3)}[trained]
    parameters, tokens = layer_parameters(config), sum(lengths)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    products = config.num_hidden_layers * 4 * config.num_attention_heads * head_width * pairs
    weights = item * parameters if weight_bytes is None else weight_bytes
    written = item * parameters if trained == "weights" else 0
    hidden = 2 * item * tokens * config.hidden_size
    return Work(linear * 2 * parameters * tokens + attention * products, weights + written + hidden)


def reading_work(config: Any, rows: int, new: int, context: float, *, item: int) -> Work:
    """The work of a forward of `new` tokens per row over a cache of `context` tokens: blocks, cache and head."""
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers, keys = config.num_hidden_layers, config.num_key_value_heads * head_width
    parameters = layer_parameters(config) + config.vocab_size * config.hidden_size
    attention = layers * 4 * config.num_attention_heads * head_width * new * context
    cache = 2 * layers * keys * (context + new)
    return Work(rows * (2 * parameters * new + attention), item * (parameters + rows * cache))


# ------------------------------------------------------------------------------------------------------------- counts


LAUNCHES = ("LaunchKernel", "GraphLaunch")  # cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernelEx, ...
SYNCHRONISATIONS = {
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize",
}  # fmt: skip
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
# Operations at which the host waits for the device: a number is read, or a shape depends on one.
HOST_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}


def count_events(step: Callable[[], Any]) -> dict[str, float]:
    """Counts of one step: launches, synchronisations, matrix products, reads by the host; and seconds in kernels.

    On the CPU, the first two are 0, and each read would be a synchronisation on a GPU.
    """
    always = _of_the_profiler() if torch.cuda.is_available() else {}
    counts = _count_events(step)
    counts.subtract(always)
    return dict(counts)


@functools.cache
def _of_the_profiler() -> Counter:
    """The counts of an empty profile, because the profiler itself synchronises at its start and end."""
    return _count_events(lambda: None)


def _count_events(step: Callable[[], Any]) -> Counter:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    counts = Counter()
    for event in profiler.key_averages():
        counts["launches"] += event.count * any(part in event.key for part in LAUNCHES)
        counts["syncs"] += event.count * (event.key in SYNCHRONISATIONS)
        counts["products"] += event.count * (event.key in PRODUCTS)
        counts["host reads"] += event.count * (event.key in HOST_READS)
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            counts["kernel seconds"] += event.self_device_time_total / 1e6
    return counts


def compiled_graphs() -> int:
    """The number of graphs that torch.compile has made in this process. In the steady state, new ones recompile."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
