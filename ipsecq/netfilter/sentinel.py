"""The second line of defence: tables that a foreign ``nft flush ruleset`` cannot take away.

Our main tables have no owner, so they outlive a killed daemon and block; but anybody with CAP_NET_ADMIN may flush
them, and a distribution's own ``systemctl reload nftables`` does.  The sentinel's tables carry ``flags owner`` (kernel
5.12): only the netlink socket that made them may change them, and they go when it closes, that is with this process.
Each covers what the other can't; only a flush while no daemon runs takes both.

The sentinel holds the same policies behind the main chains.  It queues nothing: what an outbound policy requires to be
protected and has not been replaced is dropped, so while the main tables stand it sees nothing to do.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from ipsecq.errors import NetfilterError
from ipsecq.netfilter import hooks
from ipsecq.netfilter.compile import (
    compile_guard,
    compile_unguard,
    defaults,
    guard_set,
    ports,
    worker_suffixes,
)
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.sysctl import Sysctl

_LIBRARY: Final = "libnftables.so.1"
COUNTERS: Final = ("in_clear_dropped", "in_discard_dropped", "in_default_dropped", "out_discard_dropped",
                   "out_default_dropped", "out_unguarded_dropped", "out_clear_dropped")  # fmt: skip


class Nft:
    """libnftables with a netlink socket that stays: what it makes with ``flags owner`` lives as long as this object."""

    def __init__(self) -> None:
        try:
            library: Any = ctypes.CDLL(_LIBRARY)
        except OSError:
            raise NetfilterError(f"{_LIBRARY} is not there: apt install nftables") from None
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        for function in (
            library.nft_ctx_buffer_error, library.nft_ctx_buffer_output, library.nft_ctx_get_error_buffer,
            library.nft_ctx_free,
        ):  # fmt: skip
            function.argtypes = [ctypes.c_void_p]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._library = library
        self._context: int | None = library.nft_ctx_new(0)
        self._lock = threading.Lock()
        library.nft_ctx_buffer_error(self._context)
        library.nft_ctx_buffer_output(self._context)

    def run(self, text: str) -> None:
        """One transaction; NetfilterError on one line when it is refused."""
        with self._lock:
            if self._context is None:
                raise NetfilterError("the nft context is closed")
            if self._library.nft_run_cmd_from_buffer(self._context, text.encode()):
                error: bytes = self._library.nft_ctx_get_error_buffer(self._context) or b""
                lines = [line.strip() for line in error.decode(errors="replace").splitlines() if line.strip(" ^~")]
                raise NetfilterError(f"nft refused the sentinel: {': '.join(lines[:2])[:300]}")

    def close(self) -> None:
        """Close the socket; owned tables go with it."""
        with self._lock:
            if self._context is not None:
                self._library.nft_ctx_free(self._context)
                self._context = None


class Sentinel:
    """Owner of the tables ``<table>_sentinel`` in the network namespace of the thread that makes it."""

    def __init__(self, settings: NetfilterSettings) -> None:
        self.main = settings.table
        self.settings = replace(settings, table=f"{settings.table}_sentinel")
        self._nft = Nft()
        self._loaded = False

    def load(self, commands: list[str], sysctl: Sysctl, guarded: Mapping[int, str]) -> None:
        """Replace everything.  ``commands`` are those of a new plan for the main table."""
        lines: list[str] = []
        for family in ("inet", "netdev"):
            if self._loaded:
                lines.append(f"delete table {family} {self.settings.table}")
            lines.append(f"add table {family} {self.settings.table} {{ flags owner; }}")
        # nft takes a table block without the flag for an attempt to disown the table.
        lines.append(f"table inet {self.settings.table} {{\nflags owner;\n{chr(10).join(self._skeleton())}\n}}")
        lines.append(f"add counter netdev {self.settings.table} stolen")
        lines += [*self._translated(commands), *defaults(self.settings, sysctl)]
        self._nft.run("\n".join(lines) + "\n" + compile_guard(guarded, self.settings))
        self._loaded = True

    def update(self, commands: list[str], sysctl: Sysctl) -> None:
        """Follow an update of the main table; call it after that one, so that it never drops what is served already."""
        self._nft.run("\n".join([*self._translated(commands), *defaults(self.settings, sysctl)]) + "\n")

    def run(self, commands: list[str]) -> None:
        """Commands of the main table that change no knob."""
        self._nft.run("\n".join(self._translated(commands)) + "\n")

    def set_interfaces(self, names: tuple[str, ...]) -> None:
        """Follow the main table's maps."""
        self.settings = replace(self.settings, interfaces=names)
        self._nft.run(hooks.compile_interfaces(self.settings))

    def guard(self, devices: Mapping[int, str]) -> None:
        """Add devices, before the main table trusts them."""
        self._nft.run(compile_guard(devices, self.settings))

    def forget(self, devices: Mapping[int, str]) -> None:
        """Take devices away."""
        for command in compile_unguard(devices, self.settings).splitlines():
            try:
                self._nft.run(command)
            except NetfilterError:  # gone with the device already
                continue

    def close(self) -> None:
        """Take the tables away."""
        self._nft.close()

    def _translated(self, commands: list[str]) -> Iterator[str]:
        main, mine = f" inet {self.main} ", f" inet {self.settings.table} "
        # The table's name is in the first line of a command only; later lines hold keys and comments.
        return (command.replace(main, mine, 1) for command in commands)

    def _skeleton(self) -> Iterator[str]:
        settings = self.settings
        for counter in COUNTERS:
            yield f"counter {counter} {{ }}"
        yield from guard_set({})
        yield from hooks.interface_maps(settings)
        for suffix in worker_suffixes(settings):
            verdict = "accept" if settings.queue_bypass else "counter name out_clear_dropped drop"
            yield f"chain out_worker_{suffix} {{ {verdict}; }}"
            # The engine lets these pass in clear while there is no SA, and nothing on the packet tells.
            yield f"chain out_use_{suffix} {{ accept; }}"
            yield f"chain out_open_{suffix} {{ accept; }}"
        yield from hooks.policy_chains(settings, clear_open="accept")
        # Ours while the main table stands (it queued them); without it nobody takes them, which is not clear either.
        yield "chain in_ipsec { fib daddr type local accept; }"
        yield f"chain in_udp {{ udp dport {ports(settings)} fib daddr type local accept; }}"
        yield "chain in_icmp {"
        yield "  fib daddr type local jump too_big"
        yield "  jump neighbours"
        yield "}"
        yield "chain too_big {"
        yield "  icmp type 3 icmp code 4 @th,136,8 { 50, 51, 108 } accept"
        yield "  icmpv6 type 2 @th,112,8 { 50, 51, 108 } accept"
        yield "}"
        yield from hooks.neighbours(settings)
        yield "chain exempt_in {"
        yield f"  {settings.done} accept"
        yield f"  {hooks.BY_PROTOCOL}"
        yield from hooks.ours(settings)
        yield "}"
        yield "chain prerouting {"
        yield "  type filter hook prerouting priority -249; policy accept;"
        yield "  iifname vmap @entrances"
        yield from hooks.policies("in")
        yield "}"
        yield "chain replaced {"
        yield "  oif . oifname @guarded accept"
        yield "  counter name out_unguarded_dropped drop"
        yield "}"
        yield "chain postrouting {"
        yield "  type filter hook postrouting priority 160; policy accept;"
        yield (
            f"  meta mark & {settings.mark_mask:#010x} vmap "
            f"{{ {settings.mark_done:#010x} : accept, {settings.mark_stolen:#010x} : goto replaced }}"
        )
        yield "  oifname vmap @exits"
        yield "  meta l4proto icmpv6 jump neighbours"
        yield from hooks.policies("out")
        yield "}"
        yield from hooks.interface_out()
