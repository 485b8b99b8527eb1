"""Rows per second of our own checks, and memory, over data sets of 1,000 to 1,000,000 rows of token ids on disk.

    OMP_NUM_THREADS=1 python -m benchmarks.scale --markdown

Each size runs in a process of its own. The rows have `input_ids` and `completion_mask`, 24 to 72 tokens, and come from
Arrow files, so the data set itself lies in a memory map. The checks are those of a trainer's construction: tokens and
labels, rows without a label, the longest row. `construction` is that of a `KDTrainer` of two tiny models on the same
rows, all of TRL's preparation included. Extra memory is the peak of memory that is the process's own (without memory
maps), minus that before; for the construction, together with that of the processes that prepare rows.
"""

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_from_disk
from datasets.arrow_writer import ArrowWriter

from benchmarks.measure import in_fresh_process, machine, print_table
from benchmarks.timed_rows import seconds, size
from hf_distill import KDConfig, KDTrainer
from hf_distill.token_rows import Limits, check_rows, longest_text, rows_with_label
from tests.conftest import make_model, make_tokenizer

VOCAB = 384
BLOCK = 10_000  # rows that are written at a time


class Used(NamedTuple):
    seconds: float
    memory: int  # bytes


def write_rows(folder: Path, num_rows: int) -> None:
    """Writes rows of random tokens into a folder that `load_from_disk` reads."""
    random, parts = np.random.default_rng(0), []
    for start in range(0, num_rows, BLOCK):
        lengths = random.integers(24, 73, min(BLOCK, num_rows - start))
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
        ids = pa.LargeListArray.from_arrays(offsets, random.integers(2, VOCAB, offsets[-1])).cast(pa.list_(pa.int64()))
        inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        mask = pa.LargeListArray.from_arrays(offsets, (inside >= 12).astype(np.int64)).cast(pa.list_(pa.int64()))
        part = folder / f"{start:08d}.arrow"
        with ArrowWriter(path=str(part)) as writer:
            writer.write_table(pa.table({"input_ids": ids, "completion_mask": mask}))
            writer.finalize()
        parts.append(part)
    whole = [Dataset.from_file(str(part)) for part in parts]
    concatenate_datasets(whole).save_to_disk(str(folder / "rows"))


def own_memory() -> int:
    """The bytes of this process, and of those that it has started, that are not of files."""
    total, process = 0, psutil.Process()
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            info: Any = each.memory_info()
            total += info.rss - info.shared
    return total


@contextmanager
def measured() -> Iterator[list[Used]]:
    """Yields a list. After the context, it has what the code inside took."""
    before = peak = own_memory()
    done, found = threading.Event(), []

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, own_memory())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    try:
        yield found
        found.append(Used(time.perf_counter() - start, peak - before))
    finally:
        done.set()
        sampler.join()


def run(num_rows: int, options: argparse.Namespace) -> tuple[Used, Used]:
    """Writes the rows, and measures the checks of them and a construction."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_rows(Path(folder), num_rows)
        dataset: Any = load_from_disk(f"{folder}/rows")
        limits = Limits(VOCAB, VOCAB)
        with measured() as checks:
            check_rows(dataset, "train", limits, options.threads)
            kept = rows_with_label(dataset, "train", limits, options.threads)
            longest_text(dataset)
        assert kept.all()
        args = KDConfig(
            output_dir=f"{folder}/out", use_cpu=True, bf16=False, report_to=[], completion_only_loss=True,
            disable_tqdm=True, dataset_num_proc=options.threads if options.threads > 1 else None,
        )  # fmt: skip
        tokenizer, student, teacher = make_tokenizer(), make_model(seed=2), make_model(seed=1)
        with measured() as construction:
            KDTrainer(student, teacher, args, dataset, None, tokenizer, teacher_processing_class=tokenizer)
        return checks[0], construction[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=2, help="of our checks, and processes of the preparation")
    parser.add_argument("--folder", help="where the rows are written; by default the folder for temporary files")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    rows = []
    for num_rows in options.rows:
        checks, construction = in_fresh_process(run, num_rows, options)
        rows.append(
            {
                "rows": f"{num_rows:,}",
                "our checks": seconds(checks.seconds),
                "rows/s": f"{num_rows / checks.seconds:,.0f}",
                "extra memory": size(checks.memory),
                "construction": seconds(construction.seconds),
                "rows/s ": f"{num_rows / construction.seconds:,.0f}",
                "extra memory ": size(construction.memory),
            }
        )
    print_table(f"{options.threads} threads; {machine('cpu')}", rows, options.markdown)


if __name__ == "__main__":
    main()
