"""Bytes that an update sends between processes, and from the teacher to the student: an estimate before a run."""

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def bytes_between_processes(
    engine: str,
    num_processes: int,
    *,
    parameters: int,
    trainable: int,
    micro_batches: int = 1,
    once: int = 0,
    parameter_bytes: int = 2,
    gradient_bytes: int = 2,
) -> dict[str, int]:
    """The bytes that each process sends per update, by purpose. It receives as many.

    Collectives are counted as ring algorithms: for S bytes, an all-gather and a reduce-scatter each send
    S * (W - 1) / W, and an all-reduce sends twice that. The few numbers that are summed for logs and divisors are
    not counted.

    Args:
        engine (`str`): one of `ENGINES`.
        num_processes (`int`): W; 1 sends nothing.
        parameters (`int`): the student's parameters.
        trainable (`int`): those of them that get a gradient.
        micro_batches (`int`): per update and process.
        once (`int`):
            Parameters that are gathered for the forward but not again for the backward. With FSDP2, these are the
            final norm and the head; with ZeRO-3, those that `stage3_max_reuse_distance` keeps; with LoRA, those before
            all adapters.
        parameter_bytes (`int`): bytes of a parameter that is sent.
        gradient_bytes (`int`): bytes of a gradient that is sent.

    Raises:
        `ValueError`: an unknown engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine has to be one of {', '.join(ENGINES)}, got {engine!r}")
    share = (num_processes - 1) / num_processes
    gradients = share * trainable * gradient_bytes
    weights = share * parameters * parameter_bytes
    if engine == "ddp":
        return {"gradients": round(2 * gradients), "weights": 0}
    if engine == "zero2":  # Each micro-batch is all-reduced; the ranks then exchange updated weights.
        return {
            "gradients": round(micro_batches * 2 * gradients),
            "weights": round(share * trainable * parameter_bytes),
        }
    forward_and_backward = 2 * weights - share * once * parameter_bytes
    reductions = 1 if engine == "fsdp2" else micro_batches
    return {"gradients": round(reductions * gradients), "weights": round(micro_batches * forward_and_backward)}


def bytes_from_teacher(label_tokens: int, hidden_size: int, *, inner_layers: int = 0, bytes_per_number: int = 2) -> int:
    """The bytes that a teacher on another device sends per update: hidden states of label-bearing tokens only."""
    return label_tokens * hidden_size * (1 + inner_layers) * bytes_per_number


def bytes_for_rollouts(num_processes: int, parameters: int, *, parameter_bytes: int = 2) -> int:
    """The bytes that FSDP2 and ZeRO-3 also send per update to gather the student for generation."""
    return round((num_processes - 1) / num_processes * parameters * parameter_bytes)
