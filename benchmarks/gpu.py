"""All benchmark rows that need a GPU, in one call of 450 seconds, the most important rows first.

    python -m benchmarks.gpu --output out/gpu                            # a CUDA device
    python -m benchmarks.gpu --output out/gpu-tiny --tiny --device cpu   # a rehearsal of all rows, with small shapes

Each group of rows has its own process and a limit in seconds. Each row has a limit, and the whole call has `--budget`.
After every row, `results.md` and `results.json` in the output folder are rewritten, so an interrupted run keeps its
results. `log.txt` has all other output. Rows that are already in the folder stay until they are measured again.

Time is the median of steps in the steady state. Warm-up and compilation have a separate column. The floor is the larger
of two times: FLOPs and bytes, each divided by the ceiling of this card (benchmarks/ceilings.py). `of floor` is the
reached share of it. torch's profiler counts launches, synchronisations, products (requested matrix multiplications) and
reads by the host: per step, per block of a rollout, per token of `generate`. Memory is the peak memory of a step minus
the memory before it.
"""

import argparse
import os
import platform
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.timed_rows import MARKDOWN, Group, Results, run_groups, seconds, size

# Groups in this order, with their limits in seconds. Time that a group does not use is left for later groups.
GROUPS = {
    "tests": ("The tests marked gpu", 60),
    "loss": ("The loss: CE and a divergence, bfloat16, N=8,192, V=128,256, Ds=2,048, Dt=4,096", 75),
    "step": ("A training step: Qwen2.5-0.5B-shaped student, 7B-shaped teacher, 4 x 1,024 tokens", 90),
    "memory": ("Peak memory of that step of KDTrainer, by component", 25),
    "rollout": ("Rollouts of that pair: 128 new tokens a row, draft 5, top_k 25", 95),
    "packed": ("A packed row of 8,192 tokens", 40),
    "quantised": ("4-bit teacher and student, 4 x 1,024 tokens", 40),
    "more": ("While time is left", 100),
}


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The cells of a row as text, by column."""

    def text(name: str, form: Any) -> str:
        return form(row[name]) if name in row else ""

    number = "{:,.0f}".format
    return {
        "row": row["row"],
        "time": text("seconds", seconds),
        "floor": text("floor", seconds),
        "of floor": text("share", "{:.0%}".format),
        "TFLOP": text("flops", lambda value: f"{value / 1e12:.3g}"),
        "GB moved": text("bytes", lambda value: f"{value / 1e9:.3g}"),
        "memory": text("memory", size),
        "stays": text("kept", size),
        "tokens/s": text("tokens/s", number),
        "acceptance": text("acceptance", "{:.0%}".format),
        "blocks": text("blocks", number),
        "launches": text("launches", number) if row.get("launches") else "",
        "syncs": text("syncs", number) if row.get("launches") else "",
        "kernels": text("kernel seconds", seconds),
        "products": text("products", number),
        "host reads": text("host reads", number),
        "warm-up": text("warm-up", seconds),
        "graphs": text("graphs", number) if row.get("graphs") else "",
        "recompilations": text("recompilations", number),
        "note": str(row.get("error") or row.get("note", "")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=str([*GROUPS]))
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for everything")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the limits of groups and rows")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the same rows in small, to rehearse them")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A signal that ends this process ends its children, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = Results(options.output, {name: title for name, (title, _) in GROUPS.items()}, cells)
    tiny = ["--tiny"] if options.tiny else []
    if options.tiny:
        results.note(rehearsal="small shapes on this machine: the numbers have no meaning, in spite of the titles")
    results.note(command=f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}", python=platform.python_version())
    groups = []
    for name in GROUPS:
        if name in options.only:
            module = "benchmarks.gpu_tests" if name == "tests" else "benchmarks.gpu_rows"
            command = [
                sys.executable,
                "-m",
                module,
                "--device",
                options.device,
                f"--patience={options.patience}",
                *tiny,
            ]
            groups.append(Group(name, GROUPS[name][1] * options.patience, command))
    try:
        run_groups(groups, results, options.budget)
    finally:
        print((options.output / MARKDOWN).read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    main()
