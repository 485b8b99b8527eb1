"""Rows per second of our own checks, and memory, over data sets of 1,000 to 1,000,000 rows of token ids on disk.

    OMP_NUM_THREADS=1 python -m benchmarks.scale --rows 1000 10000 100000 --threads 2 --markdown

Each size runs in a process of its own. The rows have `input_ids` and `completion_mask`, 24 to 72 tokens, and come from
Arrow files, so the data set itself lies in a memory map. The checks are those of a trainer's construction: tokens and
labels, rows without a label, the longest row. `construction` is that of a `KDTrainer` of two tiny models on the same
rows, all of TRL's preparation included. Extra memory is the peak of memory that is the process's own (without memory
maps), minus that before the checks.
"""

import argparse
import tempfile
import threading
import time
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


class Found(NamedTuple):
    checks: float  # seconds
    memory: int  # bytes
    construction: float | None  # seconds


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
    """The bytes of this process that are not of files."""
    info: Any = psutil.Process().memory_info()
    return info.rss - info.shared


def run(num_rows: int, options: argparse.Namespace) -> Found:
    """Writes the rows, and measures the checks of them and a construction."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_rows(Path(folder), num_rows)
        dataset: Any = load_from_disk(f"{folder}/rows")
        limits = Limits(VOCAB, VOCAB)
        before = peak = own_memory()
        done = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not done.wait(0.005):
                peak = max(peak, own_memory())

        sampler = threading.Thread(target=sample)
        sampler.start()
        start = time.perf_counter()
        check_rows(dataset, "train", limits, options.threads)
        kept = rows_with_label(dataset, "train", limits, options.threads)
        longest_text(dataset)
        checks = time.perf_counter() - start
        done.set()
        sampler.join()
        assert kept.all()
        construction = None
        if num_rows <= options.construct:
            args = KDConfig(
                output_dir=f"{folder}/out", use_cpu=True, bf16=False, report_to=[], completion_only_loss=True,
                disable_tqdm=True, dataset_num_proc=options.threads if options.threads > 1 else None,
            )  # fmt: skip
            tokenizer, teacher = make_tokenizer(), make_model(seed=1)
            start = time.perf_counter()
            KDTrainer(make_model(seed=2), teacher, args, dataset, None, tokenizer, teacher_processing_class=tokenizer)
            construction = time.perf_counter() - start
        return Found(checks, peak - before, construction)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=2, help="of our checks, and processes of the preparation")
    parser.add_argument("--construct", type=int, default=100_000, help="the largest data set to construct a trainer on")
    parser.add_argument("--folder", help="where the rows are written; by default the folder for temporary files")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    rows = []
    for num_rows in options.rows:
        found = in_fresh_process(run, num_rows, options)
        constructed = found.construction
        rows.append(
            {
                "rows": f"{num_rows:,}",
                "our checks": seconds(found.checks),
                "rows/s": f"{num_rows / found.checks:,.0f}",
                "extra memory": size(found.memory),
                "construction": "" if constructed is None else seconds(constructed),
                "rows/s ": "" if constructed is None else f"{num_rows / constructed:,.0f}",
            }
        )
    print_table(f"{options.threads} threads; {machine('cpu')}", rows, options.markdown)


if __name__ == "__main__":
    main()
