"""Does a run fit? Bytes, FLOPs and traffic from configurations alone, before any weights are read."""

from typing import Any

from peft import PeftConfig

from hf_distill.planning.plan import Plan, Planner, Remedy
from hf_distill.planning.remedies import with_remedies
from hf_distill.planning.settings import Machine, parse_size, read_settings, without_gpu
from hf_distill.trainers.hard_label_config import HardLabelConfig

__all__ = ["Machine", "Plan", "Remedy", "parse_size", "plan_run", "without_gpu"]


def plan_run(
    model: str,
    teacher_model: str | list[str] | None = None,
    args: HardLabelConfig | None = None,
    *,
    peft_config: PeftConfig | None = None,
    quantization_config: Any = None,
    machine: Machine | None = None,
    row_tokens: int | None = None,
    prompt_tokens: int | None = None,
    teacher_prompt_tokens: int | None = None,
    label_share: float = 1.0,
    picture_tokens: int | None = None,
    teacher_picture_tokens: int | None = None,
) -> Plan:
    """The memory of a run, whether it fits, and what would make it fit; no weights, data or tokenizers are read.

    The model's forward, the loss, the backward and the optimizer's step run on tensors that have shapes and no memory,
    and what is alive is counted (docs/plan.md says how it compares with measured peaks).

    Args:
        model (`str`): as of the trainers, or the path of a `config.json`.
        teacher_model (`str` or list of `str`, *optional*):
            The same. A teacher may be "base", a store ("cache:folder") or an address. None trains on hard labels.
        args ([`HardLabelConfig`]): settings; their class says which trainer: `KDConfig`, `KVProjectionConfig`,
            `SpeculativeKDConfig`.
        peft_config (`PeftConfig`, *optional*): as of the trainers.
        quantization_config (*optional*): as of the trainers.
        machine ([`Machine`], *optional*): the devices, and how they share the work; by default one GPU.
        row_tokens (`int`, *optional*): tokens of the longest row; `max_length` by default.
        prompt_tokens (`int`, *optional*): tokens of the longest prompt of rollouts; 512 by default.
        teacher_prompt_tokens (`int`, *optional*): the same of the teacher's prompt, which may be longer (LUPI).
        label_share (`float`): the share of the tokens of text that bear a label; prompt tokens do not.
        picture_tokens (`int`, *optional*): tokens of the longest row that stand for pictures; None for rows of text
            alone. They count as tokens of the row.
        teacher_picture_tokens (`int`, *optional*): the same, for teachers whose processor makes another number.

    Returns:
        [`Plan`]. Where the run does not fit, it has remedies.

    Raises:
        `ValueError`: no configuration, settings that contradict each other, a model that cannot be run without values.
    """
    args = HardLabelConfig(output_dir="out") if args is None else args
    machine = machine or Machine(kind="cpu" if args.use_cpu else "cuda")
    settings = read_settings(
        model, teacher_model, args, peft_config=peft_config, quantization_config=quantization_config, machine=machine,
        row_tokens=row_tokens, prompt_tokens=prompt_tokens, teacher_prompt_tokens=teacher_prompt_tokens,
        label_share=label_share, picture_tokens=picture_tokens, teacher_picture_tokens=teacher_picture_tokens,
    )  # fmt: skip
    return with_remedies(Planner(), settings)
