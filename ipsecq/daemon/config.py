"""The configuration file: TOML, checked key by key, every error with its place.

The keys, what they accept and what they mean are in ``options``.
"""

from __future__ import annotations

import json
import os
import re
import socket
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

from ipsecq.daemon.options import (
    ARRAYS,
    MARK_SOCKETS,
    SECTIONS,
    DaemonConfig,
    InterfaceConfig,
    LogConfig,
    MetricsConfig,
    NftablesConfig,
    OffloadConfig,
)
from ipsecq.daemon.textfile import read_text
from ipsecq.errors import ConfigError, SysctlError
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.policy.interface import Interface
from ipsecq.sysctl import VARIABLES, Sysctl, no_variable

DEFAULT_PATH: Final = Path("/etc/ipsecq/ipsecq.toml")
CREDENTIAL: Final = "credential:"
_DEVICE: Final = r"[A-Za-z0-9_.-]{1,15}"


@dataclass(slots=True, frozen=True)
class Config:
    """A whole file, checked.  ``path`` is where it was read, ``sysctl`` holds ``[sysctl]`` by full name."""

    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    nftables: NftablesConfig = field(default_factory=NftablesConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sysctl: dict[str, int] = field(default_factory=dict)
    interface: tuple[InterfaceConfig, ...] = ()
    path: Path = DEFAULT_PATH

    @property
    def workers(self) -> int:
        """The number of workers, 0 resolved to the processors that this process may use."""
        return self.daemon.workers or len(os.sched_getaffinity(0))

    @property
    def policy_files(self) -> list[Path]:
        """``daemon.policy`` as paths."""
        return [self._resolve(name) for name in self.daemon.policy]

    @property
    def state_dir(self) -> Path:
        """``daemon.state_dir`` as a path."""
        return self.path.parent / self.daemon.state_dir

    @property
    def run_dir(self) -> Path:
        """``daemon.run_dir`` as a path."""
        return self.path.parent / self.daemon.run_dir

    @property
    def control_socket(self) -> Path:
        """Where ``ipsecq status`` and its fellows find the daemon."""
        return self.run_dir / "control"

    @property
    def tap_socket(self) -> Path:
        """Where ``ipsecq tap`` finds the daemon."""
        return self.run_dir / "tap"

    @property
    def pfkey_socket(self) -> Path:
        """Where PF_KEY clients find the daemon."""
        return self.run_dir / "pfkey"

    @property
    def sockets_socket(self) -> Path:
        """Where programs ask for policies of their sockets."""
        return self.run_dir / "sockets"

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """(host, port) of ``metrics.listen``, or None."""
        return _address(self.metrics.listen) if self.metrics.listen else None

    @property
    def interfaces(self) -> tuple[Interface, ...]:
        """The route-based tunnels."""
        return tuple(
            Interface(each.name, _packed(each.local), _packed(each.remote), each.reqid, each.mtu)
            for each in self.interface
        )

    def netfilter(self) -> NetfilterSettings:
        """What the ruleset compiler needs to know."""
        table = self.nftables
        return NetfilterSettings(
            table=table.table,
            queue_base=self.daemon.queue_base,
            workers=self.workers,
            lanes=self.daemon.lanes,
            mark_mask=table.mark_done | table.mark_stolen,
            mark_done=table.mark_done,
            mark_stolen=table.mark_stolen,
            mark_sockets=table.mark_sockets,
            enc_device=table.enc_device,
            natt_ports=table.natt_ports,
            queue_bypass=table.queue_bypass,
            loopback=table.loopback,
            neighbour_discovery=table.neighbour_discovery,
            inner_dir=str(self._resolve(table.inner_dir)) if table.inner_dir else "",
            reqid_mark=table.reqid_mark,
            interfaces=tuple(each.name for each in self.interface),
        )

    def _resolve(self, name: str) -> Path:
        if name.startswith(CREDENTIAL):
            return Path(os.environ.get("CREDENTIALS_DIRECTORY", "/run/credentials")) / name.removeprefix(CREDENTIAL)
        return self.path.parent / name


def load(path: Path) -> Config:
    """Read and check a file.  Raises :class:`ConfigError` with the place of the first mistake."""
    return parse(read_text(path), path.absolute())


def parse(text: str, path: Path = DEFAULT_PATH) -> Config:
    """Check the text of a file; ``path`` is for messages and relative names."""
    try:
        document = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and int()'s own about thousands of digits
        place = re.search(r"^(.*) \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error))
        lines = text.count("\n") + 1
        message, line, column = (place[1], place[2] or lines, place[3] or 1) if place else (str(error), 0, 0)
        raise ConfigError(message, file=str(path), line=int(line), column=int(column)) from None
    checker = _Checker(text, str(path))
    sections: dict[str, Any] = {}
    for name, value in document.items():
        if name == "sysctl":
            sections[name] = checker.sysctl(value)
        elif name in SECTIONS:
            sections[name] = checker.section((name,), SECTIONS[name], value)
        elif name in ARRAYS:
            sections[name] = checker.array(name, ARRAYS[name], value)
        else:
            known = [*(f"[{section}]" for section in (*SECTIONS, "sysctl")), *(f"[[{array}]]" for array in ARRAYS)]
            expected = ", ".join(known)
            raise checker.error((name,), f"unknown table or key {name!r}; expected {expected}")
    config = Config(**sections, path=path)
    checker.whole(config)
    return config


class _Checker:
    """Values of a document against the dataclasses, with the places of the keys in its text."""

    def __init__(self, text: str, file: str) -> None:
        self._file = file
        self._places = dict(_scan(text))

    def error(self, key: tuple[str, ...], message: str, *, value: bool = False) -> ConfigError:
        """ConfigError at a key, or at its value."""
        line, column, value_column = self._places.get(key, (0, 0, 0))
        return ConfigError(message, file=self._file, line=line, column=value_column if value else column)

    def array(self, name: str, cls: type[Any], tables: object) -> tuple[Any, ...]:
        """Tables that may come more than once; a key whose default means nothing has to be there."""
        if not isinstance(tables, list):
            raise self.error((name,), f"expected tables [[{name}]]")
        made = []
        for number, table in enumerate(tables):
            made.append(self.section((name, str(number)), cls, table))
            for each in fields(cls):
                if not each.default and each.name not in table:
                    raise self.error((name, str(number)), f"[[{name}]] needs {each.name}")
        return tuple(made)

    def section(self, place: tuple[str, ...], cls: type[Any], table: object) -> Any:
        """One table as its dataclass."""
        name = place[0] if len(place) == 1 else f"[{place[0]}]"
        if not isinstance(table, dict):
            raise self.error(place, f"expected a table [{name}]")
        hints = get_type_hints(cls)
        known = {each.name: each for each in fields(cls)}
        checked: dict[str, Any] = {}
        for key, value in table.items():
            if key not in known:
                raise self.error((*place, key), f"unknown key {key!r} in [{name}]; expected {', '.join(known)}")
            checked[key] = self._value((*place, key), hints[key], known[key].metadata, value)
        return cls(**checked)

    def _value(self, key: tuple[str, ...], hint: Any, metadata: Any, value: object) -> object:
        if hint is bool:
            expected, good = "true or false", isinstance(value, bool)
        elif hint is int:
            low, high = metadata["within"]
            expected, good = f"a number from {low} to {high}", type(value) is int and low <= value <= high
        elif hint is str:
            among = metadata.get("among")
            expected = " or ".join(f'"{choice}"' for choice in among) if among else "a string"
            good = isinstance(value, str) and "\0" not in value and (not among or value in among)
        else:
            ports = hint == tuple[int, ...]
            expected = "a list of port numbers, at least one" if ports else "a list of strings"
            good = isinstance(value, list) and bool(value or not ports) and all(
                type(each) is int and 0 < each < 65536 if ports else isinstance(each, str) and "\0" not in each
                for each in value
            )
            value = tuple(value) if good and isinstance(value, list) else value
        if not good:
            raise self.error(key, f"{key[-1]}: expected {expected}, found {_toml(value)}", value=True)
        return value

    def sysctl(self, table: object) -> dict[str, int]:
        """``[sysctl]``: quoted or dotted names of variables, and integers."""
        if not isinstance(table, dict):
            raise self.error(("sysctl",), "expected a table [sysctl]")
        values: dict[str, int] = {}
        where: dict[str, tuple[str, ...]] = {}
        scratch = Sysctl()
        for path, value in _leaves(table, ("sysctl",)):
            name = ".".join(path[1:])
            if name not in VARIABLES:
                raise self.error(path, f"{no_variable(name)}; see ipsecq sysctl -a")
            if type(value) is not int:
                raise self.error(path, f"{name}: expected an integer, found {_toml(value)}", value=True)
            try:
                scratch.set(name, value)
            except SysctlError as error:
                raise self.error(path, str(error), value=True) from None
            values[name] = value
            where[name] = path
        try:
            scratch.check(values)
        except SysctlError as error:
            last = [path for name, path in where.items() if name in str(error)][-1]
            raise self.error(last, str(error), value=True) from None
        return values

    def whole(self, config: Config) -> None:
        """What concerns more than one key, or part of what its type allows."""
        for key in ("state_dir", "run_dir"):
            if not getattr(config.daemon, key):
                # It would be the directory of this file.
                raise self.error(("daemon", key), f'{key}: expected a directory, found ""', value=True)
        if {"", CREDENTIAL} & set(config.daemon.policy):
            raise self.error(("daemon", "policy"), "policy: expected file names, found an empty one", value=True)
        marks = (config.nftables.mark_done, config.nftables.mark_stolen)
        if any(mark & (mark - 1) for mark in marks) or marks[0] == marks[1]:
            raise self.error(("nftables", "mark_stolen"), "mark_done, mark_stolen: expected two different single bits")
        field = config.nftables.reqid_mark
        if field & (marks[0] | marks[1]) or field & (field + (field & -field)):
            raise self.error(
                ("nftables", "reqid_mark"), "reqid_mark: expected adjacent bits, clear of mark_done and mark_stolen",
                value=True,
            )  # fmt: skip
        sockets = config.nftables.mark_sockets
        if sockets != MARK_SOCKETS and sockets & (marks[0] | marks[1] | field):
            message = "mark_sockets: shares bits with mark_done, mark_stolen or reqid_mark"
            raise self.error(("nftables", "mark_sockets"), message)
        queues = config.workers * (config.daemon.lanes + config.offload.gso)
        if config.daemon.queue_base + queues > 65536:
            raise self.error(("daemon", "queue_base"), f"{queues} queues from here on pass 65535", value=True)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,31}", config.nftables.table):
            raise self.error(("nftables", "table"), "table: expected a name of letters, digits and _", value=True)
        self._interfaces(config)
        if not re.fullmatch(_DEVICE, config.nftables.enc_device):
            raise self.error(("nftables", "enc_device"), "enc_device: expected a device name (1 to 15)", value=True)
        if config.metrics.listen:
            try:
                _address(config.metrics.listen)
            except ValueError:
                message = f'listen: expected "address:port" or "[address]:port", found "{config.metrics.listen}"'
                raise self.error(("metrics", "listen"), message, value=True) from None


    def _interfaces(self, config: Config) -> None:
        names: set[str] = {config.nftables.enc_device, "lo", "all", "default"}
        reqids: set[int] = set()
        for number, each in enumerate(config.interface):
            place = "interface", str(number)
            if not re.fullmatch(_DEVICE, each.name) or each.name in names:
                raise self.error((*place, "name"), "name: expected a device name (1 to 15) of its own", value=True)
            if each.reqid in reqids:
                raise self.error((*place, "reqid"), f"reqid: {each.reqid} is that of another interface", value=True)
            names.add(each.name)
            reqids.add(each.reqid)
            ends = []
            for key in ("local", "remote"):
                try:
                    ends.append(_packed(getattr(each, key)))
                except ValueError:
                    message = f'{key}: expected an IPv4 or IPv6 address, found "{getattr(each, key)}"'
                    raise self.error((*place, key), message, value=True) from None
            if len(ends[0]) != len(ends[1]) or ends[0] == ends[1]:
                raise self.error(
                    (*place, "remote"), "remote: expected another address, of the same family as local", value=True
                )


def _packed(text: str) -> bytes:
    """A numeric address of either family; ValueError."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except OSError:
        raise ValueError(text) from None


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(text)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(text)
    return host, int(port)


def _leaves(table: dict[str, object], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], object]]:
    """(path, value) of everything below a table: dotted keys make tables of tables."""
    found: list[tuple[tuple[str, ...], object]] = []
    for key, value in table.items():
        found += _leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
    return found


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # A message is one line, whatever the value.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


_PART: Final = r"""(?:"[^"\n]*"|'[^'\n]*'|[A-Za-z0-9_-]+)"""
_KEY: Final = rf"({_PART}(?:\s*\.\s*{_PART})*)"
_LINE: Final = re.compile(rf"\s*(?:\[\s*{_KEY}\s*\]|{_KEY}\s*=\s*|\[\[\s*{_KEY}\s*\]\])")


def _scan(text: str) -> list[tuple[tuple[str, ...], tuple[int, int, int]]]:
    """Places of keys: (path, (line, column, column of the value)); tomllib gives none.

    Line by line: enough for a text that is known to be TOML, except that a line within a multi-line string
    that looks like a key is taken for one.  A path that is met again keeps its first place.
    """
    places: dict[tuple[str, ...], tuple[int, int, int]] = {}
    table: tuple[str, ...] = ()
    counts: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = _LINE.match(line)
        if not match:
            continue
        group = 1 if match[1] else 2 if match[2] else 3
        path = tuple(part.strip("\"'") for part in re.findall(_PART, match[group]))
        column = match.start(group) + 1
        if group == 3:  # one more of its name
            counts[path] = counts.get(path, -1) + 1
            path = table = (*path, str(counts[path]))
        elif group == 1:
            table = path
        else:
            path = (*table, *path)
        for depth in range(1, len(path) + 1):
            places.setdefault(path[:depth], (number, column, match.end() + 1))
    return list(places.items())
