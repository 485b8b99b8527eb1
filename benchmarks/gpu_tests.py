"""The tests marked `gpu` as one row of benchmarks/gpu.py, without slow imports."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timed_rows import Budget, NotMeasured, Row, group_parser, serve

ROOT = Path(__file__).parent.parent
WORKERS = 6  # most of the time of these tests is compilation


def run_tests(budget: Budget, device: str) -> dict[str, str]:
    """The numbers of passed and failed tests, also after a timeout. Without a GPU, the tests are only collected."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text("utf-8")]
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider"]
    if not device.startswith("cuda"):
        options.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        options += ["-n", str(WORKERS)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
        try:
            subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=budget.left, check=False)
            end = []
        except subprocess.TimeoutExpired:
            end = [f"stopped after {budget.seconds:.0f} s"]
        output.seek(0)
        text = output.read()
    print(text, file=sys.stderr, flush=True)
    counts = {word: text.count(f" {word} ") for word in ("PASSED", "FAILED", "ERROR")}
    counts["collected"] = text.count("<Function ")
    found = [f"{count} {word.lower()}" for word, count in counts.items() if count]
    if not found:
        raise NotMeasured(", ".join([*(text.strip().splitlines() or ["no output"])[-1:], *end]))
    return {"note": ", ".join(found + end)}


def main() -> None:
    parser = group_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="changes nothing here")
    options = parser.parse_args()
    rows = [Row("tests marked gpu", 58, lambda budget: run_tests(budget, options.device))]
    serve(options, lambda: rows)


if __name__ == "__main__":
    main()
