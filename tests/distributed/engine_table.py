"""Prints which trainer does what under which engine, every cell measured on two CPU processes; takes some minutes.

Usage: python -m tests.distributed.engine_table [ENGINE ...]
"""

import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from hf_distill.report import table
from tests.distributed.engine_runs import CELLS, TAUGHT, difference, launch, run_cell, saved_weights, taught_by_one

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def rows_of(engine: str, results: list[dict], one: dict, folder: Path) -> list[dict[str, str]]:
    rows = []
    for cell in CELLS:
        ranks = [rank[cell] for rank in results]
        saved, weights = saved_weights(cell, folder / "-".join(cell)), ranks[0]["weights"]
        whole = saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)
        update = max(difference(rank["weights"], one[cell]["weights"], one[cell]["before"]) for rank in ranks)
        resumed = max(difference(rank["resumed"], rank["weights"], rank["before"]) for rank in ranks)
        loss = abs(ranks[0]["eval"]["eval_loss"] / one[cell]["eval"]["eval_loss"] - 1)
        rows.append({
            "engine": f"{engine} ({ranks[0]['engine']})", "trainer": cell[0], "student": cell[1],
            "update": f"{update:.0e}", "eval loss": f"{loss:.0e}", "saved": "whole" if whole else "NO",
            "resumed": f"{resumed:.0e}",
        })  # fmt: skip
    return rows


def taught_rows_of(engine: str, results: list[dict], one: dict) -> list[dict[str, str]]:
    rows = []
    for case in [case for case in TAUGHT if case in results[0]]:
        update = max(difference(rank[case]["weights"], one[case]["weights"], one[case]["before"]) for rank in results)
        loss = abs(results[0][case]["eval"]["eval_loss"] / one[case]["eval"]["eval_loss"] - 1)
        names = dict(zip(("trainer", "teachers", "each"), case, strict=True))
        rows.append({"engine": engine, **names, "update": f"{update:.0e}", "eval loss": f"{loss:.0e}"})
    return rows


def main(engines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        one = {cell: run_cell(cell, folder / "one" / "-".join(cell), 1) for cell in CELLS}
        taught = taught_by_one(folder / "taught")
        rows, taught_rows = [], []
        for engine in engines:
            (folder / engine).mkdir()
            results = launch(engine, folder / engine)
            rows += rows_of(engine, results, one, folder / engine)
            taught_rows += taught_rows_of(engine, results, taught)
    console = Console(width=120)
    console.print(table(rows, "two processes against one: relative differences"))
    console.print(table(taught_rows, "the same with other teachers"))


if __name__ == "__main__":
    main(sys.argv[1:] or list(ENGINES))
