"""Findings: what a check says about a run, in one line, with one remedy."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.text import Text

from hf_distill.metrics import as_json
from hf_distill.report import Part, Shown

OK, WARNING, FAILURE, LEFT_OUT = "ok", "warning", "failure", "left out"
STYLES = {OK: "green", WARNING: "yellow", FAILURE: "bold red", LEFT_OUT: "dim"}


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Args:
        status (`str`): "ok", "warning" (the run would waste something), "failure" (it could not work) or "left out".
        line (`str`): what was found, or why nothing can be said.
        remedy (`str`): what to do; empty where there is nothing to do.
        numbers: what was measured, by name.
        check (`str`), seconds (`float`): the name of the check, and its time with what it computed for later ones;
            `diagnose` fills them in.
    """

    status: str
    line: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    check: str = ""
    seconds: float = 0.0


class LeftOut(Exception):
    """Raised by a check that can say nothing about a run; the message is the reason."""


def ok(line: str, **numbers: Any) -> Finding:
    """Nothing to do."""
    return Finding(OK, line, "", numbers)


def warning(line: str, remedy: str, **numbers: Any) -> Finding:
    """Something that wastes the run, or a part of it."""
    return Finding(WARNING, line, remedy, numbers)


def failure(line: str, remedy: str, **numbers: Any) -> Finding:
    """Something that the run cannot work with."""
    return Finding(FAILURE, line, remedy, numbers)


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """All findings about a run, in the order of the checks. They show themselves as a table.

    Args:
        findings: one for each check.
        num_rows (`int`): training rows of the probe.
        seconds (`float`): the time that the checks took.
    """

    findings: tuple[Finding, ...]
    num_rows: int
    seconds: float

    def with_status(self, status: str) -> Iterator[Finding]:
        """The findings of one status."""
        return (finding for finding in self.findings if finding.status == status)

    @property
    def fails(self) -> bool:
        """True if the run could not work."""
        return any(self.with_status(FAILURE))

    def __getitem__(self, check: str) -> Finding:
        return next(finding for finding in self.findings if finding.check == check)

    def to_dict(self) -> dict[str, Any]:
        """As nested dicts of plain numbers and texts; numbers that are not finite are texts."""
        return _plain(asdict(self))

    def shown(self) -> list[Part]:
        """The findings; what was left out comes last, in one line each; and how many there are of each status."""

        def row(found: Finding) -> dict[str, Any]:
            remedy = ("\n", ("do:", "bold"), f" {found.remedy}") if found.remedy else ()
            status = Text(found.status, STYLES[found.status])
            return {"check": found.check, "": status, "finding": Text.assemble(found.line, *remedy)}

        rows = [row(finding) for finding in self.findings if finding.status != LEFT_OUT]
        left_out = [Text(f"left out: {each.check}: {each.line}", "dim") for each in self.with_status(LEFT_OUT)]
        counts = {status: len(list(self.with_status(status))) for status in STYLES}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return [(rows, None), *left_out, f"{said}; {self.num_rows} rows, {self.seconds:.0f} s"]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    value = as_json(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
