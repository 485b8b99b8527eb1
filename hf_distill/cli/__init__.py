"""The command line, `hf-distill`: a row of `COMMANDS` for each command. Parse, then one call."""

import argparse
import difflib
import logging
import sys
from pkgutil import resolve_name
from typing import NoReturn

from hf_distill.cli.commands import COMMANDS
from hf_distill.cli.noise import without_noise


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hf-distill`."""
    argv = sys.argv[1:] if argv is None else argv
    name, words = _split(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_distill").setLevel(logging.INFO)

    with without_noise():
        _run(name, words)


def _run(name: str, words: list[str]) -> None:
    from hf_distill.cli.parsing import read_command

    try:
        arguments = read_command(name, words)
        run = resolve_name(COMMANDS[name].start)(*arguments)
    except ValueError as error:
        _stop(name, error, 2)
    if run is not None:
        from hf_distill.servers import TeacherAway

        try:
            run()
        except TeacherAway as error:
            _stop(name, error, 1)
        except KeyboardInterrupt:
            sys.exit(130)  # the trainer has said where the student is


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """The name of the command, and its own arguments; without a command, the program ends."""
    for num_words in (2, 1):
        if (name := " ".join(argv[:num_words])) in COMMANDS:
            return name, argv[num_words:]
    argv = argv or ["--help"]
    parts = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    parser = _command_parser(parts or [*COMMANDS])
    if argv[0].startswith("-") or (parts and argv[1:2] in (["--help"], ["-h"])):
        parser.parse_args(["--help"] if parts else argv[:1])
    has_second = bool(parts and argv[1:]) and not argv[1].startswith("-")
    said = " ".join(argv[: 1 + has_second])
    near = difflib.get_close_matches(said, parts or COMMANDS, n=1, cutoff=0.8 if parts else 0.6) or parts
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists them"
    parser.exit(2, f"hf-distill: error: there is no command {said!r}; {hint}\n")


def _command_parser(listed: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-distill", description="Distil causal language models.", usage="%(prog)s COMMAND [options]",
        epilog="`hf-distill COMMAND --help` shows the options of a command.",
    )  # fmt: skip
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name in listed:
        names.add_parser(name, help=COMMANDS[name].help, add_help=False)
    return parser


def _stop(name: str, error: Exception, code: int) -> NoReturn:
    print(f"hf-distill {name}: error: {error}", file=sys.stderr)
    sys.exit(code)
