"""The command line: ``python -m tp_runtime COMMAND``.

Each command is a module with ``add_arguments`` and ``run``, imported only when it is asked for:
``doctor`` must run where the packages that the others need are missing.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError, TPRuntimeError
from ..settings import PACKAGE

# Command → its module, and what it does.
COMMANDS = {
    "plan": (
        "tp_runtime.tools.plan",
        "show each linear of a model file, and its shards; or predict ms per step",
    ),
    "models": ("tp_runtime.tools.models", "list the models that can be split"),
    "text-to-latents": (
        "tp_runtime.tools.text_to_latents",
        "sample latents without ComfyUI (Euler, flow matching, no guidance)",
    ),
    "doctor": ("tp_runtime.tools.doctor", "check this machine, and say what to do"),
    "bench": (
        "bench.step",
        "measure an evaluation, with random weights (in a checkout of the repository)",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 after a message that says what to do."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    try:
        options = _parser(command).parse_args(arguments)
        status: int | None = options.run(options)
    except TPRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: {_lacking(command, error)}", file=sys.stderr)
        return 1
    return status or 0


def check_counts(counts: Mapping[str, int]) -> None:
    """Refuse less than one of what was asked for, name → count. Raises InputError."""
    for what, count in counts.items():
        if count < 1:
            raise InputError(f"{count} {what} were asked for: give 1 or more.")


def check_size(width: int, height: int, least: int) -> None:
    """Refuse a picture with a side of less pixels than one latent stands for. Raises InputError."""
    if min(width, height) < least:
        raise InputError(f"--size is {width} x {height}: give {least} pixels or more for each.")


def _parser(command: str) -> argparse.ArgumentParser:
    """Of all commands, but with the arguments of this one only."""
    parser = argparse.ArgumentParser(
        prog="python -m tp_runtime",
        description="Models split over GPUs by tensor parallelism, without ComfyUI.",
    )
    commands: Any = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        of_command = commands.add_parser(name, help=summary)
        if name == command:
            found = importlib.import_module(module)
            found.add_arguments(of_command)
            of_command.set_defaults(run=found.run)
    return parser


def _lacking(command: str, error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package == "bench":
        return f"'{command}' runs from a checkout of the repository; {PACKAGE} is in none."
    return (
        f"'{command}' needs the package {package}, which {sys.executable} lacks. "
        "'python -m tp_runtime doctor' says what is missing, and how to install it."
    )
