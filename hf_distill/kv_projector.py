"""The teacher's keys and values, brought to the student's width."""

import json
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_distill.modeling import whole_state

WEIGHTS, CONFIG = "projector.safetensors", "projector.json"


class KVProjector(nn.Module):
    """LayerNorm -> Linear -> SiLU -> Dropout -> Linear, one for keys and one for values: an elastic bottleneck.

    Args:
        teacher_width, student_width (`int`):
            Of a token's keys: `num_key_value_heads * head_dim`, under grouped-query attention not the hidden size.
        num_layers (`int`): projectors, one per mapped layer; 1 is shared over all layers.
        mlp_ratio (`float`): width of the bottleneck, in units of the student's.
        dropout (`float`): in [0, 1).

    Raises:
        `ValueError`: a width, number or ratio that makes no projector.
    """

    def __init__(
        self,
        teacher_width: int,
        student_width: int,
        num_layers: int = 1,
        mlp_ratio: float = 1.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in {
            "teacher_width": teacher_width,
            "student_width": student_width,
            "num_layers": num_layers,
        }.items():
            if value < 1:
                raise ValueError(f"{name} has to be at least 1, got {value}")
        if mlp_ratio <= 0 or not 0 <= dropout < 1:
            raise ValueError(f"mlp_ratio has to be above 0 and dropout in [0, 1), got {mlp_ratio} and {dropout}")
        self.settings = {
            "teacher_width": teacher_width, "student_width": student_width, "num_layers": num_layers,
            "mlp_ratio": mlp_ratio, "dropout": dropout,
        }  # fmt: skip
        hidden = max(1, round(mlp_ratio * student_width))

        def bottlenecks() -> nn.ModuleList:
            return nn.ModuleList(
                nn.Sequential(
                    nn.LayerNorm(teacher_width),
                    nn.Linear(teacher_width, hidden),
                    nn.SiLU(),
                    nn.Dropout(dropout),
                    nn.Linear(hidden, student_width),
                )
                for _ in range(num_layers)
            )

        self.keys, self.values = bottlenecks(), bottlenecks()

    def forward(self, keys: Tensor, values: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values (..., teacher_width) of the `layer`-th mapped layer, as (..., student_width)."""
        index = layer if len(self.keys) > 1 else 0
        return self.keys[index](keys), self.values[index](values)


class PCAProjector(nn.Module):
    """A frozen linear map: the teacher's principal components, turned towards the student's keys and values.

    It is fitted once, on a probe batch, so that it cannot move to meet the student.

    Args:
        teacher_width, student_width (`int`): as in [`KVProjector`].
        num_layers (`int`): maps, one per mapped layer.
    """

    def __init__(self, teacher_width: int, student_width: int, num_layers: int = 1) -> None:
        super().__init__()
        self.settings = {"teacher_width": teacher_width, "student_width": student_width, "num_layers": num_layers}
        shape = 2, num_layers  # keys and values
        self.register_buffer("matrix", torch.zeros(*shape, teacher_width, student_width))
        self.register_buffer("teacher_mean", torch.zeros(*shape, teacher_width))
        self.register_buffer("student_mean", torch.zeros(*shape, student_width))

    def forward(self, keys: Tensor, values: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values (..., teacher_width) of the `layer`-th mapped layer, as (..., student_width)."""
        return self._project(keys, 0, layer), self._project(values, 1, layer)

    def _project(self, features: Tensor, kind: int, layer: int) -> Tensor:
        centred = features.to(self.matrix.dtype) - self.teacher_mean[kind, layer]  # pyright: ignore
        return centred @ self.matrix[kind, layer] + self.student_mean[kind, layer]  # pyright: ignore

    @torch.no_grad()
    def fit(self, kind: int, layer: int, teacher: Tensor, student: Tensor) -> None:
        """Fits the map of keys (`kind` 0) or values (1) of one layer to features (N, F) and (N, G) of the same tokens.

        As many principal components of the teacher as the student has room for, turned by the orthogonal matrix that
        brings them closest to the student's features (Procrustes; Schoenemann, 1966), at the student's scale.
        """
        teacher, student = teacher.double(), student.double()
        teacher_mean, student_mean = teacher.mean(0), student.mean(0)
        teacher, student = teacher - teacher_mean, student - student_mean
        width = min(teacher.shape[1], student.shape[1], len(teacher))
        components = torch.linalg.svd(teacher, full_matrices=False).Vh[:width].T  # (F, width)
        reduced = teacher @ components  # (N, width)
        left, _, right = torch.linalg.svd(reduced.T @ student, full_matrices=False)
        scale = student.norm() / reduced.norm().clamp(min=1e-12)
        self.matrix[kind, layer] = scale * components @ (left @ right)  # pyright: ignore
        self.teacher_mean[kind, layer], self.student_mean[kind, layer] = teacher_mean, student_mean  # pyright: ignore


PROJECTORS = {"mlp": KVProjector, "pca": PCAProjector}


def save_projector(
    projector: KVProjector | PCAProjector, folder: str | PathLike[str], *, is_writer: bool = True
) -> None:
    """Writes `projector.safetensors` and `projector.json` beside the student's files.

    Where an engine has split it, all processes have to come here, and one of them writes.
    """
    state = whole_state(projector)
    if not is_writer:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, kind in PROJECTORS.items() if type(projector) is kind)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"projector": kind, **projector.settings}, indent=2), encoding="utf-8")


def load_projector(folder: str | PathLike[str]) -> KVProjector | PCAProjector:
    """The projector that `save_projector` wrote.

    Raises:
        `ValueError`: the folder has none.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder} has no {WEIGHTS} and {CONFIG}")
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    projector = PROJECTORS[settings.pop("projector")](**settings)
    projector.load_state_dict(load_file(folder / WEIGHTS))
    return projector
