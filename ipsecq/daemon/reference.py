"""What the options are, in words: the commented default file and the reference, from ``options`` and ``sysctl``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from textwrap import wrap
from typing import Any, Final, get_type_hints

from ipsecq.daemon.options import ARRAYS, SECTIONS
from ipsecq.sysctl import VARIABLES

_COLUMNS: Final = 110
_SHOWN: Final = ("net.inet.ipsec.dfbit", "net.inet.ipsec.ecn", "net.inet.ipsec.def_policy")
"""The variables that gateways change most; the default file shows them."""
SYSCTL_MEANING: Final = (
    "The variables of ipsec(4) by their names, quoted. A value set by `ipsecq sysctl` holds until the next start; "
    "a reload leaves it, unless this table names the variable, or did before."
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One key for people: its kind and default are TOML's words."""

    key: str
    kind: str
    default: str
    meaning: str
    restart: bool
    example: str

    @property
    def note(self) -> str:
        """What a reload does with a change."""
        return "A change needs a restart." if self.restart else ""


def tables() -> Iterator[tuple[str, str, list[Entry]]]:
    """(name, meaning, keys) of every table but ``[sysctl]``; ``[name]`` for one that may come more than once."""
    for name, options in SECTIONS.items():
        hints = get_type_hints(options)
        yield name, _words(options), [_entry(option, hints[option.name]) for option in fields(options)]
    for name, options in ARRAYS.items():
        hints = get_type_hints(options)
        yield f"[{name}]", _words(options), [_entry(option, hints[option.name]) for option in fields(options)]


def _words(options: type[Any]) -> str:
    return " ".join((inspect.getdoc(options) or "").split())


def default_toml() -> str:
    """The commented default file."""
    lines = [
        "# ipsecq: configuration of the gateway daemon; see ipsecq.conf(5).  What is commented out shows the default.",
        "# Check a change with `ipsecq nft --config FILE`; apply it with `systemctl reload ipsecq` or `ipsecq reload`.",
        "# Where it says (restart), a reload refuses the change: `systemctl restart ipsecq`.",
    ]
    for name, meaning, entries in tables():
        if name.startswith("["):
            lines += ["", *_comment(meaning), f"# [{name}]"]
            lines += [f"# {entry.key} = {entry.example or entry.default}" for entry in entries]
            continue
        lines += ["", *_comment(meaning), f"[{name}]"]
        for number, entry in enumerate(entries):
            lines += [""] if number else []
            lines += _comment(entry.meaning + (" (restart)" if entry.restart else ""))
            if " or " in entry.kind and not entry.kind.startswith("true") and entry.kind.split('"')[1] not in entry.meaning:
                lines += _comment(entry.kind)
            lines.append(f"{entry.key} = {entry.example}" if entry.example else f"#{entry.key} = {entry.default}")
    lines += ["", *_comment(SYSCTL_MEANING + " `ipsecq sysctl -a -d` explains all."), "[sysctl]"]
    for variable in _SHOWN:
        lines += [*_comment(VARIABLES[variable].meaning), f'#"{variable}" = {VARIABLES[variable].default}']
    return "\n".join(lines) + "\n"


def configuration_markdown() -> str:
    """``docs/configuration.md``."""
    lines = [
        "# Configuration",
        "",
        "Made from the program's own table of options by `make docs`; the same text is in `ipsecq.conf(5)` and, as",
        "comments, in the default `/etc/ipsecq/ipsecq.toml`. The file is TOML. A mistake is refused with its line and",
        "column, and nothing changes.",
        "",
        "`ipsecq reload` takes a changed file over as a whole or not at all. It refuses changes of keys marked",
        "*restart*; for those: `systemctl restart ipsecq`, during which protected traffic is blocked, not let through.",
    ]
    for name, meaning, entries in tables():
        lines += ["", f"## [{name}]", "", meaning, "", "| key | value | default | meaning |", "|---|---|---|---|"]
        for entry in entries:
            note = " *Restart.*" if entry.restart else ""
            default = "required" if name.startswith("[") and entry.example else f"`{entry.default}`"
            lines.append(f"| `{entry.key}` | {_cell(entry.kind)} | {default} | {_cell(entry.meaning)}{note} |")
    lines += ["", "## [sysctl]", "", SYSCTL_MEANING, "All of them: [sysctl.md](sysctl.md). For example:", ""]
    lines += ["    [sysctl]", '    "net.inet.ipsec.dfbit" = 2', ""]
    return "\n".join(lines)


def sysctl_markdown() -> str:
    """``docs/sysctl.md``."""
    lines = [
        "# Variables of ipsec(4)",
        "",
        "Made from the program's own table by `make docs`. They have FreeBSD's names and meanings and live in the",
        "daemon, not in `/proc/sys`: read and set them with `ipsecq sysctl`, which changes all workers at once, or",
        "under `[sysctl]` in `ipsecq.toml`.",
        "A variable of `net.inet.ipsec` without a twin in `net.inet6.ipsec6` holds for both families.",
        "",
        "| variable | default | range | meaning |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{variable.name}` | {variable.default} | {_range(variable.low, variable.high)} | {_cell(variable.meaning)} |"
        for variable in VARIABLES.values()
    ]
    return "\n".join(lines) + "\n"


def sysctl_entries() -> Iterator[tuple[str, int, str, str]]:
    """(name, default, range, meaning) of every variable."""
    for variable in VARIABLES.values():
        yield variable.name, variable.default, _range(variable.low, variable.high), variable.meaning


def _entry(option: Field[Any], hint: Any) -> Entry:
    metadata = option.metadata
    shape = metadata["shape"]
    if metadata["among"]:
        quoted = [f'"{choice}"' for choice in metadata["among"]]
        kind = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
    elif hint is bool:
        kind = "true or false"
    elif "within" in metadata:
        low, high = metadata["within"]
        kind = f"{low} to {high}" if shape != "hex" else "a single bit" if low else "bits"
    else:
        kind = shape
    default = option.default
    text = f"0x{default:08x}" if shape == "hex" else _toml(default)
    return Entry(option.name, kind, text, metadata["meaning"], metadata["restart"], metadata["example"])


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _range(low: int, high: int) -> str:
    return f"{low} or more" if high == 0x7FFFFFFF else f"{low} to {high}"


def _comment(text: str) -> list[str]:
    return wrap(text, _COLUMNS, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
