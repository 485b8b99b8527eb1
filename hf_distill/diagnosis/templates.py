"""Checks of vocabularies and chat templates: do both sides read the same text?"""

from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_distill.collators import template_arguments
from hf_distill.diagnosis.findings import Finding, LeftOut, ok, warning
from hf_distill.diagnosis.probe import Probe
from hf_distill.teachers.across import AcrossTeacher
from hf_distill.teachers.columns import lost_messages

# Vocabularies of which fewer ids differ than this share are those of one family, with some tokens renamed.
FEW_IDS = 0.05
# Below this share of compared tokens, most of a teacher with another tokenizer goes unheard.
ENOUGH_COMPARED = 0.5
SHOWN = 80  # characters of a text


def vocabularies(probe: Probe) -> Finding:
    """Token ids that mean the same to both sides, id by id."""
    student = probe.tokenizer.get_vocab()
    lines, numbers = [], {}
    for name, tokenizer in _tokenizers(probe):
        teacher = tokenizer.get_vocab()
        tokens = {index: token for token, index in student.items()}
        others = {index: token for token, index in teacher.items()}
        differing = sorted(i for i in tokens.keys() & others.keys() if tokens[i] != others[i])
        numbers[name] = {"student": len(student), "teacher": len(teacher), "differing": len(differing)}
        aligned = isinstance(probe.teachers[name], AcrossTeacher)
        if aligned and len(differing) <= FEW_IDS * len(student):
            shown = ", ".join(f"{i}: {tokens[i]!r} / {others[i]!r}" for i in differing[:3])
            return warning(
                f"only {len(differing)} of {len(student):,} ids differ from those of {name} ({shown}), and texts are "
                "aligned for their sake",
                "give student and teacher one tokenizer (processing_class, teacher_processing_class)", **numbers,
            )  # fmt: skip
        lines.append(
            f"{name} has another vocabulary ({len(teacher):,} and {len(student):,} tokens): texts are aligned"
            if aligned
            else f"all {len(tokens.keys() & others.keys()):,} common ids mean the same to {name}"
        )
    size = probe.trainer.vocab_size
    return ok(f"{'; '.join(lines)}; {size:,} ids count in the loss", vocab_size=size, **numbers)


def alignment(probe: Probe) -> Finding:
    """The share of the tokens that are compared with a teacher of another tokenizer."""
    numbers = {}
    for name, teacher in probe.teachers.items():
        if not isinstance(teacher, AcrossTeacher):
            continue
        exact = compared = total = 0
        for row in probe.rows:
            exact += row[f"{teacher.prefix}exact"]
            compared += sum(group >= 0 for group in row[f"{teacher.prefix}student_groups"])
            total += sum(label != -100 for label in row["labels"][1:])
        numbers[name] = {"exact": exact / max(total, 1), "compared": compared / max(total, 1)}
    if not numbers:
        raise LeftOut("no teacher has another tokenizer")
    worst = min(numbers, key=lambda name: numbers[name]["compared"])
    shares = numbers[worst]
    line = f"{shares['compared']:.0%} of the tokens are compared with {worst}, {shares['exact']:.0%} of them exactly"
    if shares["compared"] < ENOUGH_COMPARED:
        return warning(line, "look whether its chat template keeps what is said, and its tokenizer the text", **numbers)
    return ok(line, **numbers)


def templates(probe: Probe) -> Finding:
    """The text that each side's chat template makes of the same messages."""
    if probe.has_pictures:
        raise LeftOut("rows with pictures have been read through both processors, which have to make the same text")
    said = []
    for name, tokenizer in _tokenizers(probe):
        if tokenizer.chat_template is None:
            said.append(f"{name} has no template of its own and reads the student's")
            continue
        if isinstance(probe.teachers[name], AcrossTeacher):
            said.append(f"{name} reads its own template")
            continue
        if tokenizer.chat_template == probe.tokenizer.chat_template:
            said.append(f"that of {name} is the same")
            continue
        pairs = [(_text(probe.tokenizer, row), _text(tokenizer, row)) for row in probe.conversations]
        if differing := [pair for pair in pairs if pair[0] != pair[1]]:
            return warning(
                f"{len(differing)} of {len(pairs)} conversations are another text in the template of {name}, which "
                f"reads the student's: {_difference(*differing[0])}",
                "train in the teacher's template: chat_template_path=<the teacher>", differing=len(differing),
            )  # fmt: skip
        said.append(f"that of {name} makes the same text")
    conversations = len(probe.conversations)
    return ok(f"{conversations} conversations; {'; '.join(said)}", differing=0)


def lost_text(probe: Probe) -> Finding:
    """Messages that a chat template leaves out: a system prompt that nobody reads."""
    sides = {"the student": probe.trainer.processing_class if probe.has_pictures else probe.tokenizer}
    if probe.problem is None:
        teachers = getattr(probe.trainer, "teachers", {})
        sides |= {name: each.tokenizer for name, each in teachers.items() if isinstance(each, AcrossTeacher)}
    rows = probe.conversations
    for side, tokenizer in sides.items():
        if tokenizer.chat_template is None:
            continue
        try:
            lost = [role for row in rows for role in dict.fromkeys(lost_messages(row, tokenizer))]
        except TemplateError as error:
            return warning(f"the template of {side} refuses a conversation: {error}", "mend the rows or the template")
        if lost:
            roles = ", ".join(sorted(set(lost)))
            return warning(
                f"the template of {side} leaves out or changes messages of {roles} in {len(lost)} of {len(rows)} rows",
                "take a template that keeps them (chat_template_path), or say it in the user's message",
                lost=len(lost), roles=roles,
            )  # fmt: skip
    return ok(f"the messages of {len(rows)} conversations are all in their text", lost=0)


def generation_markers(probe: Probe) -> Finding:
    """Whether assistant turns can be told from the rest, and whether they alone bear labels."""
    rows = probe.conversations
    if any("completion" in row for row in rows):
        raise LeftOut("rows have prompts and completions, which tell what bears labels")
    masked = sum((labels == -100).sum() - 1 for _, labels in probe.texts)
    share = masked / max(sum(len(ids) - 1 for ids, _ in probe.texts), 1)
    if probe.args.assistant_only_loss:
        return ok(f"the template marks what the assistant says; the other {share:.0%} bear no label", masked=share)
    of_text = " of text" if probe.has_pictures else ""
    return ok(f"every token{of_text} bears a label, those of users too (assistant_only_loss=False)", masked=share)


# ------------------------------------------------------------------------------------------------------------- details


def _tokenizers(probe: Probe) -> Iterator[tuple[str, PreTrainedTokenizerBase]]:
    """The teachers' own tokenizers; [`LeftOut`] if there is none."""
    found = {name: getattr(teacher, "tokenizer", None) for name, teacher in probe.teachers.items()}
    own = {name: each for name, each in found.items() if each is not None and each is not probe.tokenizer}
    if not own:
        raise LeftOut("teacher and student have one tokenizer, or the teacher's is not known")
    yield from own.items()


def _text(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    try:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False, **template_arguments(row)))
    except TemplateError as error:
        return f"(refused: {error})"


def _difference(mine: str, theirs: str) -> str:
    """The first place where two texts differ, of both."""
    start = next(
        (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(map(len, (mine, theirs)))
    )
    start = max(0, start - SHOWN // 4)
    return " / ".join(repr(text[start : start + SHOWN]) for text in (mine, theirs))
