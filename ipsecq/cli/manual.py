"""Manual pages, shell completion and ``docs/commands.md``, made from what the program itself goes by.

``python -m ipsecq.cli.manual man DIRECTORY`` writes ipsecq(8) and ipsecq.conf(5), ``completion DIRECTORY`` the files for
bash, zsh and fish, ``docs DIRECTORY`` the reference pages, ``default FILE`` the commented configuration.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import ipsecq
from ipsecq.cli.app import app
from ipsecq.cli.tree import Command, Parameter, commands
from ipsecq.daemon import reference

COMPLETIONS: Final = {"bash": "ipsecq", "zsh": "_ipsecq", "fish": "ipsecq.fish"}
"""Shell to file name, as the shells look for them."""

SUMMARY: Final = "IPsec for Linux gateways in user space"

_DESCRIPTION: Final = (
    "ipsecq applies IPsec (ESP, AH, IPComp) to the packets that its policies name: nftables diverts them to NFQUEUE, worker "
    "processes transform them and give them back to the kernel. SAs and policies come from files in the syntax of "
    "setkey(8), or from key management over PF_KEY. The kernel needs no IPsec of its own.",
    "It fails closed: what a policy protects does not leave in clear while the daemon starts, reloads, is stopped or has "
    "died.",
)
_EXIT: Final = (
    ("0", "Done."),
    ("1", "It failed; one line on standard error says why. Some commands give 1 a meaning of its own, see there."),
    ("2", "A mistake in a file or on the command line, with its place."),
)
_FILES: Final = (
    ("/etc/ipsecq/ipsecq.toml", "Configuration, see ipsecq.conf(5)."),
    ("/etc/ipsecq/setkey.conf", "SAs and policies. It holds keys: mode 0640, group ipsecq."),
    ("/var/lib/ipsecq", "Sequence numbers that may have been used, and blocked.nft. Never restore it from a backup."),
    ("/run/ipsecq", "Control socket, PF_KEY socket, shared table."),
)
_SEE_ALSO: Final = "ipsecq(8), ipsecq.conf(5), setkey(8), ipsec(4), nft(8), systemctl(1)"


def commands_markdown() -> str:
    """``docs/commands.md``."""
    lines = [
        "# Commands",
        "",
        "Made from the program's own declarations by `make docs`, as `ipsecq(8)` is. Every command knows `-h`.",
        "",
        "Exit status: " + " ".join(f"{status}: {meaning}" for status, meaning in _EXIT),
    ]
    for command in commands(app):
        lines += ["", f"## {command.name}", "", _code_words(command.help), "", f"    {command.usage}"]
        if command.options or command.arguments:
            lines += ["", "| | |", "|---|---|"]
            for each in (*command.arguments, *command.options):
                lines.append(f"| `{each.spelling.replace('|', chr(92) + '|')}` | {_said(each)} |")
        if command.epilog:
            lines += ["", command.epilog]
    return "\n".join(lines) + "\n"


def _said(parameter: Parameter) -> str:
    text = _code_words(parameter.help).replace("|", "\\|")
    if parameter.default:
        text += f" Default: `{parameter.default}`."
    if parameter.environment:
        text += f" Environment: `{parameter.environment}`."
    return text.strip()


def _code_words(text: str) -> str:
    return text.replace("``", "`")


def command_page() -> str:
    """ipsecq(8)."""
    lines = [*_head("IPSECQ", 8), ".SH NAME", f"ipsecq \\- {SUMMARY}", ".SH SYNOPSIS"]
    for command in commands(app):
        lines += [".br", f"\\fB{_roff(command.usage.split(' [', 1)[0])}\\fR {_roff(_rest(command))}".rstrip()]
    lines += [".SH DESCRIPTION", *_paragraphs(_DESCRIPTION), ".SH COMMANDS"]
    for command in commands(app):
        lines += [f'.SS "{_roff(command.usage)}"', _roff(command.help)]
        for each in (*command.arguments, *command.options):
            lines += [".TP", f"\\fB{_roff(each.spelling)}\\fR", _roff(_plain(each))]
        if command.epilog:
            lines += [".PP", _roff(command.epilog)]
    lines += [".SH EXIT STATUS", *_list(_EXIT), ".SH FILES", *_list(_FILES), ".SH ENVIRONMENT"]
    lines += _list((("IPSECQ_CONFIG", "The configuration file, as with --config."),))
    lines += [".SH SEE ALSO", _roff(_SEE_ALSO)]
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """ipsecq.conf(5)."""
    about = (
        "The configuration of ipsecq(8) is a TOML file, /etc/ipsecq/ipsecq.toml unless said otherwise. A mistake is refused "
        "with its line and column, and nothing changes.",
        "`ipsecq reload` takes a changed file over as a whole or not at all. It refuses a change of a key that needs a "
        "restart.",
    )
    lines = [*_head("IPSECQ.CONF", 5), ".SH NAME", "ipsecq.conf \\- configuration of ipsecq", ".SH DESCRIPTION"]
    lines += _paragraphs(about)
    for name, meaning, entries in reference.tables():
        lines += [f'.SH "[{_roff(name)}]"', _roff(meaning)]
        for entry in entries:
            lines += [".TP", f"\\fB{_roff(entry.key)}\\fR = \\fI{_roff(entry.kind)}\\fR"]
            needed = name.startswith("[") and entry.example
            ending = "Required." if needed else f"Default: {entry.default}."
            lines.append(_roff(f"{entry.meaning} {ending} {entry.note}".rstrip()))
    lines += ['.SH "[sysctl]"', _roff(reference.SYSCTL_MEANING)]
    for name, default, values, meaning in reference.sysctl_entries():
        lines += [".TP", f'\\fB"{_roff(name)}"\\fR = \\fI{_roff(values)}\\fR', _roff(f"{meaning} Default: {default}.")]
    lines += [".SH FILES", *_list(_FILES), ".SH SEE ALSO", _roff(_SEE_ALSO)]
    return "\n".join(lines) + "\n"


def _head(title: str, section: int) -> Iterator[str]:
    yield '.\\" Made by ipsecq.cli.manual: change the texts there.'
    yield f'.TH {title} {section} "" "ipsecq {ipsecq.__version__}" "ipsecq"'
    yield ".nh"
    yield ".ad l"


def _rest(command: Command) -> str:
    _, bracket, rest = command.usage.partition(" [")
    return bracket.strip() + rest


def _plain(parameter: Parameter) -> str:
    text = parameter.help
    if parameter.default:
        text += f" Default: {parameter.default}."
    if parameter.environment:
        text += f" Environment: {parameter.environment}."
    return text.strip()


def _paragraphs(texts: tuple[str, ...]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number:
            yield ".PP"
        yield _roff(text)


def _list(rows: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for term, text in rows:
        yield from (".TP", f"\\fB{_roff(term)}\\fR", _roff(text))


def _roff(text: str) -> str:
    """Text that man shows as it is: backslashes, hyphens that are typed, control characters at a line's start."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("``", "`").replace("`", "\\(ga").replace("'", "\\(aq")
    text = text.replace('"', "\\(dq")
    text = "".join(each if each.isascii() else f"\\[u{ord(each):04X}]" for each in text)
    return re.sub(r"(?m)^\.", r"\\&.", text)


def completion(shell: str) -> str:
    """What typer would print for ``ipsecq --show-completion``."""
    environment = {**os.environ, "_IPSECQ_COMPLETE": f"source_{shell}"}
    program = "from ipsecq.cli.app import app; app(prog_name='ipsecq')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip() + "\n"


PAGES: Final[dict[str, Callable[[], str]]] = {"ipsecq.8": command_page, "ipsecq.conf.5": configuration_page}
DOCS: Final[dict[str, Callable[[], str]]] = {
    "commands.md": commands_markdown,
    "configuration.md": reference.configuration_markdown,
    "sysctl.md": reference.sysctl_markdown,
}


def main(argv: list[str]) -> None:
    """Write what ``argv`` names."""
    what, place = argv
    target = Path(place)
    if what == "default":
        target.write_text(reference.default_toml(), encoding="utf-8")
        return
    target.mkdir(parents=True, exist_ok=True)
    if what == "completion":
        for shell, name in COMPLETIONS.items():
            (target / name).write_text(completion(shell), encoding="utf-8")
        return
    for name, text in {"man": PAGES, "docs": DOCS}[what].items():
        (target / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
