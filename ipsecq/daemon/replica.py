"""A worker's copy of the SAD, the SPD and the knobs, kept by the operations that the supervisor sends.

Operations, by name (first item of the tuple) and arguments:

    sa_put SA                  add it, or put it in the place of the SA with the same destination, protocol and SPI
    sa_delete DST PROTOCOL SPI
    sa_larval DST PROTOCOL SPI     key management is about to make it: packets that come under it are kept
    sa_state DST PROTOCOL SPI STATE
    sa_withdraw DST PROTOCOL SPI   deleted after a rekey: what its peer still sends through it is taken
    spd_replace [POLICY, …]    the whole SPD at once, ids kept
    spd_put POLICY             add it, or put it in the place of the one with the same direction and selector
    spd_delete ID
    socket_put POLICY          the policies of a mark of sockets
    socket_again POLICY        one more socket has that mark
    socket_drop MARK           no socket has that mark any more
    sysctl NAME VALUE
    path_mtu DST MTU           learned by another worker
    routes_changed
    interfaces (INTERFACE, …)      the route-based tunnels; their devices are there
    acquire_failed PROTOCOL SRC DST REQID   packets that wait for such an SA need not wait longer
    tap_attach NUMBER REQUEST      a capture begins (:class:`ipsecq.daemon.taprequest.TapRequest`), and
    tap_detach NUMBER              ends
    mirror BOOL                    outbound packets are to be seen on the enc device
    until_mark N               what follows, up to ``mark N``, is in these tables already: pass over it
    mark N
    stop
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ipsecq.daemon.messages import Operation
from ipsecq.errors import DaemonError, SadError, SpdError
from ipsecq.numbers import SaState
from ipsecq.policy.interface import Interface
from ipsecq.policy.model import Policy
from ipsecq.policy.sockets import SocketPolicy
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SaKey, SecurityAssociation
from ipsecq.sa.sad import Sad
from ipsecq.sysctl import Sysctl

_TABLES = frozenset(
    {"sa_put", "sa_delete", "sa_larval", "sa_state", "sa_withdraw", "spd_replace", "spd_put", "spd_delete", "sysctl",
     "socket_put", "socket_again", "socket_drop"}
)
_USEFUL = frozenset({"sa_put", "spd_replace", "spd_put", "spd_delete", "sysctl", "socket_put"})
"""Operations after which a packet that waits may find its way."""


class Replica:
    """Tables and what to do with each operation.  Hooks are the datapath's, once it is there."""

    def __init__(self) -> None:
        self.sad = Sad()
        self.spd = Spd()
        self.sysctl = Sysctl()
        self.larval: set[tuple[bytes, int, int]] = set()
        """Keys of SAs to come."""
        self.on_path_mtu: Callable[[bytes, int], Any] = lambda dst, mtu: None
        self.on_routes_changed: Callable[[], Any] = lambda: None
        self.on_acquire_failed: Callable[[int, bytes, bytes, int], Any] = lambda protocol, src, dst, reqid: None
        self.interfaces: tuple[Interface, ...] = ()
        self.on_interfaces: Callable[[tuple[Interface, ...]], Any] = lambda interfaces: None
        self.taps: dict[int, Any] = {}
        """Captures (None: one that ended) that began before the datapath was there."""
        self.on_tap: Callable[[int, Any], Any] = self.taps.__setitem__
        self.stopping = False
        self._mark = 0
        """Operations on tables are passed over until this one comes."""
        self._operations: dict[str, Callable[..., None]] = {
            "sa_put": self._sa_put,
            "sa_larval": self._sa_larval,
            "sa_delete": self._sa_delete,
            "sa_state": self._sa_state,
            "sa_withdraw": self._sa_withdraw,
            "spd_replace": self._spd_replace,
            "spd_put": self._spd_put,
            "spd_delete": self._spd_delete,
            "socket_put": self._socket_put,
            "socket_again": self._socket_put,
            "socket_drop": self._socket_drop,
            "sysctl": self._sysctl,
            "path_mtu": self._path_mtu,
            "routes_changed": self._routes_changed,
            "interfaces": self._interfaces,
            "acquire_failed": self._acquire_failed,
            "tap_attach": self._tap_attach,
            "tap_detach": self._tap_attach,
            "mirror": self._mirror,
            "until_mark": self._until_mark,
            "mark": self._passed,
            "stop": self._stop,
        }

    def apply(self, operations: Iterable[Operation]) -> bool:
        """Carry them out in order; whether packets that wait for an SA may now find one."""
        useful = False
        for name, *arguments in operations:
            operation = self._operations.get(name)
            if operation is None:
                raise DaemonError(f"unknown operation {name!r}: supervisor and worker differ in version")
            if self._mark and name in _TABLES:
                continue
            operation(*arguments)
            useful = useful or name in _USEFUL
        return useful

    def _until_mark(self, number: int) -> None:
        self._mark = number

    def _passed(self, number: int) -> None:
        if self._mark == number:
            self._mark = 0

    def _sa_larval(self, dst: bytes, protocol: int, spi: int) -> None:
        self.larval.add((dst, protocol, spi))

    def _sa_put(self, sa: SecurityAssociation) -> None:
        self.larval.discard(sa.key)
        if sa.key in self.sad:
            self.sad.update(sa)
        else:
            self.sad.add(sa)

    def _sa_delete(self, dst: bytes, protocol: int, spi: int) -> None:
        self.larval.discard((dst, protocol, spi))
        if SaKey(dst, protocol, spi) in self.sad:
            self.sad.delete(dst, protocol, spi)

    def _sa_state(self, dst: bytes, protocol: int, spi: int, state: int) -> None:
        try:
            self.sad.set_state(self.sad.get(dst, protocol, spi), SaState(state))
        except SadError:
            return  # deleted a moment ago

    def _sa_withdraw(self, dst: bytes, protocol: int, spi: int) -> None:
        if SaKey(dst, protocol, spi) in self.sad:
            self.sad.withdraw(SaKey(dst, protocol, spi))

    def _spd_replace(self, policies: list[Policy]) -> None:
        self.spd.replace_all(policies)

    def _spd_put(self, policy: Policy) -> None:
        self.spd.update(policy)

    def _spd_delete(self, policy_id: int) -> None:
        try:
            self.spd.delete_id(policy_id)
        except SpdError:
            return  # it went with a replacement a moment ago

    def _socket_put(self, policy: SocketPolicy) -> None:
        self.spd.put_socket(policy)

    def _socket_drop(self, mark: int) -> None:
        self.spd.drop_socket(mark)

    def _sysctl(self, name: str, value: int) -> None:
        self.sysctl.set(name, value)

    def _path_mtu(self, dst: bytes, mtu: int) -> None:
        self.on_path_mtu(dst, mtu)

    def _routes_changed(self) -> None:
        self.on_routes_changed()

    def _interfaces(self, interfaces: tuple[Interface, ...]) -> None:
        self.interfaces = interfaces
        self.on_interfaces(interfaces)

    def _acquire_failed(self, protocol: int, src: bytes, dst: bytes, reqid: int) -> None:
        self.on_acquire_failed(protocol, src, dst, reqid)

    def _tap_attach(self, number: int, request: Any = None) -> None:
        self.on_tap(number, request)

    def _mirror(self, wanted: bool) -> None:
        self.on_tap(0, wanted or None)

    def _stop(self) -> None:
        self.stopping = True
