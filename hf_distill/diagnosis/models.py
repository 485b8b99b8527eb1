"""Checks of both models on the rows: what do they predict, before any training?"""

import math
import statistics
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_distill.diagnosis.findings import Finding, LeftOut, failure, ok, warning
from hf_distill.diagnosis.forwards import between, compared
from hf_distill.diagnosis.probe import Probe, columns_of
from hf_distill.modeling import weights_kind
from hf_distill.rows import is_conversation
from hf_distill.servers import TeacherAway
from hf_distill.teachers.kinds import brought_from, describe_teachers, own_models
from hf_distill.teachers.loading import load_teacher
from hf_distill.teachers.local import LocalTeacher
from hf_distill.teachers.opening import name_teachers
from hf_distill.teachers.own_view import OwnViewTeacher

# Nats per token between a model and itself: in float32, and where one of both computes in half precision.
SAME = {False: 1e-5, True: 1e-2}
# A teacher that has lost so many nats per token against the student is worse; 4 bits cost a copy of it less.
WORSE = 0.05
# A teacher whose KL to its saved dtype is larger than this (nats per token) is another teacher, or a broken one.
ROUNDED, BROKEN = 0.1, 0.5
STORED_ROWS = 2000  # that are looked for in a store
ROUNDED_BATCHES = 4  # of the probe, that both dtypes read


def sources(probe: Probe) -> Finding:
    """Where the teachers' outputs come from: weights, a store, a server."""
    described = describe_teachers(probe.teachers)
    brought = brought_from(probe.teachers)
    said = "; ".join(f"{name}: {brought.get(name) or text}" for name, text in described.items())
    if brought and not probe.writes:
        try:
            rows = probe.more_rows(STORED_ROWS)  # looks for them in a store
            for _ in probe.batches(probe.args.per_device_eval_batch_size):  # asks a server
                pass
        except TeacherAway as error:
            return failure(f"{said}; it does not answer: {error}", "start the server, or mend its address")
        except ValueError as error:
            return failure(f"{said}: {error}", "write what is missing, with the settings of this run")
        return ok(f"{said}; it knows the {len(rows):,} rows that were looked for", brought=len(brought))
    return ok(said, brought=len(brought))


def _of_questions(probe: Probe) -> str:
    """The remedy for labels on system prompts and questions; empty where only answers bear them."""
    is_made = probe.writes or probe.arguments.get("formatting_func") is not None
    columns, text_field = columns_of(probe.given_rows), probe.args.dataset_text_field
    if is_made or probe.args.assistant_only_loss or not is_conversation(columns, text_field):
        return ""
    return (
        "system prompts and questions bear labels, too: set assistant_only_loss=True, or give the rows as prompt and "
        "completion; and "
    )


def teacher_perplexity(probe: Probe) -> Finding:
    """The teacher's perplexity on the rows, beside the student's, each on its own view of them."""
    numbers, lines, problems = {}, [], []
    for name, sums in compared(probe).items():
        if sums.teacher is None:
            continue
        student, teacher = sums.student, sums.teacher
        guessed = sums.guessed() * sums.teacher_tokens
        numbers[name] = {
            "student": student / sums.tokens, "teacher": teacher / max(sums.teacher_tokens, 1),
            "guessed": sums.guessed(), "tokens": sums.tokens,
        }  # fmt: skip
        line = f"{name} has perplexity {_exp(teacher, sums.teacher_tokens)}, the student {_exp(student, sums.tokens)}"
        lines.append(line)
        if not math.isfinite(teacher):
            return failure(f"{name} predicts numbers that are not finite", "load it in another dtype", **numbers)
        if sums.is_worse_than_a_guess:
            # Frequencies of these very labels may be hard to beat. That all tokens are equally likely is not.
            is_broken = teacher > math.log(probe.trainer.vocab_size) * sums.teacher_tokens
            return (failure if is_broken else warning)(
                f"{line}: a guess by the frequency of tokens has {_exp(guessed, sums.teacher_tokens)}",
                f"{_of_questions(probe)}look whether its weights, tokenizer or settings are its own: compare its "
                "folder with the original", **numbers,
            )  # fmt: skip
        if teacher - student > WORSE * sums.tokens:
            problems.append(line)
    if not numbers:
        raise LeftOut("what the teacher says of the rows' own tokens is not known")
    if problems:
        return warning(
            f"{problems[0]}: the teacher is worse",
            "look whether student and teacher are exchanged, and whether the teacher is whole", **numbers,
        )  # fmt: skip
    return ok("; ".join(lines), **numbers)


def start(probe: Probe) -> Finding:
    """The distance between both sides at the start: KL, agreement, the rate at which drafts would be accepted."""
    numbers, lines = {}, []
    for name, sums in compared(probe).items():
        known = {
            measure: value / sums.tokens
            for measure in ("kl", "agreement", "acceptance")
            if (value := getattr(sums, measure)) is not None
        }
        if not known:
            continue
        numbers[name] = known
        said = [f"KL {'at least ' * sums.is_bound}{known['kl']:.3f} nats"] if "kl" in known else []
        said += [f"{measure} {known[measure]:.0%}" for measure in ("agreement", "acceptance") if measure in known]
        lines.append(f"{name}: {', '.join(said)}")
    if not numbers:
        raise LeftOut("the teacher has another tokenizer: these are not known")
    own = own_models(probe.teachers)  # of these, none is meant to be the student
    dtypes = {probe.trainer.student.dtype, *(teacher.model.dtype for teacher in own.values())}
    is_rounded = probe.args.bf16 or probe.args.fp16 or dtypes != {torch.float32}
    if own and all(numbers.get(name, {}).get("kl", math.inf) < SAME[is_rounded] for name in own):
        return warning(
            f"{'; '.join(lines)}: there is nothing to learn from it",
            "look whether student and teacher are one model: the divergence would only hold it where it is", **numbers,
        )  # fmt: skip
    return ok("; ".join(lines), **numbers)


def teacher_end(probe: Probe) -> Finding:
    """The teacher's probability of the tokens that end the texts: a teacher that never ends unteaches ending."""
    numbers: dict[str, Any] = {}
    worst: tuple[float, str] | None = None
    for name, sums in compared(probe).items():
        if sums.is_worse_than_a_guess:
            raise LeftOut(f"{name} predicts nothing well (teacher's perplexity)")
        if sums.ends:
            median = statistics.median(sums.ends)
            numbers[name] = {"median": median, "ends": len(sums.ends)}
            worst = min(worst or (median, name), (median, name))
    if worst is None:
        raise LeftOut("no label is an EOS token, or the teacher has another one")
    median, name = worst
    ends = numbers[name]["ends"]
    line = f"{name} gives the EOS tokens of the rows a probability of {median:.2g} (the median of {ends})"
    if median < 1 / probe.trainer.vocab_size:
        return warning(
            f"{line}, less than chance: it has never learned to end so",
            "take the end token that the teacher knows (eos_token), or a teacher that was tuned on this template",
            **numbers,
        )
    return ok(line, **numbers)


@torch.no_grad()
def cost_of_bits(probe: Probe) -> Finding:
    """What quantisation costs this teacher: KL to the weights that it was made of, on the rows."""
    name, teacher, source = _quantised(probe)
    if probe.writes:
        raise LeftOut("the training text is generated")
    args, trainer = probe.args, probe.trainer
    device = trainer.args.device
    size = 2 * teacher.model.num_parameters()  # bytes, about: bfloat16
    offloads = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.2 * size
    saved = load_teacher(
        source, device="offload" if offloads else None, student_device=device,
        trust_remote_code=args.trust_remote_code, init_kwargs=args.teacher_model_init_kwargs or None,
    )  # fmt: skip
    whole = LocalTeacher(saved, device, teacher.tokenizer)
    if isinstance(teacher, OwnViewTeacher):
        whole.view = teacher.view  # of the same rows

    kl, exact, rounded = between(probe, whole, teacher, ROUNDED_BATCHES)
    numbers = {"kl": kl, "saved": exact, "quantised": rounded}
    line = (
        f"{args.teacher_quantization} costs {name} {kl:.3f} nats per token (KL to {weights_kind(saved)}), "
        f"perplexity {math.exp(min(exact, 50)):.2f} -> {math.exp(min(rounded, 50)):.2f}"
    )
    remedy = "load it in 8 bits or as it was saved, on another device or offloaded, or write a store of it once"
    if not kl <= BROKEN:
        return failure(line, remedy, **numbers)
    return warning(line, remedy, **numbers) if kl > ROUNDED else ok(line, **numbers)


def _quantised(probe: Probe) -> tuple[str, LocalTeacher, str]:
    """The first teacher that is quantised here, and the name that it was loaded by; [`LeftOut`] if there is none."""
    if getattr(probe.args, "teacher_quantization", None) is None:
        raise LeftOut("no teacher is quantised here")
    # Not the name in the model's configuration, which of an adapted model is its base.
    teachers = own_models(probe.teachers)
    given = name_teachers(probe.arguments["teacher_model"], None, probe.args).models
    for name, teacher in teachers.items():
        if isinstance(source := given[name], str) and isinstance(teacher.model, PreTrainedModel):
            if probe.teachers[name] is not teacher:
                raise LeftOut(f"{name} has another tokenizer")
            return name, teacher, source
    raise LeftOut("it is not known what the quantised teacher was loaded from")


def _exp(nats: float, tokens: int) -> str:
    return f"{math.exp(min(nats / max(tokens, 1), 100)):,.2f}"
