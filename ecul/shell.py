"""How a program of commands is made and run: `ecul --help` and `ecul COMMAND --help`."""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import ecul
from ecul.common.logs import logging_to_stderr
from ecul.common.names import printable

arg = partial(methodcaller, "add_argument")  # an argument of a command, told as argparse takes it
PURPOSE = """\
Find the same person in photographs and in infrared images, trained without any labels: two piles of images of
people who were cut out, one visible and one infrared, give a model that searches one by the other."""
EXAMPLES = """\
for a first look:
  ecul demo                                              rendered images, trained and evaluated in minutes
with images of one's own, in photos/visible and photos/infrared:
  ecul train folders photos --preset demo -o runs/mine   a small model; ecul report runs/mine shows what came
  ecul search runs/mine --query photos/infrared --query-modality infrared \\
      --gallery photos/visible --gallery-modality visible
with a published data set:
  ecul check sysu DATA                                   is it complete?
  ecul train sysu DATA --set weights=resnet50.pth -o runs/sysu
  ecul evaluate sysu DATA --model runs/sysu

ecul COMMAND --help tells what a command takes."""
PATHS = ("visible", "infrared", "pack", "weights")  # a folder may be called 2026
COMMANDS: dict[str, tuple[Callable, str, tuple[methodcaller, ...]]] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors meant for people are one line, without a traceback."""
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8
    try:
        with logging_to_stderr():
            code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as e:
        if args.traceback:
            raise
        print(printable(f"ecul {args.command}: {e or type(e).__name__}", "\n"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; --resume goes on after the last finished epoch" if args.command == "train" else ""
        print(f"ecul {args.command}: interrupted{hint}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """What reads the command line: all commands that `command` has made."""
    raw = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(prog="ecul", description=PURPOSE, epilog=EXAMPLES, formatter_class=raw)
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
    """Make the function below a command with this help, which `python -OO` keeps, and these arguments."""

    def add(function: Callable) -> Callable:
        COMMANDS[function.__name__.rstrip("_")] = function, told, arguments
        return function

    return add


def pair(text: str) -> tuple[str, Any]:
    """The name and the value of "NAME=VALUE": JSON, none, or as it stands."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    name = name.replace("-", "_")
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        found = {"none": None, "true": True, "false": False}.get(value.lower(), value)
    number = isinstance(found, int | float) and not isinstance(found, bool)
    return name, value if number and name in PATHS else found


def numbers(text: str) -> list[int]:
    """The whole numbers of "1-3,7": ranges and single ones."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise argparse.ArgumentTypeError(f"expected numbers like 1-10 or 1,3,5, got {text!r}")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"expected numbers like 1-10, the smaller first, got {text!r}")
    return found
