"""Training rows of several sources, mixed by weights: `--dataset a:0.7 b:0.3`."""

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from datasets import Dataset, interleave_datasets

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """A source of rows: a hub id, a folder or a file, and its weight, if one is given."""

    name: str
    weight: float | None


def read_sources(words: str | Sequence[str]) -> list[Source]:
    """The sources that `--dataset` names. Weights need not sum to 1.

    What follows the last colon of a word is its weight if it is a number, and if no file or folder has the whole word
    as its name.

    Raises:
        `ValueError`: several sources of which one has no weight, a weight that is not above 0 and finite, or a source
            that is named twice.
    """
    sources = [_read_source(word) for word in ([words] if isinstance(words, str) else words)]
    for name, weight in sources:
        if weight is not None and not 0 < weight < math.inf:
            raise ValueError(f"--dataset: the weight of {name!r} has to be above 0 and finite, got {weight:g}")
        if weight is None and len(sources) > 1:
            raise ValueError(f"--dataset: {name!r} has no weight; of several sources each needs one, as in a:0.7 b:0.3")
    for name, times in Counter(source.name for source in sources).items():
        if times > 1:
            raise ValueError(f"--dataset names {name!r} twice: give it once, with the sum of the weights")
    return sources


def _read_source(word: str) -> Source:
    name, colon, text = word.rpartition(":")
    if not colon or not name or os.path.exists(os.path.expanduser(word)):
        return Source(word, None)
    try:
        return Source(name, float(text))
    except ValueError:
        return Source(word, None)


def mixed(rows: Mapping[Source, Dataset], seed: int) -> Dataset:
    """Rows of several sources in random order, each source with the share of its weight.

    The mix ends where the first source has no row left. So no row comes twice in an epoch, and of a source that is
    larger than its share a random part is taken. The log says how many rows of each are used.

    Raises:
        `ValueError`: columns of one name with different types.
    """
    total = sum(source.weight or 0.0 for source in rows)
    options = {
        "probabilities": [(source.weight or 0.0) / total for source in rows], "seed": seed,
        "stopping_strategy": "first_exhausted",
    }  # fmt: skip
    try:
        found = interleave_datasets([part.shuffle(seed=seed) for part in rows.values()], **options)
    except ValueError as error:
        raise ValueError(f"the sources of --dataset do not go together: {' '.join(str(error).split())}") from error
    # The same choices once more, of the sources themselves.
    numbers = [Dataset.from_dict({"source": [i] * len(part)}) for i, part in enumerate(rows.values())]
    counts = Counter(interleave_datasets(numbers, **options)["source"])
    used = [
        f"{counts[i]:,} of {len(part):,} rows of {source.name} ({counts[i] / len(found):.0%})"
        for i, (source, part) in enumerate(rows.items())
    ]
    logger.info("the training rows are a mix: %s; it ends where a source has no row left", ", ".join(used))
    return found
