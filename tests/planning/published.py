"""Configurations of public models as their config.json has them, and the numbers of parameters on their cards."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "fixtures" / "configs"
NAMES = (
    "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct", "microsoft/phi-2", "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct",
)  # fmt: skip
CONFIGS = {name: FOLDER / f"{name.split('/')[1]}.json" for name in NAMES}
CONFIGS["Qwen/Qwen2.5-7B"] = CONFIGS["Qwen/Qwen2.5-7B-Instruct"]  # the same shapes
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "microsoft/phi-2": 2_779_683_840,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B": 8_292_166_656,
}
