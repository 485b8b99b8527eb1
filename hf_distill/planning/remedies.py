"""Changes that make a run smaller, from those that leave the update as it is to those that change the training."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from peft import LoraConfig

from hf_distill.planning.models import dtype_of
from hf_distill.planning.plan import Plan, Planner, Remedy
from hf_distill.planning.settings import Settings, TeacherSetting
from hf_distill.store.manifest import Manifest

SMALLEST_CHUNK = 64  # positions; where products of matrices are still large enough to be fast
LORA_RANK = 16


class Change(NamedTuple):
    """A remedy that has not been planned yet; `apply` returns None where there is nothing to change."""

    name: str
    cost: str
    apply: Callable[[Settings], tuple[Settings, str] | None]


def with_remedies(planner: Planner, settings: Settings) -> Plan:
    """The plan of a run and, if it does not fit, what each change alone makes of it, and which ones do together."""
    plan = planner.plan(settings)
    if plan.fits is not False:
        return plan
    found, together = [], []
    for change in CHANGES:
        best = _smallest(planner, change, settings)
        if best is not None and best.peak < plan.peak:
            found.append(best)
    if not any(remedy.fits for remedy in found):
        together = _together(planner, settings)
    return replace(plan, remedies=tuple(found), together=tuple(together))


def _steps(change: Change, settings: Settings) -> list[tuple[Settings, str]]:
    """The change, made again as long as it changes something: from the smallest step to the largest."""
    steps = []
    while (made := change.apply(settings)) is not None:
        settings = made[0]
        steps.append(made)
    return steps


def _smallest(planner: Planner, change: Change, settings: Settings) -> Remedy | None:
    """The smallest step of a change that fits, or the largest one if none does; None if there is nothing to change."""
    steps = _steps(change, settings)
    if not steps:
        return None
    plans = [planner.plan(steps[-1][0], brief=True)]
    if plans[0].fits:  # else no smaller step does
        plans = (planner.plan(changed, brief=True) for changed, _ in steps)
    else:
        steps = steps[-1:]
    plan, options = next((p, o) for p, (_, o) in zip(plans, steps, strict=False) if p.fits or len(steps) == 1)
    return Remedy(change.name, options, change.cost, plan.peak, bool(plan.fits))


def _together(planner: Planner, settings: Settings) -> list[str]:
    """The options of changes that fit together: taken in their order, and given back where the rest does without."""
    before = planner.plan(settings, brief=True).peak
    chosen: list[Change] = []
    for change in CHANGES:
        candidate = _all_of([*chosen, change], settings)
        plan = planner.plan(candidate[0], brief=True)
        if plan.peak < before:
            chosen, before = [*chosen, change], plan.peak
        if plan.fits:
            break
    else:
        return []
    for change in list(chosen):
        rest = [other for other in chosen if other is not change]
        if planner.plan(_all_of(rest, settings)[0], brief=True).fits:
            chosen = rest
    return _all_of(chosen, settings)[1]


def _all_of(changes: list[Change], settings: Settings) -> tuple[Settings, list[str]]:
    """The settings with all of these changes, each as far as it goes, and their options."""
    options = []
    for change in changes:
        if steps := _steps(change, settings):
            settings = steps[-1][0]
            options.append(steps[-1][1])
    return settings, options


# -------------------------------------------------------------------------------------------------------- the changes


def _smaller_chunk(settings: Settings) -> tuple[Settings, str] | None:
    chunk = min(int(settings.objective.chunk_size or 0), settings.batch.labels) // 2
    chunk = max(SMALLEST_CHUNK, chunk - chunk % SMALLEST_CHUNK)
    if chunk >= min(int(settings.objective.chunk_size or 0), settings.batch.labels):
        return None
    return replace(settings, objective=replace(settings.objective, chunk_size=chunk)), f"--loss_chunk_size {chunk}"


def _checkpointed(settings: Settings) -> tuple[Settings, str] | None:
    if settings.checkpointing is not None:
        return None
    return replace(settings, checkpointing={"use_reentrant": False}), "--gradient_checkpointing"


def _smaller_batch(settings: Settings) -> tuple[Settings, str] | None:
    if settings.batch.rows == 1:
        return None
    total = settings.batch.rows * settings.accumulation  # which stays, or it would be another update
    rows = next(rows for rows in range(settings.batch.rows // 2, 0, -1) if total % rows == 0)
    changed = settings.with_rows(rows)
    return changed, f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {changed.accumulation}"


def _fewer_written(settings: Settings) -> tuple[Settings, str] | None:
    if settings.rollout is None or settings.rollout_rows == 1:
        return None
    rows = settings.rollout_rows // 2
    return replace(settings, rollout_batch_size=rows), f"--rollout_batch_size {rows}"


def _stored_teacher(settings: Settings) -> tuple[Settings, str] | None:
    if settings.rollout is not None or settings.kv is not None or settings.hidden is not None:
        return None
    if len(settings.teachers) != 1 or settings.teachers[0].layout in ("store", "remote", "base"):
        return None
    spec = settings.teachers[0].model
    assert spec is not None
    if settings.objective.divergence == "forward_kl":
        store, head = "sampled", None
    else:  # a sample is unbiased for the forward KL alone
        config, dtype = spec.config().get_text_config(), dtype_of(spec, spec.config())
        store, width, rows = "hidden", config.hidden_size, config.vocab_size
        name = str(dtype).removeprefix("torch.")
        head = {"width": width, "rows": rows, "dtype": name, "bytes": width * rows * dtype.itemsize}
    manifest = Manifest(store, {"entries": 12}, {}, {}, 0, 1.0, 0, head=head)
    teacher = TeacherSetting("cache:store", None, "store", manifest)
    return replace(settings, teachers=(teacher,)), f"--teacher_model cache:store, after cache write --store {store}"


def _split(settings: Settings) -> tuple[Settings, str] | None:
    if settings.machine.num == 1 or settings.machine.engine == "fsdp2":
        return None
    machine = replace(settings.machine, engine="fsdp2")
    return replace(settings, machine=machine), "accelerate launch --config_file accelerate_configs/fsdp2.yaml"


def _small_teacher(settings: Settings) -> tuple[Settings, str] | None:
    changed = tuple(
        replace(teacher, model=replace(teacher.model, bits=4, double_quant=True))
        if teacher.layout in ("device", "elsewhere") and teacher.model is not None and teacher.model.bits is None
        else teacher
        for teacher in settings.teachers
    )
    return (
        None if changed == settings.teachers else (replace(settings, teachers=changed), "--teacher_quantization 4bit")
    )


def _offloaded(settings: Settings) -> tuple[Settings, str] | None:
    if settings.rollout is not None:  # refused there
        return None
    changed = tuple(
        replace(teacher, layout="offload") if teacher.layout == "device" and teacher.model.bits is None else teacher  # pyright: ignore[reportOptionalMemberAccess]
        for teacher in settings.teachers
    )
    return None if changed == settings.teachers else (replace(settings, teachers=changed), "--teacher_device offload")


def _half_student(settings: Settings) -> tuple[Settings, str] | None:
    if settings.student.dtype != "float32" or settings.lora is None or settings.student.bits is not None:
        return None
    return replace(settings, student=replace(settings.student, dtype="bfloat16")), "--dtype bfloat16"


def _with_lora(settings: Settings) -> tuple[Settings, str] | None:
    if settings.lora is not None:
        return None
    lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    student = replace(settings.student, dtype="bfloat16") if settings.mixed is torch.bfloat16 else settings.student
    dtype = " --dtype bfloat16" if student is not settings.student else ""
    options = f"--use_peft --lora_r {LORA_RANK} --lora_target_modules all-linear{dtype}"
    return replace(settings, lora=lora, student=student), options


CHANGES = (
    Change("a smaller chunk of the loss", "nothing but some time; the same update", _smaller_chunk),
    Change("gradient checkpointing", "one more forward of the student; the same update", _checkpointed),
    Change("smaller micro-batches", "time, if they are small for the GPU; the same update", _smaller_batch),
    Change("fewer rows written at a time", "slower rollouts; updates of the same kind", _fewer_written),
    Change("the student split over the GPUs", "traffic between GPUs; the same update", _split),
    Change("a store of the teacher", "one pass of the teacher before, on a GPU that it fits", _stored_teacher),
    Change("an offloaded teacher", "its weights cross the bus in every micro-batch; the same update", _offloaded),
    Change("a 4-bit teacher", "another teacher, slightly (docs/kd_lora.md)", _small_teacher),
    Change("frozen weights in bfloat16", "rounding of weights that are not trained", _half_student),
    Change("LoRA", "fewer numbers are trained: another training", _with_lora),
)
