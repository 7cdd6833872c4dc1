"""The commands as data, from the same declarations that ``--help`` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import typer


@dataclass(frozen=True, slots=True)
class Parameter:
    """An option or an argument, as it is typed."""

    spelling: str
    help: str
    default: str
    environment: str


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its words, usage, text and parameters."""

    name: str
    usage: str
    help: str
    epilog: str
    options: list[Parameter]
    arguments: list[Parameter]


def commands(app: typer.Typer) -> Iterator[Command]:
    """Every command of an app that does something, depth first in the order of ``--help``."""
    yield from _walk(typer.main.get_command(app), "ipsecq")


def _walk(command: Any, name: str) -> Iterator[Command]:
    children = getattr(command, "commands", None)
    if children is not None:
        for child, below in children.items():
            if not below.hidden:
                yield from _walk(below, f"{name} {child}")
        return
    options, arguments = [], []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        if parameter.param_type_name == "argument":
            arguments.append(_parameter(parameter, _metavar(parameter)))
        elif parameter.name != "help":
            flag = "" if parameter.is_flag else f" {_metavar(parameter)}"
            arrangement = sorted([*parameter.opts, *parameter.secondary_opts], key=len)
            options.append(_parameter(parameter, ", ".join(arrangement) + flag))
    usage = [name, *(["[OPTIONS]"] if options else []), *(each.spelling for each in arguments)]
    if command.context_settings.get("allow_extra_args"):
        usage.append("-- PROGRAM [ARGUMENTS]...")
    help_ = " ".join((command.help or "").split())
    yield Command(name, " ".join(usage), help_, command.epilog or "", options, arguments)


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _parameter(parameter: Any, spelling: str) -> Parameter:
    default = parameter.default
    shown = "" if default is None or default is False or callable(default) or default in ("", ()) else str(default)
    environment = parameter.envvar if isinstance(parameter.envvar, str) else ""
    return Parameter(spelling, " ".join((parameter.help or "").split()), shown, environment)
