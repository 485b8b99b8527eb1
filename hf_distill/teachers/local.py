"""A teacher in this process: a model of its own, or the student's own base.

Shapes: B batch, T tokens, N label-bearing positions.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.models import prepare_deepspeed

from hf_distill.losses.fused_linear import Head, TeacherSignal
from hf_distill.losses.objective import Objective
from hf_distill.modeling import (
    backbone,
    causal_lm,
    check_head,
    decoder_layers,
    embedding_weight,
    evaluating,
    gathered,
    head_of,
    input_device,
    is_split,
    keep_4bit_weights,
    label_positions,
    last_hidden_states,
    layer_outputs,
    num_positions,
    num_token_ids,
    public_name,
    select_positions,
    shared_parameters,
    trying,
)
from hf_distill.teachers.columns import PREFIX, AnyDataset, collate_own_text, map_rows, with_teacher_prompt
from hf_distill.token_rows import Room, check_batch, without_long_rows
from hf_distill.verifying import Evidence, LocalVerifier, RolloutConfig

# Values of `init_lora_weights` that leave the weights under the adapter as they are. The others that PEFT 0.21 has
# (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) move a part of them into the adapter, or round them.
_INITS_BESIDE_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


class LocalTeacher:
    """A frozen causal language model in eval mode. Only hidden states leave its device; its head is copied once.

    They leave it when the loss asks for them: until then the student is computed at the same time, on its own device.

    Args:
        model (`PreTrainedModel`): frozen and put into eval mode here.
        signal_device (`torch.device`): where the losses are computed, the student's device.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for prompts of the teacher's own.
        num_proc (`int`, *optional*): processes that prepare rows.
        drop_long_rows (`bool`): whether rows with a text of the teacher's own that is too long for it are dropped, not
            refused.
    """

    remembers = True

    def __init__(
        self,
        model: PreTrainedModel,
        signal_device: torch.device,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_proc: int | None = None,
        *,
        drop_long_rows: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = public_name(model)
        self.tokenizer, self.num_proc, self.drop_long_rows = tokenizer, num_proc, drop_long_rows
        self._causal_lm = causal_lm(model)
        self.num_positions = num_positions(model)
        keep_4bit_weights(model)  # A teacher is left as it came.
        with gathered(self._causal_lm):
            head = head_of(self._causal_lm)
            check_head(self._causal_lm, "teacher")
            copy = is_split(model)  # the gathered weight is freed when this block ends
            bias = None if head.bias is None else head.bias.to(signal_device, copy=copy)
            self.head = head._replace(weight=head.weight.to(signal_device, copy=copy), bias=bias)
        self.layers: tuple[int, ...] = ()  # inner layers whose output is part of the signal
        self.sharded = False

    @property
    def layout(self) -> str:
        """The devices that the weights are on, for people."""
        if self.sharded:
            return "split over all processes"
        devices = sorted({str(parameter.device) for parameter in self.model.parameters()})
        return "the CPU's memory, layer by layer on the student's device" if devices == ["meta"] else ", ".join(devices)

    def bind(self, student: PreTrainedModel, accelerator: Accelerator, *, sharded: bool) -> None:
        """Called once, when the student is loaded. Splits the model over all processes if `sharded`.

        The engine is the student's. The copy of the head stays whole.

        Raises:
            `ValueError`: training the student would change the teacher.
        """
        refuse_shared_memory(student, self.model)
        if not (sharded or is_split(self.model)):
            return
        self.sharded = True
        part: Any = backbone(self._causal_lm)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._engine = prepare_deepspeed(part, accelerator)
        else:
            fsdp2_prepare_model(accelerator, part)

    def prepare(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """Rows with the tokens of their `teacher_prompt` ([`~hf_distill.teachers.columns.with_teacher_prompt`])."""
        return with_own_text(self, dataset, name)

    collate = staticmethod(collate_own_text)

    def view(self, inputs: Mapping[str, Any], positions: Tensor) -> tuple[dict[str, Any], Tensor]:
        """The inputs that the model reads of a batch, and the positions (N,) in them."""
        return own_view(self._causal_lm, inputs, positions)

    @property
    def eos_token_ids(self) -> list[int]:
        """As in [`~hf_distill.teachers.WritingTeacher`]: those that the model's generation knows."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        return [] if found is None else found if isinstance(found, list) else [found]

    def verifier(
        self, prompt_ids: Tensor, prompt_mask: Tensor, config: RolloutConfig, vocab_size: int
    ) -> LocalVerifier:
        """As in [`~hf_distill.teachers.WritingTeacher`]."""
        return LocalVerifier(self.model.eval(), prompt_ids, prompt_mask, config, vocab_size)

    def signal(self, evidence: Evidence) -> TeacherSignal:
        """As in [`~hf_distill.teachers.WritingTeacher`]."""
        weight = self.head.weight
        return TeacherSignal(evidence["hidden"] if evidence else weight.new_zeros(0, weight.shape[1]), self.head)

    @torch.no_grad()
    def divergence(self, evidence: Evidence, other: Evidence, vocab_size: int) -> Tensor:
        """As in [`~hf_distill.teachers.WritingTeacher`]."""
        hidden = other["hidden"]
        no_labels = torch.full((len(hidden),), -100, device=hidden.device)
        objective = Objective(kd_weight=1.0, vocab_size=vocab_size)
        return self.signal(evidence).loss(hidden, self.head, no_labels, objective).kd

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], positions: Tensor) -> TeacherSignal:
        """The signal at flat `positions` (N,) of the student's batch (B * T)."""
        inputs, positions = self.view(inputs, positions)
        self.model.eval()
        device, dtype = input_device(self._causal_lm), embedding_weight(self._causal_lm).dtype
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for name, value in inputs.items()  # pixels in the precision of the weights, which not all families see to
        }
        return signal_of(self._causal_lm, self.head, inputs, positions, self.layers)


class BaseTeacher:
    """The base model of a student with adapters, which are switched off while it is asked: no second copy in memory.

    Args:
        student (`PeftModel`, *optional*): trained in its adapters alone; may come later, by [`bind`].
        tokenizer, num_proc, drop_long_rows: as in [`LocalTeacher`].
        positions (`int`, *optional*): the number of tokens that a student which comes later can read.

    Raises:
        `ValueError`: the student has no adapters, trains parameters of its base model, or has adapters whose
            initialisation changes it.
    """

    layout = "the student without its adapters"
    name = "the student without adapters"

    def __init__(
        self,
        student: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_proc: int | None = None,
        *,
        positions: int | None = None,
        drop_long_rows: bool = False,
    ) -> None:
        self.tokenizer, self.num_proc, self.drop_long_rows = tokenizer, num_proc, drop_long_rows
        self.num_positions = positions
        self.layers: tuple[int, ...] = ()
        self.model: Any = None
        if student is not None:
            self.bind(student)

    def bind(self, student: Any, accelerator: Accelerator | None = None, *, sharded: bool = False) -> None:
        """Called once, when the student is loaded."""
        if not isinstance(student, PeftModel):
            raise ValueError("teacher_model='base' needs a student with adapters: pass a peft_config")
        prefix = student.base_model.prefix
        if trained := [n for n, p in student.named_parameters() if p.requires_grad and prefix not in n]:
            raise ValueError(
                f"teacher_model='base' needs a base model that stays as it is, but {trained[0]} is trained: remove "
                "modules_to_save and bias from the peft_config, or pass the teacher by name"
            )
        for config in student.peft_config.values():
            if (setting := _changes_base(config)) is not None:
                raise ValueError(
                    f"teacher_model='base' needs a base model that stays as it is, but {setting} changes its weights "
                    "when the adapters are made: pass the base model by its name as the teacher instead"
                )
        self.model, self.num_positions = student, num_positions(student)
        self.name = f"{public_name(causal_lm(student))} without adapters"
        # Its head is the student's, which has been checked. It reads without the student's mixed precision.
        unfit = f"the teacher ({self.name}) cannot read by itself; load it in one dtype"
        with self._without_adapters() as base, torch.no_grad(), trying(unfit):
            last_hidden_states(base, input_ids=torch.zeros(1, 2, dtype=torch.long, device=input_device(base)))

    @property
    def head(self) -> Head:
        """The student's."""
        return head_of(causal_lm(self.model))

    def prepare(self, dataset: AnyDataset, name: str) -> AnyDataset:
        """As in [`LocalTeacher`]."""
        return with_own_text(self, dataset, name)

    collate = staticmethod(collate_own_text)

    def view(self, inputs: Mapping[str, Any], positions: Tensor) -> tuple[dict[str, Any], Tensor]:
        """As in [`LocalTeacher`]."""
        return own_view(causal_lm(self.model), inputs, positions)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], positions: Tensor) -> TeacherSignal:
        """As in [`LocalTeacher`]."""
        inputs, positions = self.view(inputs, positions)
        with self._without_adapters() as base:
            return signal_of(base, self.head, inputs, positions, self.layers)

    @contextmanager
    def _without_adapters(self) -> Iterator[PreTrainedModel]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            with evaluating(self.model), self.model.disable_adapter():
                yield causal_lm(self.model)
        finally:
            # PEFT switches all of the adapters' gradients on again, those of frozen parts (LoRA-FA), too.
            self.model.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)


def _changes_base(config: PeftConfig) -> str | None:
    """The setting of an adapter with which PEFT changes the weights under it, or None.

    The model itself cannot be asked: a trained adapter, and a new one with random values, also differ from their base.
    PEFT initialises an adapter again when it is loaded, so the setting counts for trained ones, too.
    """
    if not isinstance(config, LoraConfig):
        return None
    if config.kasa_config is not None:
        return "kasa_config"
    is_known = str(config.init_lora_weights).lower() in _INITS_BESIDE_THE_BASE
    return None if is_known else f"init_lora_weights={config.init_lora_weights!r}"


def with_own_text(teacher: Any, dataset: AnyDataset, name: str) -> AnyDataset:
    """Rows with the text of a teacher's own that their `teacher_prompt` makes, if they have one.

    The teacher has `tokenizer`, `num_positions`, `num_proc` and `drop_long_rows`, as [`LocalTeacher`].
    """
    columns = set(next(iter(dataset), {}))
    if teacher.tokenizer is not None and "teacher_prompt" in columns:
        positions = None if teacher.drop_long_rows else teacher.num_positions
        function = partial(with_teacher_prompt, tokenizer=teacher.tokenizer, positions=positions, dataset_name=name)
        dataset = map_rows(dataset, function, f"Tokenizing teacher prompts of {name} dataset", teacher.num_proc)
        columns.add("teacher_input_ids")
    if teacher.drop_long_rows and "teacher_input_ids" in columns:
        room = Room(f"the teacher ({teacher.name})", teacher.num_positions, "teacher_input_ids")
        dataset = without_long_rows(dataset, name, [room], teacher.num_proc)
    return dataset


def own_view(model: PreTrainedModel, inputs: Mapping[str, Any], positions: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The inputs that a model reads of a batch, its own text or the student's, and the positions (N,) in them."""
    if f"{PREFIX}input_ids" not in inputs:
        return {name: value for name, value in inputs.items() if not name.startswith(PREFIX)}, positions
    num_ids = num_token_ids(model)
    number = check_batch(inputs, PREFIX, num_ids, num_ids, None)
    positions, _ = label_positions(inputs[f"{PREFIX}labels"], number)
    return {name: inputs[PREFIX + name] for name in ("input_ids", "attention_mask")}, positions


def signal_of(
    model: PreTrainedModel,
    head: Head,
    inputs: dict[str, Tensor],
    positions: Tensor,
    layers: Sequence[int],
) -> TeacherSignal:
    """The signal of a model at flat `positions` (N,) of a batch, on the model's device.

    Of the inner `layers` only these positions are kept. The last layer's output comes after the final norm, as
    transformers counts hidden states.
    """
    inner: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> None:
        inner[layer] = select_positions(hidden, positions)

    with layer_outputs(model, layers, keep):
        last = last_hidden_states(model, **inputs)
    hidden = select_positions(last, positions)
    if layers and (final := len(decoder_layers(model)[1]) - 1) in layers:
        inner[final] = hidden
    return TeacherSignal(hidden, head, layers=inner)


def refuse_student_as_teacher(student: Any, teachers: Iterable[Any]) -> None:
    """Raises `ValueError` if one of the teachers is the student object; equal names are two models."""
    if any(student is teacher and not isinstance(student, str) for teacher in teachers):
        raise ValueError("the teacher is the student object itself; load the model twice to distil it into itself")


def refuse_shared_memory(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises `ValueError` if training the student would change the teacher."""
    if shared := shared_parameters(student, teacher):
        raise ValueError(
            f"{len(shared)} of the student's trainable parameters are the teacher's own memory ({shared[0]}, ...): "
            "training would change the teacher. Copy one of them (copy.deepcopy)"
        )
