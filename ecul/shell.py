"""How a program of commands is made and run: `ecul --help` and `ecul COMMAND --help`."""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import methodcaller
from typing import Any

import ecul
from ecul.common.names import printable

arg = partial(methodcaller, "add_argument")  # an argument of a command, as argparse takes it
PURPOSE = (
    "Find the same person in visible and in infrared images, trained without labels. It takes two piles of "
    "images, one visible and one infrared, of people who were cut out, and gives a model that searches one "
    "by the other. For a first look, ecul demo trains and evaluates on rendered images in minutes."
)
MORE = "ecul COMMAND --help shows the arguments of a command; README has examples of each."
COMMANDS: dict[str, tuple[Callable, str, tuple[methodcaller, ...]]] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors meant for people are one line, without a traceback."""
    _prepare_streams()
    args = parser().parse_args(argv)
    try:
        if vars(args).get("model", True) in (None, []):
            raise ValueError("--model is missing: a run directory, a saved model, or a model.safetensors")
        from ecul.common.logs import logging_to_stderr

        with logging_to_stderr():
            code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader closed the output, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as e:
        if args.traceback:
            raise
        missing = isinstance(e, ModuleNotFoundError) and e.name
        told = f"needs {missing}: pip install {missing}" if missing else str(e) or type(e).__name__
        _tell(f"ecul {args.command}: {told}")
        return 2
    except KeyboardInterrupt:
        hint = "; --resume goes on after the last finished epoch" if args.command == "train" else ""
        _tell(f"ecul {args.command}: interrupted{hint}")
        return 130


def _prepare_streams() -> None:
    """Let no answer be an error in print: a closed stream takes it, a narrow encoding escapes it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _tell(text: str) -> None:
    with suppress(OSError):  # stderr may be full
        print(printable(text, "\n"), file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line, with all commands that `command` registered."""
    whole = argparse.ArgumentParser(prog="ecul", description=PURPOSE, epilog=MORE)
    whole.add_argument("--version", action="version", version=ecul.__version__)
    whole.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, told, arguments) in COMMANDS.items():
        added = commands.add_parser(name, help=told, description=told)
        added.set_defaults(run=function)
        for add_to in arguments:
            add_to(added)
    return whole


def command(told: str, *arguments: methodcaller) -> Callable[[Callable], Callable]:
    """Register the function as a command. Its help is an argument because -OO strips docstrings."""

    def add(function: Callable) -> Callable:
        COMMANDS[function.__name__.rstrip("_")] = function, told, arguments
        return function

    return add


def pair(text: str) -> tuple[str, Any]:
    """The name and the value of "NAME=VALUE": none, true, false or JSON, else the text."""
    name, sign, given = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    words: dict[str, Any] = {"none": None, "true": True, "false": False}
    value: Any = given
    with suppress(json.JSONDecodeError):
        value = words[given.lower()] if given.lower() in words else json.loads(given)
    return name.replace("-", "_"), value


def numbers(text: str) -> list[int]:
    """The whole numbers of "1-3,7": ranges and single ones."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(first) > int(last or first):
            raise argparse.ArgumentTypeError(f"expected ranges like 1-10, the smaller first, got {text!r}")
        found += range(int(first), int(last or first) + 1)
    return found
