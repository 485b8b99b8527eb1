"""A group of rows for the tests of benchmarks/timed_rows.py: started as its own process, without a slow import."""

import os
import time

from benchmarks.timed_rows import NotMeasured, Row, group_parser, serve


def stop(budget):
    raise NotMeasured("no such device")


def fail(budget):
    raise RuntimeError("out of luck\nand a second line")


def hang(budget):
    time.sleep(60)


def die(budget):
    os._exit(7)


def repeat(budget):
    return {"repeats": sum(time.sleep(0.2) is None for _ in budget.repeats(100))}


def parts(budget):
    return [{"row": "part 1", "value": 1}, {"row": "part 2", "value": 2}]


ROWS = {
    "first": [
        Row("quick", 5, lambda budget: {"value": 1}),
        Row("stops", 5, stop),
        Row("fails", 5, fail),
        Row("hangs", 1, hang),
        Row("dies", 5, die),
        Row("parts", 5, parts),
        Row("repeats", 1.5, repeat),
    ],
    "second": [Row("quick", 5, lambda budget: {"value": 2})],
    "poisoned": [Row("fails", 5, fail), Row("quick", 5, lambda budget: {"pid": os.getpid()})],
    "broken": None,
}

if __name__ == "__main__":
    options = group_parser(__doc__).parse_args()
    if ROWS[options.group] is None:
        raise SystemExit("an import has failed")
    serve(
        options, lambda: ROWS[options.group], is_fatal=lambda error: options.group == "poisoned",
    )  # fmt: skip
