"""The phases of an update on fake tensors: the student's step, the teacher's forward, the optimizer's step, a rollout.

Each runs the code that trains, and returns what it takes beside the weights.

Shapes: B rows, T tokens, N label-bearing positions, D hidden width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_distill.kv_projector import HiddenProjector, KVProjector, PCAProjector
from hf_distill.layer_mapping import Mapping as LayerMapping
from hf_distill.layer_mapping import teacher_layers
from hf_distill.losses.feature import FEATURE_LOSSES, HIDDEN_LOSSES
from hf_distill.losses.fused_linear import TeacherSignal
from hf_distill.losses.hard import hard_label_loss
from hf_distill.losses.head import Head
from hf_distill.losses.objective import Objective
from hf_distill.losses.sparse import SparseSignal, TopKSignal
from hf_distill.modeling import (
    KVCapture,
    causal_lm,
    embedding_weight,
    expose_hidden_states,
    head_of,
    kv_widths,
    select_positions,
    spare_frozen_tower,
)
from hf_distill.planning.batches import Batch
from hf_distill.planning.devices import as_on
from hf_distill.planning.ledger import CUDA_GRAIN, GRADIENTS, LiveBytes, Peak
from hf_distill.planning.models import (
    ModelSpec,
    ParameterShape,
    layer_bytes,
    make_model,
    no_memory,
    num_parameters,
    parameter_shapes,
    weight_bytes,
    with_adapters,
)
from hf_distill.teachers.ensemble import combined
from hf_distill.teachers.local import signal_of
from hf_distill.trainers.pictures import freeze_tower, kept_to_language

# Labels of what is alive, in the order of a report.
WEIGHTS, BATCH, SIGNAL, KEPT, LOSS, BACKWARD, OPTIMIZER, CACHE = (
    "weights", "the batch", "the teacher's outputs", "activations", "the loss", "the backward", "optimizer",
    "keys and values of the rollout",
)  # fmt: skip


@dataclass(frozen=True)
class SignalSpec:
    """A teacher's signal at the N positions, as the loss gets it.

    Args:
        kind (`str`): "dense" (hidden states and a head), "sampled" or "topk" (`entries` tokens).
        width, rows (`int`): of the head of a dense one.
        dtype: of hidden states and head.
        entries (`int`): of the others.
    """

    kind: str
    width: int = 0
    rows: int = 0
    dtype: torch.dtype = torch.bfloat16
    entries: int = 12

    def make(self, num_labels: int) -> Any:
        """The signal, on fake tensors; its head is labelled as weights, which are counted elsewhere."""
        if self.kind == "dense":
            hidden = torch.empty(num_labels, self.width, dtype=self.dtype)
            return TeacherSignal(hidden, Head(torch.empty(self.rows, self.width, dtype=self.dtype)))
        ids, values = torch.zeros(num_labels, self.entries, dtype=torch.long), torch.empty(num_labels, self.entries)
        if self.kind == "sampled":
            return SparseSignal(ids, values, torch.empty(num_labels), torch.zeros(num_labels, dtype=torch.long))
        return TopKSignal(ids, values, torch.empty(num_labels))


@dataclass(frozen=True)
class KVSpec:
    """The term of keys and values: layers, their pairs with the teacher's, and the projector."""

    mapping: LayerMapping
    teacher_width: int
    loss: str = "mercator"
    positions: str = "pre"
    projector: str = "pca"
    mlp_ratio: float = 1.0


@dataclass(frozen=True)
class HiddenSpec:
    """The term of hidden states."""

    mapping: LayerMapping
    teacher_width: int
    loss: str = "mse"


@dataclass(frozen=True)
class StudentRun:
    """All that the student's part of an update depends on.

    Args:
        model ([`ModelSpec`]): the student.
        batch ([`Batch`]): a micro-batch.
        objective ([`Objective`]): the loss, with the true vocabulary and the size of a chunk.
        signals: of the teachers; none for hard labels alone.
        combination (`str`): `teacher_combination` of several teachers.
        lora (`LoraConfig`, *optional*): adapters.
        checkpointing (`dict`, *optional*): `gradient_checkpointing_kwargs`; None without checkpointing.
        autocast: the dtype of mixed precision, or None.
        accumulates (`bool`): whether gradients of earlier micro-batches are alive.
        optimizer: class and keyword arguments, as the trainer would make it.
        kv, hidden: terms beside the divergence.
        device (`str`): "cuda" or "cpu", whose ways to compute are taken.
    """

    model: ModelSpec
    batch: Batch
    objective: Objective
    signals: tuple[SignalSpec, ...] = ()
    combination: str = "mixture"
    lora: LoraConfig | None = None
    checkpointing: Mapping[str, Any] | None = None
    autocast: torch.dtype | None = None
    accumulates: bool = False
    optimizer: tuple[Any, Mapping[str, Any]] = (torch.optim.AdamW, {})
    kv: KVSpec | None = None
    hidden: HiddenSpec | None = None
    device: str = "cuda"
    freezes_tower: bool = True  # of a student that sees


@dataclass(frozen=True)
class StudentStep:
    """Bytes and counts of a student's part of an update."""

    weights: int  # bytes, those of adapters and projectors among them
    parameters: int
    trainable: int  # numbers that get a gradient
    gradients: int  # bytes
    optimizer: int  # bytes of its states
    kept: int  # bytes of activations between forward and backward
    peak: Peak  # of forward and backward, beside weights and optimizer
    peak_but_gradients: Peak
    optimizer_peak: int  # of its step, beside weights, gradients and states
    shapes: tuple[ParameterShape, ...]
    buffers: int  # bytes
    layer: int  # bytes of the largest layer
    root: int  # bytes of all parameters that belong to no layer
    head_numbers: int  # parameters of the head
    flops: Mapping[str, int] = field(default_factory=dict)


def make_student(run: StudentRun) -> nn.Module:
    """The student with its adapters and projectors, in train mode, as a trainer has it."""
    model: Any = make_model(run.model)
    if run.freezes_tower:
        freeze_tower(model)
    if run.lora is not None:
        model = with_adapters(model, kept_to_language(run.lora, model) if run.freezes_tower else run.lora)
        if run.model.bits is not None:  # as TRL does it
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    if run.checkpointing is not None:
        causal_lm(model).gradient_checkpointing_enable({**run.checkpointing, "preserve_rng_state": False})
        if run.lora is not None:
            model.enable_input_require_grads()
    spare_frozen_tower(causal_lm(model))
    expose_hidden_states(causal_lm(model))
    return model


def student_step(run: StudentRun) -> StudentStep:
    """Runs a micro-batch of a student on fake tensors, and the step of its optimizer.

    Raises:
        `ValueError`: a model whose forward depends on values.
    """
    with no_memory(), run.batch.numbers():
        model = make_student(run)
        ledger = LiveBytes(CUDA_GRAIN if run.device == "cuda" else 1)
        inputs = run.batch.inputs(causal_lm(model))
        terms = _Terms(run, causal_lm(model))
        if terms.projectors:
            model.projectors = terms.projectors
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.add([p.grad], GRADIENTS))
        with ledger:
            ledger.add([*model.parameters(), *model.buffers()], WEIGHTS)
            if run.accumulates:
                with ledger.labelled(GRADIENTS):
                    for parameter in trained:
                        parameter.grad = torch.empty_like(parameter)
            ledger.add(inputs.values(), BATCH)
            kept = _micro_batch(run, model, inputs, terms, ledger)
            peaks = ledger.peak, ledger.peak_but_gradients
            gradients = ledger.live[GRADIENTS]
            del terms  # with what the teacher says of inner layers
            ledger.begin()
            with ledger.labelled(OPTIMIZER):
                optimizer = step_optimizer(run.optimizer, trained)
            states = state_bytes(optimizer)
            rest = ledger.peak.total - ledger.live[WEIGHTS] - gradients - states
        whole = causal_lm(model)
        layers = layer_bytes(whole)
        return StudentStep(
            weights=weight_bytes(model), parameters=num_parameters(model),
            trainable=num_parameters(model, trainable=True), gradients=gradients, optimizer=states, kept=kept,
            peak=_beside(peaks[0], WEIGHTS), peak_but_gradients=_beside(peaks[1], WEIGHTS),
            optimizer_peak=max(0, rest), shapes=parameter_shapes(model),
            buffers=sum(buffer.nbytes for buffer in model.buffers()), layer=layers[0], root=layers[1],
            head_numbers=head_of(whole).weight.numel(), flops=dict(ledger.flops),
        )  # fmt: skip


def kept_activations(run: StudentRun) -> int:
    """The bytes that a student keeps between forward and backward; the loss is left out."""
    with no_memory(), run.batch.numbers():
        model = make_student(run)
        ledger = LiveBytes(CUDA_GRAIN if run.device == "cuda" else 1)
        inputs = run.batch.inputs(causal_lm(model))
        with ledger:
            ledger.add([*model.parameters(), *model.buffers()], WEIGHTS)
            ledger.add(inputs.values(), BATCH)
            with ledger.labelled(KEPT), as_on(run.device), _mixed(run):
                outputs = model(**inputs, with_hidden=lambda outputs, head: outputs.last_hidden_state)
                kept = ledger.live[KEPT]
            del outputs
        return kept


def _micro_batch(
    run: StudentRun, model: nn.Module, inputs: Mapping[str, Tensor], terms: "_Terms", ledger: LiveBytes
) -> int:
    """Forward, loss and backward; returns the bytes that are kept between forward and backward."""
    with ledger.labelled(BATCH):
        positions, labels = (torch.zeros(run.batch.labels, dtype=torch.long) for _ in range(2))
    with ledger.labelled(SIGNAL):
        signals = [spec.make(run.batch.labels) for spec in run.signals]
        ledger.add((s.head.weight for s in signals if isinstance(s, TeacherSignal)), WEIGHTS)
        terms.receive(run.batch.labels)
    ledger.begin()

    def with_hidden(outputs: Any, head: Head) -> Tensor:
        with ledger.labelled(LOSS):
            hidden = select_positions(outputs.last_hidden_state, positions)
            found = _loss_of(run, signals, hidden, head, labels)
            return terms.add_to(found, outputs, positions)

    with ledger.labelled(KEPT), terms.capturing(positions), as_on(run.device):
        with _mixed(run):
            loss = model(**inputs, **terms.forward, with_hidden=with_hidden)
        kept = ledger.live[KEPT]
        with ledger.labelled(BACKWARD):
            loss.backward()
    return kept


def _mixed(run: StudentRun) -> AbstractContextManager:
    """The context of mixed precision around a student's forward."""
    return nullcontext() if run.autocast is None else torch.autocast("cpu", dtype=run.autocast)


def _loss_of(run: StudentRun, signals: list[Any], hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    if not signals:
        return hard_label_loss(hidden, head, labels, run.objective).loss
    signal = signals[0]
    if len(signals) > 1:
        signal = combined([(1 / len(signals), each) for each in signals], run.combination)
    return signal.loss(hidden, head, labels, run.objective).loss


class _Terms:
    """The terms beside the divergence, with the code of the trainers' and a teacher of which only the outputs exist."""

    def __init__(self, run: StudentRun, student: nn.Module) -> None:
        self.run, self._student = run, student
        self.projectors = nn.ModuleDict()
        self.forward = {} if run.hidden is None else {"output_hidden_states": True}
        self._capture: KVCapture | None = None
        if (hidden := run.hidden) is not None:
            width = student.config.get_text_config().hidden_size  # pyright: ignore
            if width != hidden.teacher_width:
                self.projectors["hidden"] = HiddenProjector(width, hidden.teacher_width, len(hidden.mapping))
        if (kv := run.kv) is not None:
            width = kv_widths(student, [min(kv.mapping)], "student", kv.positions)[min(kv.mapping)]  # pyright: ignore
            if kv.projector == "mlp":
                self.projectors["kv"] = KVProjector(kv.teacher_width, width, len(kv.mapping), mlp_ratio=kv.mlp_ratio)
            else:
                self.projectors["kv"] = PCAProjector(kv.teacher_width, width, len(kv.mapping))
            self._capture = KVCapture(student, kv.mapping, kv.positions)

    def receive(self, num_labels: int) -> None:
        """Makes what the teacher says of inner layers."""
        dtype = self.run.signals[0].dtype if self.run.signals else torch.float32
        hidden, kv = self.run.hidden, self.run.kv
        self._hidden = {} if hidden is None else {
            i: torch.empty(num_labels, hidden.teacher_width, dtype=dtype) for i in teacher_layers(hidden.mapping)
        }  # fmt: skip
        tokens = self.run.batch.tokens  # what is captured is whole; positions are taken when they are compared
        self._kv = {} if kv is None else {
            i: [torch.empty(tokens, kv.teacher_width, dtype=dtype) for _ in range(2)]
            for i in teacher_layers(kv.mapping)
        }  # fmt: skip

    @contextmanager
    def capturing(self, positions: Tensor) -> Iterator[None]:
        with nullcontext() if self._capture is None else self._capture(positions):
            yield
        if self._capture is not None:
            self._capture.heads = {}

    def add_to(self, loss: Tensor, outputs: Any, positions: Tensor) -> Tensor:
        if (hidden := self.run.hidden) is not None:
            losses = []
            for index, (layer, sources) in enumerate(hidden.mapping.items()):
                student = select_positions(outputs.hidden_states[layer + 1], positions)
                if "hidden" in self.projectors:
                    student = self.projectors["hidden"](student, index)
                target: Any = sum(weight * self._hidden[i] for i, weight in sources.items())
                losses.append(HIDDEN_LOSSES[hidden.loss](student, target, num_items=1)[0])
            loss = loss + torch.stack(losses).mean()
        if (kv := self.run.kv) is not None and self._capture is not None:
            losses, projector = [], self.projectors["kv"]
            dtype = next(projector.parameters(), torch.empty(0)).dtype
            for index, (layer, sources) in enumerate(kv.mapping.items()):
                student = self._capture.features(layer)
                teacher: Any = [
                    sum(w * self._kv[i][kind].index_select(0, positions).to(dtype) for i, w in sources.items())
                    for kind in range(2)
                ]
                pairs = zip(student, projector(*teacher, index), strict=True)
                losses += [FEATURE_LOSSES[kv.loss](s, t, num_items=1)[0] for s, t in pairs]
            loss = loss + torch.stack(losses).mean()
        return loss


def step_optimizer(recipe: tuple[Any, Mapping[str, Any]], trained: Sequence[Tensor]) -> torch.optim.Optimizer:
    """An optimizer after its first step, with its states.

    Those of bitsandbytes only make their states: their kernels know no fake tensors.
    """
    cls, kwargs = recipe
    if not cls.__module__.startswith("bitsandbytes"):
        optimizer = cls(trained, **kwargs)
        optimizer.step()
        return optimizer
    with patch.object(cls, "fill_qmap", lambda _: None):  # the values that 8 bits stand for; fake tensors have none
        optimizer = cls(trained, **kwargs)
    optimizer.name2qmap = {name: torch.empty(256, device=trained[0].device) for name in ("dynamic", "udynamic")}
    optimizer.is_paged = False  # pages take memory of the host, until they are used
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, index)
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of an optimizer's states, those that parameters share once."""
    leaves = tree_leaves([dict(state) for state in optimizer.state.values()])
    storages = {leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)}
    return sum(storage.nbytes() for storage in storages.values())


def _beside(peak: Peak, label: str) -> Peak:
    return Peak({name: size for name, size in peak.parts.items() if name != label})


# -------------------------------------------------------------------------------------------------------- the teacher


@dataclass(frozen=True)
class TeacherForward:
    """Bytes and counts of a teacher's forward."""

    weights: int
    parameters: int
    head: int  # bytes of the head's weight
    moved: int  # bytes of the largest part that visits the device, of a teacher that is not whole on it
    peak: int  # of the forward, beside the weights; what it returns is in it
    width: int
    rows: int  # of the head
    dtype: torch.dtype
    flops: int


def teacher_forward(
    spec: ModelSpec, batch: Batch, *, layers: tuple[int, ...] = (), kv: KVSpec | None = None, device: str = "cuda"
) -> TeacherForward:
    """Runs a teacher on a batch of fake tensors; inner layers are kept where the loss needs them."""
    with no_memory(), batch.numbers():
        model = make_model(spec).eval().requires_grad_(False)
        head = head_of(model)
        ledger = LiveBytes(CUDA_GRAIN if device == "cuda" else 1)
        inputs = batch.inputs(model)
        with ledger, ExitStack() as stack:
            ledger.add([*model.parameters(), *model.buffers()], WEIGHTS)
            ledger.add(inputs.values(), BATCH)
            positions = torch.zeros(batch.labels, dtype=torch.long)
            if kv is not None:
                stack.enter_context(KVCapture(model, teacher_layers(kv.mapping), kv.positions)(positions))
            ledger.begin()
            with torch.no_grad(), ledger.labelled(KEPT), as_on(device):
                dtype = embedding_weight(model).dtype  # of pixels, as `LocalTeacher` reads them
                inputs = {name: each.to(dtype) if each.is_floating_point() else each for name, each in inputs.items()}
                signal = signal_of(model, head, inputs, positions, layers)
        peak = _beside(ledger.peak, WEIGHTS).total
        return TeacherForward(
            weights=weight_bytes(model), parameters=num_parameters(model), head=head.weight.nbytes, peak=peak,
            moved=max(p.nbytes for p in model.parameters()), width=head.weight.shape[1], rows=len(head.weight),
            dtype=signal.hidden.dtype, flops=sum(ledger.flops.values()),
        )  # fmt: skip
