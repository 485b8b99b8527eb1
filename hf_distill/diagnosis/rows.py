"""Checks of the rows as they were given, before anything is tokenised: copies, held-out rows, the longest ones."""

from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from hf_distill.collators import LUPICollator
from hf_distill.diagnosis.findings import Finding, LeftOut, failure, ok, warning
from hf_distill.diagnosis.pictures import picture_bytes
from hf_distill.diagnosis.probe import Probe, columns_of
from hf_distill.picture_rows import has_transform, picture_column, pictures_of, unread
from hf_distill.rows import used_format

MOST_ROWS = 200_000  # that are compared, of each data set
MOST_SEEN = 20_000  # the same of rows with pictures, whose files are read
# Shares of training rows that are copies, and of held-out rows that are training rows.
COPIES = 0.1
LEAKED, MOST_LEAKED = 0.01, 0.1
LONGEST = 10


def copies(probe: Probe) -> Finding:
    """Training rows that are copies of others, but for spaces and capitals."""
    counts = Counter(_fingerprints(probe, "train"))
    total = sum(counts.values())
    copied = total - len(counts)
    share, most = copied / max(total, 1), max(counts.values(), default=0)
    line = f"{copied:,} of {total:,} training rows are copies of others, one of them {most:,} times"
    if share > COPIES:
        return warning(line, "drop them, unless they are meant to count several times", copies=copied, share=share)
    return ok(line if copied else f"no two of {total:,} training rows are the same", copies=copied, share=share)


def leaked_rows(probe: Probe) -> Finding:
    """Held-out rows that are training rows, but for spaces and capitals."""
    names = [name for name in probe.datasets if name != "train"]
    if not names:
        raise LeftOut("there are no held-out rows")
    trained = set(_fingerprints(probe, "train"))
    found = {name: [mark in trained for mark in _fingerprints(probe, name)] for name in names}
    name = max(names, key=lambda each: np.mean(found[each]))
    leaked, total = sum(found[name]), len(found[name])
    share = leaked / max(total, 1)
    line = f"{leaked:,} of {total:,} rows of the {name} dataset are training rows"
    remedy = "remove them from the training set, else held-out numbers are too good"
    if share > MOST_LEAKED:
        return failure(line, remedy, leaked=leaked, share=share)
    return warning(line, remedy, leaked=leaked, share=share) if share > LEAKED else ok(line, leaked=leaked, share=share)


def longest_rows(probe: Probe) -> Finding:
    """The ten longest rows of the probe, in tokens, which decide the memory of a batch."""
    lengths = np.array([len(ids) for ids, _ in probe.texts])
    order = np.argsort(-lengths, kind="stable")[:LONGEST]
    longest, median = lengths[order].tolist(), float(np.median(lengths))
    return ok(
        f"the longest of {len(lengths)} rows have {', '.join(map(str, longest))} tokens, the median {median:,.0f}",
        longest=longest, rows=order.tolist(), median=median,
    )  # fmt: skip


def _fingerprints(probe: Probe, name: str) -> Iterator[bytes]:
    """A hash of each row's text, or of its tokens, and of its pictures."""
    if name not in probe.datasets:
        raise LeftOut("there are no training rows")
    rows: Any = probe.datasets[name]
    columns = columns_of(rows)
    used = _prompt_columns(probe, columns) if probe.writes else used_format(columns, probe.args.dataset_text_field)
    used = used or tuple(sorted(columns))
    pictures = picture_column(sorted(columns))
    if hasattr(rows, "select_columns") and not has_transform(rows):
        rows = rows.select_columns([*used, *([pictures] if pictures else [])])
    for row in islice(unread(rows), MOST_SEEN) if pictures else islice(rows, MOST_ROWS):
        mark = blake2b("\x1f".join(_strings([row[column] for column in used])).encode(), digest_size=16)
        for picture in pictures_of(row):
            mark.update(b"\x1e" + picture_bytes(picture))
        yield mark.digest()


def _prompt_columns(probe: Probe, columns: set[str]) -> tuple[str, ...]:
    """The columns that prompts are made of, where the rest of the text is generated."""
    collator = probe.arguments.get("data_collator")
    if isinstance(collator, LUPICollator):
        names: tuple[str, ...] = (collator.query_column, collator.knowledge_column)
    else:
        names = ("messages", "conversations", "prompt") if collator is None else ()
    return tuple(name for name in names if name in columns)


def _strings(cell: Any) -> Iterator[str]:
    """The texts in a cell, without capitals, and with single spaces; tokens as numbers."""
    if isinstance(cell, str):
        yield " ".join(cell.lower().split())
    elif isinstance(cell, dict):
        for name in sorted(cell):
            yield from _strings(cell[name])
    elif isinstance(cell, list | tuple):
        for part in cell:
            yield from _strings(part)
    elif cell is not None:
        yield str(cell)
