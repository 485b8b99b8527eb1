"""Projectors: the teacher's keys and values to the student's width, the student's hidden states to the teacher's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_distill.modeling import whole_state


class KVProjector(nn.Module):
    """A trained projector for keys and one for values: LayerNorm -> Linear -> SiLU -> Dropout -> Linear.

    Args:
        teacher_width (`int`):
            Width of a token's keys: `num_key_value_heads * head_dim`. Under grouped-query attention, this is not the
            hidden size.
        student_width (`int`): the same of the student.
        num_layers (`int`): number of projectors, one per mapped layer; 1 is shared by all layers.
        mlp_ratio (`float`): width of the middle layer, in units of the student's width.
        dropout (`float`): in [0, 1).

    Raises:
        `ValueError`: a width, number or ratio is out of range.
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
    """A frozen linear map: the teacher's principal directions, rotated towards the student's keys and values.

    It is fitted once, on a probe batch, so it cannot collapse towards the student. It keeps the teacher's mean and
    lengths, because those of an untrained student carry no information.

    Args:
        teacher_width (`int`): as in [`KVProjector`].
        student_width (`int`): as in [`KVProjector`].
        num_layers (`int`): number of maps, one per mapped layer.
    """

    def __init__(self, teacher_width: int, student_width: int, num_layers: int = 1) -> None:
        super().__init__()
        self.settings = {"teacher_width": teacher_width, "student_width": student_width, "num_layers": num_layers}
        self.register_buffer("matrix", torch.zeros(2, num_layers, teacher_width, student_width))  # keys and values

    def forward(self, keys: Tensor, values: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values (..., teacher_width) of the `layer`-th mapped layer, as (..., student_width)."""
        matrix: Tensor = self.matrix[:, layer]  # pyright: ignore
        return keys.to(matrix.dtype) @ matrix[0], values.to(matrix.dtype) @ matrix[1]

    @torch.no_grad()
    def fit(self, kind: int, layer: int, teacher: Tensor, student: Tensor) -> None:
        """Fits the map of keys (`kind` 0) or values (1) of one layer to features (N, F) and (N, G) of the same tokens.

        The map keeps as many principal directions of the teacher (about the origin) as the student's width allows. It
        rotates them by the orthogonal matrix that brings them closest to the student's features (Procrustes;
        Schoenemann, 1966).
        """
        teacher, student = teacher.double(), student.double()
        width = min(teacher.shape[1], student.shape[1], len(teacher))
        directions = torch.linalg.svd(teacher, full_matrices=False).Vh[:width].T  # (F, width)
        left, _, right = torch.linalg.svd((teacher @ directions).T @ student, full_matrices=False)
        self.matrix[kind, layer] = directions @ (left @ right)  # pyright: ignore


class HiddenProjector(nn.Module):
    """One linear map per mapped layer, from the student's hidden size to the teacher's (TinyBERT, 1909.10351, eq. 8).

    It is trained, but cannot collapse, because its output is compared with the teacher's own hidden states.
    """

    def __init__(self, student_width: int, teacher_width: int, num_layers: int = 1) -> None:
        super().__init__()
        self.settings = {"student_width": student_width, "teacher_width": teacher_width, "num_layers": num_layers}
        self.maps = nn.ModuleList(nn.Linear(student_width, teacher_width) for _ in range(num_layers))

    def forward(self, hidden: Tensor, layer: int = 0) -> Tensor:
        """Hidden states (..., student_width) of the `layer`-th mapped layer, as (..., teacher_width)."""
        return self.maps[layer](hidden.to(self.maps[layer].weight.dtype))  # pyright: ignore


PROJECTORS = {"mlp": KVProjector, "pca": PCAProjector}  # of keys and values
# A separate folder, because servers would mistake a projector's weights in the student's folder for a part of it.
FOLDER = "projectors"
_KINDS = {**PROJECTORS, "linear": HiddenProjector}


def save_projector(
    projector: nn.Module, folder: str | PathLike[str], name: str = "projector", *, is_writer: bool = True
) -> None:
    """Writes `<name>.safetensors` and `<name>.json` into a folder.

    If an engine has split the projector, all processes have to call this; one of them writes.
    """
    state = whole_state(projector)
    if not is_writer:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(_settings(projector), indent=2), encoding="utf-8")


def _settings(projector: nn.Module) -> dict[str, Any]:
    kind = next(kind for kind, of in _KINDS.items() if type(projector) is of)
    return {"projector": kind, **projector.settings}  # pyright: ignore[reportGeneralTypeIssues]


def load_projector(folder: str | PathLike[str], name: str = "projector") -> nn.Module:
    """The projector that `save_projector` wrote, or that was saved with the student in this folder.

    Raises:
        `ValueError`: the folder has no projector of this name.
    """
    config = saved_projectors(folder).get(name, Path(folder, f"{name}.json"))
    weights = config.with_suffix(".safetensors")
    if not config.exists() or not weights.exists():
        raise ValueError(f"{folder} has no {weights.name} and {config.name}: it is not of a run with this projector")
    settings = json.loads(config.read_text(encoding="utf-8"))
    projector = _KINDS[settings.pop("projector")](**settings)
    projector.load_state_dict(load_file(weights))
    return projector


def saved_projectors(folder: str | PathLike[str]) -> dict[str, Path]:
    """The JSON files of all projectors that were saved with the student in a folder, by name."""
    # Earlier versions wrote them beside the student's own files.
    paths = [*Path(folder).glob("*projector*.json"), *Path(folder, FOLDER).glob("*.json")]
    return {path.stem: path for path in paths}


class Projectors(nn.ModuleDict):
    """The projectors of a run, by name. They are submodules of the student during training, but not in its saved state.

    So they are zeroed, clipped, reduced and moved with the student. On their own, they would drift between processes.
    """

    @contextmanager
    def attached(self, student: nn.Module) -> Iterator[None]:
        """Makes them a submodule of the student inside the context, if there are any."""
        if len(self):
            student.projectors = self
        try:
            yield
        finally:
            if len(self):
                del student.projectors

    @contextmanager
    def detached(self, student: nn.Module) -> Iterator[None]:
        """Takes them off the student inside the context, and puts them back if they were attached."""
        attached = hasattr(student, "projectors")
        if attached:
            del student.projectors
        try:
            yield
        finally:
            if attached:
                student.projectors = self

    def without(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entries of a student's state without those of the projectors."""
        return {key: tensor for key, tensor in state_dict.items() if "projectors." not in key}

    def save(self, folder: str | PathLike[str], *, is_writer: bool = True) -> None:
        """Writes all projectors into the folder `projectors` inside the student's folder."""
        for name, projector in self.items():
            save_projector(projector, Path(folder, FOLDER), name, is_writer=is_writer)

    def misfit(self, folder: str | PathLike[str]) -> str | None:
        """The difference between a folder's projectors and these, or None.

        It is the end of a sentence that starts with the folder's name.
        """
        saved = saved_projectors(folder)
        if missing := [name for name in self if name not in saved]:
            return f"has no {missing[0]}.safetensors and {missing[0]}.json: it is not of a run with this projector"
        if strange := sorted(saved.keys() - set(self)):
            return f"has a {strange[0]}.json: it is of a run with a projector, and this run has none of that name"
        for name, projector in self.items():
            found, mine = json.loads(saved[name].read_text(encoding="utf-8")), _settings(projector)
            if found != mine:
                return f"has another {name} ({found}) than this run ({mine}): resume with the settings of its run"
        return None

    def load(self, folder: str | PathLike[str]) -> None:
        """Loads the weights that `save` wrote.

        Raises:
            `ValueError`: a projector is missing in the folder.
        """
        for name, projector in self.items():
            projector.load_state_dict(load_projector(folder, name).state_dict())

    def give_own_group(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """Moves their parameters from the optimizer's groups to new groups with this learning rate."""
        own = {id(parameter) for parameter in self.parameters()}
        for group in list(optimizer.param_groups):
            mine = [parameter for parameter in group["params"] if id(parameter) in own]
            if mine:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                optimizer.add_param_group({**group, "params": mine, "lr": learning_rate})
