"""The command line, `hf-distill`: a row of `COMMANDS` for each command. Parse, then one call."""

import argparse
import logging
import sys
from pkgutil import resolve_name
from typing import NoReturn

from hf_distill.cli.commands import COMMANDS
from hf_distill.cli.noise import without_noise


def main(argv: list[str] | None = None) -> None:
    """Entry point of `hf-distill`."""
    argv = sys.argv[1:] if argv is None else argv
    num_words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name = _command_parser().parse_args([" ".join(argv[:num_words])] if argv else []).command
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_distill").setLevel(logging.INFO)

    with without_noise():
        _run(name, argv[num_words:])


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


def _command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-distill", description="Distil causal language models.")
    names = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, command in COMMANDS.items():
        names.add_parser(name, help=command.help, add_help=False)
    return parser


def _stop(name: str, error: Exception, code: int) -> NoReturn:
    print(f"hf-distill {name}: error: {error}", file=sys.stderr)
    sys.exit(code)
