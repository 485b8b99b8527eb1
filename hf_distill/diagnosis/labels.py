"""Checks of the tokens that bear labels: where texts begin and end, what is masked, what is cut off."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset

from hf_distill.diagnosis.findings import Finding, LeftOut, failure, ok, warning
from hf_distill.diagnosis.pictures import TAKEN
from hf_distill.diagnosis.probe import SOME, Probe
from hf_distill.teachers.across import AcrossTeacher
from hf_distill.token_rows import Room, count_cut, without_long_rows

# Shares of label-bearing tokens, or of rows, that are lost.
LOST, MOST_LOST = 0.05, 0.5
LEAST_LABELS = 0.01  # the share of label-bearing tokens below which nearly all of the computing is for prompts
ENDINGS = 4  # labels at the end of a text among which its end token is looked for; templates add a new line


def doubled_bos(probe: Probe) -> Finding:
    """Texts that begin with two BOS tokens: the template, or the text, has one, and the tokenizer adds another."""
    begun = doubled = texts = 0
    for tokenizer, sides in _beginnings(probe):
        bos = tokenizer.bos_token_id
        if bos is not None:
            texts += len(sides)
            begun += sum(list(ids[:1]) == [bos] for ids in sides)
            doubled += sum(list(ids[:2]) == [bos, bos] for ids in sides)
    if not texts:
        raise LeftOut("the tokenizer has no BOS token")
    if doubled:
        return warning(
            f"{doubled} of {texts} texts begin with two BOS tokens",
            "remove the BOS token from the rows or from the chat template: the tokenizer adds it", doubled=doubled,
        )  # fmt: skip
    return ok(f"{begun} of {texts} texts begin with a BOS token, none with two", begun=begun, doubled=0)


def _beginnings(probe: Probe) -> Iterator[tuple[Any, list[Any]]]:
    """Tokenizers, and the token ids of the texts that they made."""
    if probe.writes:
        rows = probe.trainer.train_dataset
        yield probe.tokenizer, [row[f"{side}_prompt_ids"] for row in rows for side in ("student", "teacher")]
        return
    yield probe.tokenizer, [ids for ids, _ in probe.texts]
    for teacher in getattr(probe.trainer, "teachers", {}).values():
        if isinstance(teacher, AcrossTeacher):
            yield teacher.tokenizer, probe.rows[f"{teacher.prefix}input_ids"]


def missing_end(probe: Probe) -> Finding:
    """Texts whose end token bears no label: the student never learns to stop."""
    ends = np.array(sorted(probe.end_ids))
    if not len(ends):
        return warning("the student has no EOS token", "set eos_token")
    pairs = zip(probe.texts, probe.padded, strict=True)
    texts = [(ids[: len(ids) - run], labels[: len(ids) - run]) for (ids, labels), run in pairs]
    texts = [(ids, labels) for ids, labels in texts if (labels != -100).any()]
    learned = sum(np.isin(labels[labels != -100][-ENDINGS:], ends).any() for _, labels in texts)
    masked = sum((np.isin(ids, ends) & (labels == -100))[1:].any() for ids, labels in texts)
    numbers = {"texts": len(texts), "learned": int(learned), "masked": int(masked)}
    line = f"{learned} of {len(texts)} texts end with an EOS token that bears a label"
    if learned >= len(texts) / 2:
        beside = "; padding is EOS, too, and told from it by the mask" if probe.pads_with_eos else ""
        return ok(line + beside, **numbers)
    if masked > learned:
        beside = " (it is the padding token, too)" if probe.pads_with_eos else ""
        return warning(
            f"{line}; in {masked} it is masked{beside}", "give EOS a label at the end of each row", **numbers
        )
    return warning(line, "end rows with EOS, or set eos_token to the token that ends them", **numbers)


def labelled_padding(probe: Probe) -> Finding:
    """Padding at the end of rows that bears labels: the student learns to write it."""
    if probe.tokenizer.pad_token_id is None:
        raise LeftOut("the student's tokenizer has no padding token")
    padded, rows = sum(map(bool, probe.padded)), len(probe.padded)
    if padded > SOME * rows:
        return failure(
            f"{padded} of {rows} rows end with labels on padding, {max(probe.padded)} tokens of it at most",
            "set the labels of padding to -100, or leave the padding to the collator", padded=padded,
        )  # fmt: skip
    return ok(f"no label is on padding ({probe.tokenizer.pad_token!r})", padded=padded)


def other_labels(probe: Probe) -> Finding:
    """Labels that are not the tokens at their places. The trainer shifts them itself."""
    total = differing = shifted = 0
    for ids, labels in probe.texts:
        bears = labels != -100
        wrong = bears & (labels != ids)
        total, differing = total + bears.sum(), differing + wrong.sum()
        shifted += (wrong[:-1] & (labels[:-1] == ids[1:])).sum()
    if differing > SOME * total:
        which = "they are the next token: shifted by one already" if shifted > differing / 2 else "not shifted ones"
        return failure(
            f"{differing / total:.0%} of the labels are not the token at their place; {which}",
            "give labels as a copy of input_ids, -100 where masked: the trainer shifts them", differing=int(differing),
        )  # fmt: skip
    return ok("labels are the tokens at their places", differing=int(differing))


def label_share(probe: Probe) -> Finding:
    """The share of the tokens that bear a label, and rows that have none."""
    rows, sampled = probe.uncut, len(probe.samples["train"])
    tokens = sum(len(ids) for ids, _ in probe.texts)
    labelled = sum(int((labels != -100).sum()) for _, labels in probe.texts)
    share, without = labelled / max(tokens, 1), sampled - len(rows)
    numbers = {"tokens": tokens, "labelled": labelled, "share": share, "without": without}
    line = f"{share:.0%} of {tokens:,} tokens bear a label; {without} of {sampled} rows have none and "
    line += "teach nothing" if probe.has_pictures else "are dropped"
    if probe.has_pictures:
        numbers["pictures"] = sum(rows[TAKEN])
        line += f"; pictures take {numbers['pictures'] / max(tokens, 1):.0%} of the tokens"
    if without > LOST * sampled:
        return warning(line, "look at their masks, completion_only_loss and assistant_only_loss", **numbers)
    if share < LEAST_LABELS:
        return warning(line, "shorten the prompts, or let more of the text bear labels", **numbers)
    return ok(line, **numbers)


def cut_labels(probe: Probe) -> Finding:
    """Labels and rows that are lost to `max_length` and to what the models can read."""
    args, rows = probe.args, probe.uncut
    sampled, lost, reasons = len(rows), 0.0, []
    numbers: Counter[str] = Counter(rows=sampled)
    goes_on = args.packing and args.packing_strategy != "bfd"  # which goes on in the next row
    if args.max_length is not None and not goes_on:
        cut = count_cut(rows, "train", args.max_length, keep_end=args.truncation_mode == "keep_end")
        numbers.update(
            cut=cut.shortened, dropped=cut.filled, lost=_lost_labels(probe, args.max_length), labels=cut.labels
        )
        lost = numbers["lost"] / max(cut.labels, 1)
        drops = f"leaves {cut.filled} without a label" if probe.has_pictures else f"drops {cut.filled}"
        reasons.append(f"max_length={args.max_length} cuts {cut.shortened} of {sampled} rows and {drops}")
    if too_long := _too_long(probe, rows):
        numbers["too long"] = too_long
        reasons.append(f"{too_long} are longer than a model can read")
        lost = max(lost, too_long / sampled)
    line = f"{'; '.join(reasons) or 'no row is cut'}: {lost:.0%} of the label-bearing tokens are lost"
    remedy = "raise max_length, shorten the rows, or split them"
    if lost > MOST_LOST:
        return failure(line, remedy, share=lost, **numbers)
    return warning(line, remedy, share=lost, **numbers) if lost > LOST else ok(line, share=lost, **numbers)


def _lost_labels(probe: Probe, max_length: int) -> int:
    """Label-bearing tokens past `max_length`, those of rows that lose all of them included."""
    keep_end = probe.args.truncation_mode == "keep_end"
    parts = [labels[:-max_length] if keep_end else labels[max_length:] for _, labels in probe.texts]
    return sum(int((part != -100).sum()) for part in parts)


def _too_long(probe: Probe, rows: Dataset) -> int:
    """Rows that would be dropped because a model has too few positions for them."""
    if not probe.args.drop_long_rows:
        return 0  # they are refused
    rooms: list[Room] = probe.trainer.rooms(set(rows.column_names))
    try:
        return len(rows) - len(without_long_rows(rows, "train", rooms))
    except ValueError:  # none is left
        return len(rows)
