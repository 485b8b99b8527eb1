"""Groups of measurements: each group in a separate process, each row with a time limit, saved after every row.

One process without slow imports starts the others. It watches their rows, stops those that hang, and writes all results
after every row. A row that fails, hangs or kills its process loses only its own number.

The process of a group is a module that calls `serve`. It writes its events as lines of JSON to a file:

    {"group": "loss", "event": "rows", "names": [...]}           the rows that it will measure
    {"group": "loss", "event": "start", "row": "ours", "limit": 20.0}
    {"group": "loss", "event": "end", "row": "ours", "rows": [{...}]}
"""

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

POLL = 0.05  # seconds between two reads of a group's events
GRACE = 5.0  # seconds for a row to stop after its time is over, and for a group to end
STARTUP = 120.0  # seconds that a group's imports may take
MIN_SECONDS = 1.0  # with less time left, no row is started

EVENTS, LOG, JSON, MARKDOWN = "events.jsonl", "log.txt", "results.json", "results.md"


class NotMeasured(Exception):
    """A row has no number; the message says why."""


# ---------------------------------------------------------------------------------------------- the process of a group


class Budget:
    """The remaining time of a row. Repeats stop when it is over; the finished ones count."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def repeats(self, number: int) -> Iterator[int]:
        """Yields 0 to `number - 1`; fewer if no other repeat fits the time, but at least one."""
        longest = 0.0
        for i in range(number):
            if i and self.left < longest:
                return
            begin = time.monotonic()
            yield i
            longest = max(longest, time.monotonic() - begin)


class Row(NamedTuple):
    name: str
    limit: float  # seconds
    # One row of numbers, or several rows with their own names.
    measure: Callable[[Budget], Mapping[str, Any] | Sequence[Mapping[str, Any]]]


def serve(
    options: argparse.Namespace,
    make_rows: Callable[[], Iterable[Row]],
    *,
    clean_up: Callable[[], Any] = lambda: None,
    is_fatal: Callable[[Exception], bool] = lambda error: False,
) -> None:
    """Measures the rows of a group, after a line with its seconds arrives on standard input.

    Args:
        options: the result of `group_parser`.
        make_rows (`Callable`): creates the rows; its time counts as the group's time.
        clean_up (`Callable`): called after each row.
        is_fatal (`Callable`): true for errors after which this process cannot measure any other row.
    """

    def say(event: str, **more: Any) -> None:
        with open(options.events, "a", encoding="utf-8") as file:
            file.write(json.dumps({"group": options.group, "event": event, **more}) + "\n")

    line = sys.stdin.readline()
    if not line:
        return  # the group is not needed any more
    whole = Budget(float(line))
    try:
        rows = [row for row in make_rows() if row.name not in options.skip]
    except Exception as error:  # noqa: BLE001 - one group must not stop the others
        traceback.print_exc()
        rows = [Row("all rows", MIN_SECONDS, lambda budget, error=error: _raise(error))]
    say("rows", names=[row.name for row in rows])
    for row in rows:
        limit = min(row.limit * options.patience, whole.left)
        if limit < MIN_SECONDS:
            say("end", row=row.name, rows=[{"error": "no time left"}])
            continue
        print(f"--- {options.group}: {row.name}", file=sys.stderr, flush=True)
        say("start", row=row.name, limit=limit)
        faulthandler.dump_traceback_later(limit + GRACE / 2)  # where a row hangs
        begin, error = time.monotonic(), None
        try:
            found = row.measure(Budget(limit))
            found = [found] if isinstance(found, Mapping) else found
        except NotMeasured as reason:
            found = [{"error": str(reason)}]
        except Exception as failure:  # noqa: BLE001 - the other rows continue
            traceback.print_exc()
            error, found = failure, [{"error": _first_line(failure)}]
        faulthandler.cancel_dump_traceback_later()
        took = time.monotonic() - begin
        say("end", row=row.name, rows=[{**cells, "took": took} for cells in found])
        if error is not None and is_fatal(error):
            os._exit(1)
        del error
        clean_up()


def group_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of the options of a group's process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group")
    parser.add_argument("--events", type=Path, required=True, help="file for the events")
    parser.add_argument(
        "--skip", action="append", default=[], help="a row that another process has measured, or died of"
    )
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the limits of all rows")
    return parser


def _raise(error: Exception) -> Any:
    raise error


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]


# ------------------------------------------------------------------------------------------------------------- results


class Results:
    """Rows by group. They are saved in a folder as JSON and as Markdown; both files are rewritten after every row.

    Rows of an existing folder stay until a row of the same name replaces them.

    Args:
        folder (`Path`): created if it is missing.
        titles (mapping of `str` to `str`): titles of the groups, in their order.
        to_cells (`Callable`): gives the cells of a row as text, by column.
    """

    def __init__(
        self, folder: Path, titles: Mapping[str, str], to_cells: Callable[[Mapping[str, Any]], Mapping[str, str]]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.titles, self._to_cells = folder, titles, to_cells
        path = folder / JSON
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.notes: dict[str, Any] = found.get("notes", {})  # such as the machine
        self.rows: dict[str, dict[str, dict[str, Any]]] = {
            group: {row["row"]: row for row in rows} for group, rows in found.get("groups", {}).items()
        }

    def add(self, group: str, row: Mapping[str, Any]) -> None:
        self.rows.setdefault(group, {})[row["row"]] = dict(row)
        self.write()

    def note(self, **notes: Any) -> None:
        self.notes.update(notes)
        self.write()

    def write(self) -> None:
        groups = {group: list(rows.values()) for group, rows in self.rows.items()}
        _replace(self.folder / JSON, json.dumps({"notes": self.notes, "groups": groups}, indent=1) + "\n")
        _replace(self.folder / MARKDOWN, self.markdown())

    def markdown(self) -> str:
        """One table per group, without empty columns."""
        parts = [f"{name}: {value}\n" for name, value in self.notes.items()]
        for group in [*self.titles, *(group for group in self.rows if group not in self.titles)]:
            if rows := [self._to_cells(row) for row in self.rows.get(group, {}).values()]:
                names = [name for name in rows[0] if any(row[name] for row in rows)]
                lines = [names, ["---", *["---:"] * (len(names) - 1)], *([row[name] for name in names] for row in rows)]
                table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
                parts.append(f"**{self.titles.get(group, group)}**\n\n{table}\n")
        return "\n".join(parts)


def _replace(path: Path, text: str) -> None:
    """Writes a file by renaming, so that it is whole at any time."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


# --------------------------------------------------------------------------------------------- the process that watches


class Group(NamedTuple):
    name: str
    limit: float  # seconds from its first row on, without its imports
    command: Sequence[str]  # starts its process; the name, `--events=FILE` and any number of `--skip=ROW` follow


class _Child:
    """The process of a group. It imports at once, and measures when it receives its seconds."""

    def __init__(self, group: Group, folder: Path, skip: Iterable[str] = ()) -> None:
        self.name, self._events, self._position = group.name, folder / EVENTS, 0
        arguments = [*group.command, group.name, f"--events={self._events}", *(f"--skip={name}" for name in skip)]
        with open(folder / LOG, "a", encoding="utf-8") as log:
            # A separate process group, so that its children end with it. A separate session could outlive this process.
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, process_group=0
            )

    def go(self, seconds: float) -> None:
        self._position = self._events.stat().st_size if self._events.exists() else 0
        with contextlib.suppress(BrokenPipeError):
            print(seconds, file=self.process.stdin, flush=True)

    def said(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        if not self._events.exists():
            return []
        with open(self._events, "rb") as file:
            file.seek(self._position)
            lines = file.read().rpartition(b"\n")[0]
        self._position += len(lines) + bool(lines)
        return [event for event in map(json.loads, lines.splitlines()) if event["group"] == self.name]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class _GroupRun:
    """The results of the rows of a group, from one or several processes."""

    def __init__(self, group: Group, results: Results, whole: Budget, grace: float) -> None:
        self.group, self.results, self.whole, self.grace = group, results, whole, grace
        self.names: list[str] | None = None  # None until the first process has sent them
        self.ended: list[str] = []
        self._clock: Budget | None = None

    @property
    def left(self) -> float:
        return min(self.whole.left, self.group.limit if self._clock is None else self._clock.left)

    @property
    def missing(self) -> list[str]:
        return [name for name in self.names or ["all rows"] if name not in self.ended]

    def end(self, row: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.ended.append(row)
        for cells in rows:
            self.results.add(self.group.name, {"row": row, **cells})

    def watch(self, child: _Child) -> None:
        """Reads the events of a process until it ends or is stopped. A row that it leaves unfinished has failed."""
        child.go(self.left)
        startup, before = Budget(min(STARTUP, self.left)), len(self.ended)
        row, limit, reason, is_heard = None, None, "", False
        while not reason:
            is_over = child.process.poll() is not None  # checked before its last events are read
            for event in child.said():
                if event["event"] == "rows":
                    is_heard, self.names = True, self.names or event["names"]
                    self._clock = self._clock or Budget(self.left)
                elif event["event"] == "start":
                    row, limit = event["row"], Budget(event["limit"] + self.grace)
                else:
                    row, limit = None, None
                    self.end(event["row"], event["rows"])
            if self.names and not self.missing:
                reason = "done"  # a process with a device needs seconds to end by itself
            elif is_over:
                reason = f"its process ended with code {child.process.returncode}; see {LOG}"
            elif self.whole.left < 0:
                reason = "no time left"
            elif limit is not None and limit.left < 0:
                reason = f"no answer within {limit.seconds:.0f} s; see {LOG}"
            elif not is_heard and startup.left < 0:
                reason = f"not started within {startup.seconds:.0f} s; see {LOG}"
            else:
                time.sleep(POLL)
        child.kill()
        self.names = self.names or self.missing
        if self.missing and (row is not None or len(self.ended) == before):
            failed = row or self.missing[0]
            self.end(failed, [{"error": reason}])


def run_groups(groups: Sequence[Group], results: Results, budget: float, *, grace: float = GRACE) -> None:
    """Measures all groups one after the other within `budget` seconds. The next group imports meanwhile.

    Args:
        groups: the groups, the most important first.
        results ([`Results`]): receives the rows.
        budget (`float`): seconds for all groups.
        grace (`float`): seconds that a row may exceed its limit before its process is stopped.
    """
    whole, children = Budget(budget), {}
    try:
        for i, group in enumerate(groups):
            run = _GroupRun(group, results, whole, grace)
            while run.missing and run.left > MIN_SECONDS:
                child = children.pop(group.name, None) or _Child(group, results.folder, run.ended)
                children[group.name] = child
                for following in groups[i + 1 : i + 2]:
                    if following.name not in children:
                        children[following.name] = _Child(following, results.folder)
                run.watch(child)
                del children[group.name]
            for name in run.missing:
                run.end(name, [{"error": "no time left"}])
    finally:
        for child in children.values():
            child.kill()
