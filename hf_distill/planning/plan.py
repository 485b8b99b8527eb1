"""The plan of a run: bytes by component and by phase, FLOPs, bytes between processes, bytes of stores, and the fit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import convert_bytes
from rich.text import Text

from hf_distill.layer_mapping import Mapping as LayerMapping
from hf_distill.layer_mapping import layer_mapping, teacher_layers
from hf_distill.modeling import kv_widths, num_layers, trying
from hf_distill.planning.engines import Share, share_of
from hf_distill.planning.ledger import GRADIENTS
from hf_distill.planning.models import ModelSpec, make_model, no_memory
from hf_distill.planning.rollouts import Writing, WritingRun, rollout_memory
from hf_distill.planning.settings import Settings, TeacherSetting
from hf_distill.planning.steps import (
    LOSS,
    HiddenSpec,
    KVSpec,
    SignalSpec,
    StudentRun,
    StudentStep,
    TeacherForward,
    kept_activations,
    student_step,
    teacher_forward,
)
from hf_distill.planning.stores import store_bytes
from hf_distill.report import Part, Shown
from hf_distill.traffic import bytes_between_processes, bytes_for_rollouts, bytes_from_teacher

# The phases of an update, as a plan names them.
WRITING, TEACHER, STEP, OPTIMIZER_STEP = "rollout", "teacher's forward", "forward and backward", "optimizer's step"


@dataclass(frozen=True)
class Remedy:
    """A change of the settings, with what it costs and what comes of it.

    Args:
        name (`str`): the change, for people, as the next two.
        options (`str`): the options that make it.
        cost (`str`): its price.
        peak (`int`): bytes of a device after it alone.
        fits (`bool`): whether they fit.
    """

    name: str
    options: str
    cost: str
    peak: int
    fits: bool


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The costs of a run, which show themselves as tables.

    Bytes are those of one device, the first of all processes, which has the most.

    Args:
        always: bytes that are alive all the time, by component.
        phases: the highest sum of bytes in each phase of an update, `always` among them.
        parts: the bytes at the highest moment, by component; they sum to `peak`.
        peak (`int`): bytes at the highest moment of all phases.
        memory (`int`, *optional*): bytes of the device; None if it was not asked whether the run fits.
        reserve (`int`): bytes of the device that are left to CUDA, its libraries and fragmentation.
        fits (`bool`, *optional*): whether `peak` and `reserve` fit; None without `memory`.
        elsewhere: bytes on other devices and in the host's memory, by component.
        activations: bytes between forward and backward, with gradient checkpointing and without.
        caches: bytes of keys and values of student and teacher at the end of a rollout; empty without one.
        counts: parameters, and tokens of an update on all processes.
        flops: of an update on all processes: matrix products and attention, by part.
        traffic: bytes that each process sends in an update, by purpose, and bytes from a teacher on another device.
        stores: bytes of a label-bearing token in each kind of store of this teacher; `head` is stored once.
        remedies: changes that make the run smaller, those that cost least first; empty for a run that fits.
        together: the changes that make it fit together, where none does alone; empty if nothing does.
        notes: what the plan assumes, and where it may be wrong.
    """

    always: Mapping[str, int]
    phases: Mapping[str, int]
    parts: Mapping[str, int]
    peak: int
    memory: int | None
    reserve: int
    fits: bool | None
    elsewhere: Mapping[str, int]
    activations: Mapping[str, int]
    caches: Mapping[str, int]
    counts: Mapping[str, int]
    flops: Mapping[str, int]
    traffic: Mapping[str, int]
    stores: Mapping[str, float]
    remedies: tuple[Remedy, ...] = ()
    together: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """As nested dicts of plain numbers and texts."""
        return asdict(self)

    def shown(self) -> list[Part]:
        """The tables of sizes, counts, stores and changes, the notes, and the verdict."""
        highest = max(self.phases, key=lambda name: self.phases[name])
        phases = {**self.phases, **{f"elsewhere, {name}": size for name, size in self.elsewhere.items()}}
        shown: list[Part] = [
            (_sizes({**self.parts, "together": self.peak}), f"one device at its fullest: {highest}"),
            (_sizes(phases), "the fullest moment of each phase"),
            (_numbers(self), "an update on all devices"),
        ]
        if self.stores:
            stores = {name: size for name, size in self.stores.items() if name != "head"}
            rows = [
                {"store of this teacher": name, "bytes a label-bearing token": f"{n:,.1f}"}
                for name, n in stores.items()
            ]
            shown.append((rows, "stores (docs/cache.md)"))
        if self.remedies:
            rows = [
                {"change": r.name, "with": convert_bytes(r.peak), "fits": "yes" if r.fits else "no",
                 "costs": Text(r.cost)}
                for r in self.remedies
            ]  # fmt: skip
            shown.append((rows, "changes, each alone, those that cost least first"))
            # Whole lines, to copy.
            shown += [Text(f"{r.name}: {r.options}", no_wrap=True, overflow="ignore") for r in self.remedies]
        return [*shown, *(Text(f"note: {note}", "yellow") for note in self.notes), _verdict(self)]


class Planner:
    """Plans settings; what changes of them have in common is run once."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def plan(self, settings: Settings, *, brief: bool = False) -> Plan:
        """The plan of a run, without remedies; a brief one has the activations of these settings alone.

        Raises:
            `ValueError`: a configuration that no model can be made of, or a model that cannot be run without values.
        """
        step = self.student(settings)
        teachers = [self.teacher(settings, teacher) for teacher in settings.teachers]
        share = self.share(settings, step)
        always, elsewhere = self._always(settings, share, teachers)
        phases = self._phases(settings, step, share, teachers)
        base = sum(always.values())
        highest = max(phases, key=lambda name: sum(phases[name].values()))
        parts = {**always, **phases[highest]}
        machine, peak = settings.machine, sum(parts.values())
        fits = None if machine.memory is None else peak + machine.reserve <= machine.memory
        checkpointed = settings.checkpointing is not None
        activations = {f"{'with' if checkpointed else 'without'} checkpointing": step.kept}
        if checkpointed and not brief:
            run = replace(self._student_run(settings), checkpointing=None)
            activations["without checkpointing"] = self._once(kept_activations, run)
        return Plan(
            always=always, phases={name: base + sum(parts.values()) for name, parts in phases.items()},
            parts={name: size for name, size in parts.items() if size}, peak=peak, memory=machine.memory,
            reserve=machine.reserve, fits=fits, elsewhere=elsewhere, activations=activations,
            caches=self._caches(settings), counts=_counts(settings, step, teachers),
            flops=_flops(settings, step, teachers), traffic=_traffic(settings, step, teachers),
            stores=_stores(settings, teachers), notes=settings.notes,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ what is run

    def _once(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        key = repr((function.__name__, args, kwargs))
        if key not in self._found:
            with trying("the run cannot be planned on tensors without values"):
                self._found[key] = function(*args, **kwargs)
        return self._found[key]

    def student(self, settings: Settings) -> StudentStep:
        return self._once(student_step, self._student_run(settings))

    def _student_run(self, settings: Settings) -> StudentRun:
        forwards = [self.teacher(settings, teacher) for teacher in settings.teachers]
        pairs = zip(settings.teachers, forwards, strict=True)
        model = settings.student
        if settings.splits and settings.mixed is not None and model.bits is None:
            model = replace(model, dtype=str(settings.mixed).removeprefix("torch."))
        return StudentRun(
            model=model, batch=settings.batch, objective=settings.objective,
            signals=tuple(_signal(teacher, forward, settings) for teacher, forward in pairs),
            combination=settings.combination, lora=settings.lora, checkpointing=settings.checkpointing,
            autocast=settings.compute, accumulates=settings.accumulation > 1,
            optimizer=settings.optimizer, kv=self.kv(settings), hidden=self.hidden(settings),
            device=settings.machine.kind, freezes_tower=settings.freezes_tower,
        )  # fmt: skip

    def teacher(self, settings: Settings, teacher: TeacherSetting) -> TeacherForward | None:
        """A teacher's forward; None for a store or a server."""
        model = settings.student if teacher.layout == "base" else teacher.model
        if model is None:
            return None
        hidden, kv = self.hidden(settings), self.kv(settings)
        layers = () if hidden is None else tuple(teacher_layers(hidden.mapping))
        batch = settings.batch
        if teacher.layout != "base" and batch.pictures:
            batch = batch.with_pictures(settings.teacher_pictures)
        return self._once(teacher_forward, model, batch, layers=layers, kv=kv, device=settings.machine.kind)

    def rollout(self, settings: Settings) -> Writing:
        (teacher,) = settings.teachers
        assert teacher.model is not None
        assert settings.rollout is not None
        student = replace(self._student_run(settings), checkpointing=None)
        run = WritingRun(student, teacher.model, settings.rollout, settings.rollout_rows, settings.prompts)
        return self._once(rollout_memory, run)

    def share(self, settings: Settings, step: StudentStep) -> Share:
        machine = settings.machine
        if not settings.splits:
            buckets = {"DDP's buckets": step.gradients} if machine.num > 1 else {}
            return Share(step.weights, step.gradients, step.optimizer, buckets)
        return self._once(
            share_of, machine.engine, machine.num, step.shapes, settings.optimizer, mixed=settings.mixed is not None,
            layer=step.layer, root=step.root, buffers=step.buffers,
        )  # fmt: skip

    def kv(self, settings: Settings) -> KVSpec | None:
        if settings.kv is None:
            return None
        given = settings.kv
        mapping = _mapping(settings, given["kv_layers"])
        model = _only_teacher(settings)
        width = self._once(key_width, model, min(teacher_layers(mapping)), given["kv_positions"])
        return KVSpec(
            mapping, width, given["kv_loss"], given["kv_positions"], given["projector"], given["projector_mlp_ratio"]
        )

    def hidden(self, settings: Settings) -> HiddenSpec | None:
        if settings.hidden is None:
            return None
        width = _only_teacher(settings).config().get_text_config().hidden_size
        return HiddenSpec(_mapping(settings, settings.hidden["hidden_layers"]), width, settings.hidden["hidden_loss"])

    # --------------------------------------------------------------------------------------------------- the sums

    def _always(
        self, settings: Settings, share: Share, teachers: list[TeacherForward | None]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """The bytes that are always alive, on this device and elsewhere."""
        here = {"student's weights": share.weights, "optimizer's states": share.optimizer, **share.buffers}
        elsewhere: dict[str, int] = {}
        for teacher, forward in zip(settings.teachers, teachers, strict=True):
            if forward is None or teacher.layout == "base":
                if teacher.manifest is not None and teacher.manifest.head is not None:
                    _add(here, "heads of teachers", teacher.manifest.head["bytes"])
                continue
            if teacher.layout == "device":
                _add(here, "teacher's weights", forward.weights)
                continue
            _add(here, "heads of teachers", forward.head)
            if teacher.layout == "sharded":
                _add(here, "teacher's weights", -(-forward.weights // settings.machine.num))
            else:
                place = "host: the teacher's weights" if teacher.layout == "offload" else "teacher's devices"
                _add(elsewhere, place, forward.weights + (forward.peak if teacher.layout == "elsewhere" else 0))
        return here, elsewhere

    def _phases(
        self, settings: Settings, step: StudentStep, share: Share, teachers: list[TeacherForward | None]
    ) -> dict[str, dict[str, int]]:
        """The bytes of each phase by component, beside those that are always alive."""
        phases: dict[str, dict[str, int]] = {}
        accumulates = settings.accumulation > 1
        # FSDP2 reduces gradients in the last micro-batch alone; until then each process has them whole.
        gradients = step.gradients if accumulates and settings.machine.engine == "fsdp2" else share.gradients
        earlier = {GRADIENTS: gradients} if accumulates else {}
        waiting = {}
        if settings.rollout is not None:
            found = self.rollout(settings)
            rows, width, itemsize = _outputs(settings, teachers)
            update = settings.batch.rows * settings.accumulation * settings.rollout.max_new_tokens
            phases[WRITING] = {
                **found.peak.parts, "the teacher's outputs": (update + rows) * width * itemsize,
            }  # fmt: skip
            if settings.splits and settings.machine.engine != "zero2":
                phases[WRITING]["the student, whole"] = step.weights
            left = update - settings.batch.labels
            waiting = {"outputs of other micro-batches": left * width * itemsize}
        else:
            phases[TEACHER] = {**earlier, "the teacher's activations": 0}
            for teacher, forward in zip(settings.teachers, teachers, strict=True):
                if forward is None or teacher.layout == "elsewhere":
                    continue
                taken = forward.peak + (forward.moved if teacher.layout in ("offload", "sharded") else 0)
                phases[TEACHER]["the teacher's activations"] = max(taken, phases[TEACHER]["the teacher's activations"])
        if settings.splits:
            parts = {name: size for name, size in step.peak_but_gradients.parts.items() if name != GRADIENTS}
            phases[STEP] = {**parts, GRADIENTS: gradients, "gathered weights and gradients": share.gathered}
        else:
            phases[STEP] = dict(step.peak.parts)
        phases[STEP] |= waiting
        phases[OPTIMIZER_STEP] = {GRADIENTS: share.gradients, "the optimizer's arithmetic": step.optimizer_peak}
        return phases

    def _caches(self, settings: Settings) -> dict[str, int]:
        if settings.rollout is None:
            return {}
        return dict(zip(("student", "teacher"), self.rollout(settings).caches, strict=True))


def key_width(model: ModelSpec, layer: int, positions: str) -> int:
    """The width of the keys of a layer."""
    with no_memory():
        return kv_widths(make_model(model), [layer], "teacher", positions)[layer]


def _only_teacher(settings: Settings) -> ModelSpec:
    models = [settings.student if t.layout == "base" else t.model for t in settings.teachers]
    found = next((model for model in models if model is not None), None)
    if found is None:
        raise ValueError("inner layers, and keys and values, need a teacher that is a model")
    return found


def _mapping(settings: Settings, layers: Any) -> LayerMapping:
    models = settings.student, _only_teacher(settings)
    depths = [num_layers(model.config().get_text_config()) for model in models]
    return layer_mapping("uniform" if layers == "cka" else layers, *depths)


def _signal(teacher: TeacherSetting, forward: TeacherForward | None, settings: Settings) -> SignalSpec:
    """A teacher's signal at label-bearing positions."""
    if forward is not None:
        return SignalSpec("dense", forward.width, forward.rows, forward.dtype)
    if (manifest := teacher.manifest) is None:
        return SignalSpec(
            "topk", entries=teacher.entries if teacher.entries > 0 else int(settings.objective.vocab_size or 0)
        )
    if manifest.method == "hidden":
        head: Any = manifest.head
        return SignalSpec("dense", head["width"], head["rows"], getattr(torch, head["dtype"]))
    entries = int(manifest.parameters["entries"])
    # Of a sample the number of entries differs from position to position, and the largest counts.
    return SignalSpec(manifest.method, entries=entries if manifest.method == "topk" else 2 * entries)


def _outputs(settings: Settings, teachers: list[TeacherForward | None]) -> tuple[int, int, int]:
    """Positions of a group that is written at a time, width and bytes of a number of what the teacher says of them."""
    (forward,) = teachers
    assert forward is not None
    assert settings.rollout is not None
    return settings.rollout_rows * settings.rollout.max_new_tokens, forward.width, forward.dtype.itemsize


def _counts(settings: Settings, step: StudentStep, teachers: list[TeacherForward | None]) -> dict[str, int]:
    micro_batches = settings.accumulation * settings.machine.num
    taught = {"teacher's parameters": sum(each.parameters for each in teachers if each is not None)} if teachers else {}
    return {
        "student's parameters": step.parameters, "trained parameters": step.trainable, **taught,
        "rows of an update": settings.batch.rows * micro_batches,
        "tokens of an update": settings.batch.tokens * micro_batches,
        "label-bearing tokens of an update": settings.batch.labels * micro_batches,
        "positions of a chunk of the loss": int(settings.objective.chunk_size or 0),
    }  # fmt: skip


def _flops(settings: Settings, step: StudentStep, teachers: list[TeacherForward | None]) -> dict[str, int]:
    """FLOPs of an update on all processes; those of a rollout are left out."""
    times = settings.accumulation * settings.machine.num
    loss = step.flops.get(LOSS, 0)
    return {
        "student": times * (sum(step.flops.values()) - loss), "loss": times * loss,
        "teacher": times * sum(each.flops for each in teachers if each is not None),
    }  # fmt: skip


def _traffic(settings: Settings, step: StudentStep, teachers: list[TeacherForward | None]) -> dict[str, int]:
    machine, found = settings.machine, {}
    if machine.num > 1:
        itemsize = step.shapes[0].itemsize
        found = bytes_between_processes(
            machine.engine, machine.num, parameters=step.parameters, trainable=step.trainable,
            micro_batches=settings.accumulation, once=step.head_numbers if machine.engine == "fsdp2" else 0,
            parameter_bytes=itemsize, gradient_bytes=itemsize,
        )  # fmt: skip
        if settings.rollout is not None and machine.engine in ("fsdp2", "zero3"):
            found["rollouts"] = bytes_for_rollouts(machine.num, step.parameters, parameter_bytes=itemsize)
    for teacher, forward in zip(settings.teachers, teachers, strict=True):
        if teacher.layout == "elsewhere" and forward is not None:
            inner = 0 if settings.hidden is None else num_layers(settings.student.config().get_text_config())
            labels = settings.batch.labels * settings.accumulation
            size = bytes_from_teacher(
                labels, forward.width, inner_layers=inner, bytes_per_number=forward.dtype.itemsize
            )
            _add(found, "from the teacher", size)
    return found


def _stores(settings: Settings, teachers: list[TeacherForward | None]) -> dict[str, float]:
    forward = next((each for each in teachers if each is not None), None)
    if forward is None:
        return {}
    return {**store_bytes(forward.width, int(settings.objective.vocab_size or forward.rows)), "head": forward.head}


def _add(found: dict[str, int], name: str, size: int) -> None:
    found[name] = found.get(name, 0) + size


def _verdict(plan: Plan) -> str:
    peak, reserve = convert_bytes(plan.peak), convert_bytes(plan.reserve)
    if plan.memory is None:
        return f"A device needs {peak}, and {reserve} for CUDA itself (a memory, --gpu 24GB, asks whether it fits)."
    sums = f"{peak} and {reserve} in reserve, of {convert_bytes(plan.memory)}"
    if plan.fits:
        return f"It fits: {sums}."
    best = next((remedy for remedy in plan.remedies if remedy.fits), None)
    if best is not None:
        return f"It does not fit: {sums}. The smallest change that makes it fit: {best.name} ({best.options})."
    if plan.together:
        return f"It does not fit: {sums}. No change alone makes it fit; together these do: {'; '.join(plan.together)}."
    return f"It does not fit: {sums}, and none of these changes makes it fit."


def _sizes(sizes: Mapping[str, int]) -> list[dict[str, str]]:
    return [{"": name, "size": convert_bytes(size)} for name, size in sizes.items() if size]


def _numbers(plan: Plan) -> list[dict[str, str]]:
    rows = {name: f"{count:,}" for name, count in plan.counts.items()}
    rows |= {f"FLOPs, {name}": f"{flops:.2e}" for name, flops in plan.flops.items() if flops}
    rows |= {f"sent by each process, {name}": convert_bytes(size) for name, size in plan.traffic.items() if size}
    rows |= {f"activations, {name}": convert_bytes(size) for name, size in plan.activations.items()}
    rows |= {f"cache of the {name}": convert_bytes(size) for name, size in plan.caches.items()}
    return [{"": name, "number": text} for name, text in rows.items()]
