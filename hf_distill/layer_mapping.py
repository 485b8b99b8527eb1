"""Layer mappings: the teacher layers that each student layer learns from."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# Student layer -> {teacher layer: weight}. The weights of a student layer sum to 1.
Mapping = dict[int, dict[int, float]]
NAMES = ("uniform", "last", "cka")
MAPPINGS = "layer_mappings.json"


def layer_mapping(layers: str | Sequence[Sequence[int]], num_student_layers: int, num_teacher_layers: int) -> Mapping:
    """The mapping for a setting that needs no data.

    Args:
        layers (`str` or list of pairs):
            "last" (the last layers of both models), "uniform" (every student layer, with the teacher layer at the same
            relative depth, the last with the last), or pairs `(student layer, teacher layer)`, where a negative number
            counts from the end.

    Raises:
        `ValueError`: an unknown name, or a layer that does not exist.
    """
    if layers == "last":
        layers = [(-1, -1)]
    elif layers == "uniform":
        layers = [
            (i, max(0, round((i + 1) * num_teacher_layers / num_student_layers) - 1)) for i in range(num_student_layers)
        ]
    elif isinstance(layers, str):
        raise ValueError(f"layers have to be one of {', '.join(NAMES)} or a list of pairs, got {layers!r}")
    found: Mapping = {}
    for pair in layers:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(layer, int) for layer in pair):
            raise ValueError(f"layers have to be pairs [student layer, teacher layer] of whole numbers, got {pair}")
        student = _index(pair[0], num_student_layers, "student")
        found.setdefault(student, {})[_index(pair[1], num_teacher_layers, "teacher")] = 1.0
    if not found:
        raise ValueError("layers have to be one pair [student layer, teacher layer] or more")
    return {student: {i: 1 / len(teachers) for i in teachers} for student, teachers in sorted(found.items())}


def cka_mapping(student: Sequence[Tensor], teacher: Sequence[Tensor], top: int = 2) -> Mapping:
    """A mapping from each student layer to the `top` teacher layers that are most similar on a probe batch.

    Args:
        student, teacher (sequences of `torch.Tensor` of shape `(N, F)`): features per layer at the same N positions.

    Returns:
        The mapping, with weights in proportion to the linear CKA (Kornblith et al., 1905.00414).
    """
    mapping: Mapping = {}
    for i, features in enumerate(student):
        likeness = torch.stack([linear_cka(features, other) for other in teacher])
        values, indices = likeness.topk(min(top, len(teacher)))
        weights = values / values.sum().clamp(min=1e-12)
        mapping[i] = dict(zip(indices.tolist(), weights.tolist(), strict=True))
    return mapping


def teacher_layers(mapping: Mapping) -> list[int]:
    """All teacher layers of a mapping, sorted."""
    return sorted({layer for teachers in mapping.values() for layer in teachers})


def describe_mapping(mapping: Mapping) -> str:
    """The mapping as readable text: each student layer and its teacher layers."""
    rows = [(layer, ", ".join(f"{i} ({weight:.0%})" for i, weight in ts.items())) for layer, ts in mapping.items()]
    return "; ".join(f"{layer} <- {teachers}" for layer, teachers in rows)


def save_mappings(folder: Path, mappings: dict[str, Mapping]) -> None:
    """Writes mappings into a checkpoint, because a probe batch would give other mappings for a trained student."""
    (folder / MAPPINGS).write_text(json.dumps(mappings, indent=2), encoding="utf-8")


def load_mappings(folder: Path) -> dict[str, Mapping]:
    """The mappings that `save_mappings` wrote to a folder; empty if there are none."""
    path = folder / MAPPINGS
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {
        name: {int(layer): {int(i): weight for i, weight in teachers.items()} for layer, teachers in mapping.items()}
        for name, mapping in found.items()
    }


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of features (N, F) and (N, G), in [0, 1] (Kornblith et al., 1905.00414, eq. 4).

    It does not change when either side is rotated or scaled. It is 1 for a rotation of the same features.
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    x, y = (z / z.norm().clamp(min=torch.finfo(z.dtype).tiny) for z in (x, y))
    cross = (y.T @ x).square().sum()
    return cross / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(min=torch.finfo(x.dtype).tiny)


def _index(layer: int, num_layers: int, side: str) -> int:
    if not -num_layers <= layer < num_layers:
        raise ValueError(f"the {side} has {num_layers} layers, there is no layer {layer}")
    return layer % num_layers
