"""The teacher's keys and values, brought to the student's width."""

import json
from os import PathLike
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes `projector.safetensors` and `projector.json` beside the student's files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, folder / WEIGHTS
        )
        (folder / CONFIG).write_text(json.dumps(self.settings, indent=2), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> "KVProjector":
        """The projector that `save_pretrained` wrote.

        Raises:
            `ValueError`: the folder has none.
        """
        folder = Path(folder)
        if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
            raise ValueError(f"{folder} has no {WEIGHTS} and {CONFIG}")
        projector = cls(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        projector.load_state_dict(load_file(folder / WEIGHTS))
        return projector
