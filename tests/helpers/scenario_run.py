"""Run a scenario on the engine, with bytes: what the packet became, in the words of the table."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

from engine_peers import Peer, address, make_peer
from scenarios import Scenario, Step

from ipsecq.counters import FIRST_DROP, Counter, Fate
from ipsecq.engine import standalone
from ipsecq.engine.emit import Acquire, Emissions, PathMtuLearned
from ipsecq.engine.headers import opened_header
from ipsecq.engine.inbound_sa import make_inbound
from ipsecq.numbers import Direction, Mode, Protocol
from ipsecq.packet import checksum, icmp, ipv4, ipv6
from ipsecq.packet.view import PacketView
from ipsecq.policy import setpolicy
from ipsecq.policy.model import Policy
from ipsecq.policy.sockets import SocketPolicy, SocketRule, rule_of
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse
from ipsecq.setkey.values import format_address

OUT_FATES = {Fate.PASS: "clear", Fate.DONE: "protected", Fate.HOLD: "held"}
IN_FATES = {Fate.PASS: "enters in clear", Fate.DONE: "enters", Fate.ABSORBED: "absorbed"}
NAMES = {1: "ICMP", 4: "IPv4", 6: "TCP", 17: "UDP", 41: "IPv6", 47: "GRE", 58: "ICMPv6"}
PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmp6": 58, "gre": 47, "sctp": 132}
NOW = 1000.0
MARK = 0x80000000
"""Of the policies of a row's socket."""


class Runner:
    """The machine under test and, where a row wants one, its peer."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        sas, policies = databases("\n".join(scenario.sas.values()), scenario.policy)
        later, _ = databases("\n".join(_adds(step.setkey) for step in scenario.steps), "")
        self.peer_sas, _ = databases("\n".join(scenario.peer_sas.values()), "")
        self.all_sas = {sa.key: sa for sa in [*self.peer_sas, *later, *sas]}
        self.machine = make_peer(sas, policies, scenario.knobs, spare=later)
        self.slots = {sa.key: sa.slot for sa in self.machine.spare}
        self.peers: dict[str, Peer] = {}
        self.wire: list[bytes] = []
        """What the machine sent last: ICMP errors quote it."""

    def run(self, step: Step) -> dict[str, Any]:
        """Make the step's changes, process its packet; the outcome has the keys of a row, ``fate`` and those it names."""
        self.change(step)
        machine = self.machine
        machine.mtu = step.mtu
        if step.way == "out":
            packet = build(step.packet, self.wire)
            fate, wire = machine.send(packet, MARK if step.socket else 0)
            outcome = {"fate": _fate(fate, OUT_FATES)}
            sent = []
            for datagram in wire:
                error = icmp.parse_error(datagram)
                if error is None:
                    sent.append(datagram)
                else:
                    mtu = f" mtu={error.mtu}" if error.mtu else ""
                    outcome["error"] = f"{NAMES[1 if error.version == 4 else 58]} {error.type},{error.code}{mtu}"
            if sent:
                self.wire = sent
                assert all(len(datagram) <= step.mtu for datagram in sent)
                if len(sent) > 1:
                    outcome["pieces"] = len(sent)
                else:
                    outcome["layout"] = self.layout(sent[0])
                if "outer" in step.expected:
                    outcome["outer"] = fields(sent[0], step.expected["outer"])
        else:
            fate, original, inner = self.receive(step)
            outcome = {"fate": _fate(fate, IN_FATES)}
            if inner:
                if "inner" in step.expected:
                    outcome["inner"] = fields(inner[0], step.expected["inner"])
                else:
                    assert inner == [original]
        asked = [_acquire(event) for event in machine.emit.events if isinstance(event, Acquire)]
        if asked:
            outcome["acquire"] = asked
        learned = [event for event in machine.emit.events if isinstance(event, PathMtuLearned)]
        if learned:
            outcome["learned"] = f"{format_address(learned[0].dst)} mtu={learned[0].mtu}"
        return outcome

    def receive(self, step: Step) -> tuple[int, bytes, list[bytes]]:
        """Let the step's packet arrive; its fate, what it was before the peer sealed it, and what came out."""
        original, *arriving = self.arriving(step)
        for packet in arriving[:-1]:
            assert self.machine.receive(packet)[0] == Fate.DONE
        return *_pair(self.machine.receive(arriving[-1]), original),

    def arriving(self, step: Step) -> list[bytes]:
        """The step's packet, and then what of it arrives, one after the other: sealed by the peer, if the step says so."""
        original = build(step.packet, self.wire)
        if not step.sealed:
            return [original, original]
        peer = self.peers.get(step.sealed)
        if peer is None:
            _, policies = databases("", step.sealed)
            peer = self.peers[step.sealed] = make_peer(self.peer_sas, policies, self.scenario.peer_knobs)
        fate, wire = peer.send(original)
        assert (fate, len(wire)) == (Fate.DONE, 1), "the peer did not seal the packet"
        packet = wire[0]
        before = []
        for what in step.tamper:
            if what == "replay":
                before.append(packet)
            else:
                packet = tamper(packet, what)
        return [original, *before, packet]

    def change(self, step: Step) -> None:
        """Apply ``setkey`` and ``knobs`` to the running machine, as the daemon does: in place of the old tables."""
        tables = self.machine.tables
        for name, value in step.knobs.items():
            tables.sysctl.set(name, value)
        self.machine.socket_mark = MARK if step.socket else 0
        rules: dict[Direction, SocketRule | None] = {}
        for text in step.socket:
            spec = setpolicy.parse(text)
            rules[spec.direction] = rule_of(spec, privileged=self.scenario.user == "root")
        if step.socket:
            tables.spd.put_socket(SocketPolicy(MARK, rules.get(Direction.IN), rules.get(Direction.OUT)))
        if step.setkey:
            applied = apply(parse(step.setkey), tables.sad, tables.spd, now=NOW)
            for sa in applied.sad:
                if sa.slot < 0:
                    sa.slot = self.slots[sa.key]
            tables.sad, tables.spd = applied.sad, applied.spd

    def layout(self, packet: bytes) -> str:
        """The headers of a datagram, opened with the SAs of both sides, outermost first."""
        sas = [replace(sa) for sa in self.all_sas.values()]
        tables = standalone.build(sas, [], random.Random(1).randbytes, self.machine.tables.sysctl)
        view = PacketView()
        parts: list[str] = []
        fresh = True
        while True:
            assert view.load(packet)
            if fresh:
                assert view.version == 6 or checksum.ones_complement(packet[: view.header_length]) == 0xFFFF
                parts.append(f"{format_address(view.src)} > {format_address(view.dst)}")
            protocol, offset, encapsulated = view.protocol, view.offset, 0
            if protocol == 17 and view.dport == 4500:
                parts.append("UDP 4500")
                protocol, offset, encapsulated = 50, offset + 8, view.sport
            fresh = protocol in {4, 41}
            if fresh:
                packet = packet[offset:]
                continue
            if protocol not in set(Protocol):
                return " | ".join([*parts, NAMES.get(protocol, str(protocol))])
            at, length = {50: (0, 4), 51: (4, 4), 108: (2, 2)}[protocol]
            spi = int.from_bytes(packet[offset + at : offset + at + length], "big")
            sa = tables.sad.inbound((view.dst, protocol, spi))
            assert sa is not None, f"no SA for protocol {protocol}, SPI {spi:#x}"
            parts.append(f"{sa.protocol.name.replace('IPCOMP', 'IPComp')} {spi:#x}")
            ready = make_inbound(sa, tables)
            reason, following, payload = ready.open(packet, view, offset, encapsulated, NOW, Emissions())
            assert not reason, Counter(reason).name
            fresh = following in {4, 41}
            packet = payload if fresh else opened_header(packet, view, following, len(payload)) + payload


def databases(sas: str, policies: str) -> tuple[list[SecurityAssociation], list[Policy]]:
    """SAs and policies of setkey sentences."""
    applied = apply(parse(sas + "\n" + policies), Sad(), Spd(), now=NOW)
    return applied.sad.dump(), applied.spd.dump()


def build(text: str, sent: list[bytes]) -> bytes:
    """The octets of a packet in the table's notation; ``sent`` is what ``about=sent`` quotes."""
    src, _, dst, protocol_name, *rest = text.split()
    options = dict(word.partition("=")[::2] for word in rest if "=" in word or word == "df")
    words = [word for word in rest if "=" not in word and word != "df"]
    protocol = PROTOCOLS.get(protocol_name) or int(protocol_name)
    payload = bytes((int(options.get("fill", "0"), 0),)) * int(options.get("size", "64"))
    s, d = address(src), address(dst)
    if protocol in {6, 17}:
        sport, dport = (int(word) for word in words)
        ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
        if protocol == 17:
            segment = ports + (8 + len(payload)).to_bytes(2, "big") + b"\0\0" + payload
        else:
            segment = ports + bytes(8) + b"\x50\x10\x20\0" + bytes(4) + payload
    elif protocol in {1, 58}:
        kind, code = (int(word) for word in words[0].split(","))
        body = _quoted(options["about"], sent) if "about" in options else payload
        mtu = int(options.get("mtu", "0")).to_bytes(4, "big")
        segment = bytes((kind, code, 0, 0)) + mtu + body
    else:
        segment = payload
    fragment = options.get("fragment")
    tos = int(options.get("tos", "0"), 0)
    if len(s) == 4:
        packet = ipv4.header(s, d, protocol, len(segment), tos=tos, df="df" in options, identification=7) + segment
    else:
        packet = ipv6.header(s, d, protocol, len(segment), traffic_class=tos) + segment
    packet = _complete(packet, protocol)
    if "badsum" in options:
        at = len(packet) - len(segment) + {17: 6, 6: 16}[protocol]
        packet = packet[:at] + bytes((packet[at] ^ 0x55, packet[at + 1])) + packet[at + 2 :]
    if fragment:
        packet = _fragment(packet, later=fragment == "later")
    return packet


def tamper(packet: bytes, what: str) -> bytes:
    """One thing that happens to a datagram on its way."""
    name, _, value = what.partition("=")
    changed = bytearray(packet)
    header = 20 if packet[0] >> 4 == 4 else 40
    if name == "tos" and header == 20:
        changed[1] = int(value, 0)
    elif name == "tos":
        tos = int(value, 0)
        changed[0], changed[1] = 0x60 | tos >> 4, (tos & 15) << 4 | changed[1] & 15
    elif name == "df":
        changed[6] ^= 0x40
    elif name == "ttl":
        changed[8 if header == 20 else 7] = int(value)
    elif name == "src":
        octets = address(value)
        at = 12 if header == 20 else 8
        changed[at : at + len(octets)] = octets
    elif name == "dst":
        octets = address(value)
        at = 16 if header == 20 else 24
        changed[at : at + len(octets)] = octets
    elif name == "spi":
        changed[header : header + 4] = int(value, 0).to_bytes(4, "big")
    elif name == "flip":
        changed[int(value)] ^= 1
    elif name == "cut":
        del changed[-int(value) :]
        changed[2:4] = len(changed).to_bytes(2, "big")
    else:
        raise ValueError(what)
    if header == 20:
        head = changed[:20]
        ipv4.fix_checksum(head)
        changed[:20] = head
    return bytes(changed)


def fields(packet: bytes, wanted: dict[str, Any]) -> dict[str, Any]:
    """Some fields of a packet's own header."""
    view = PacketView()
    assert view.load(packet)
    found: dict[str, Any] = {}
    for name in wanted:
        if name == "df":
            found[name] = int(view.dont_fragment)
        elif name == "checksum":
            at = view.offset + {17: 6, 6: 16}[view.protocol]
            zero = packet[at : at + 2] == b"\0\0"
            found[name] = "none" if zero else "right" if checksum.verify_transport(packet) else "wrong"
        elif name in {"src", "dst"}:
            found[name] = format_address(getattr(view, name))
        else:
            found[name] = getattr(view, name)
    return found


def _pair(result: tuple[int, list[bytes]], original: bytes) -> tuple[int, bytes, list[bytes]]:
    return result[0], original, result[1]


def _fate(fate: int, names: dict[Fate, str]) -> str:
    return f"dropped: {Counter(fate).name.lower()}" if fate >= FIRST_DROP else names[Fate(fate)]


def _acquire(event: Acquire) -> str:
    reqid = f" reqid={event.reqid}" if event.reqid else ""
    return (
        f"{Protocol(event.protocol).name.lower()}/{Mode(event.mode).name.lower()} "
        f"{format_address(event.src)} > {format_address(event.dst)}{reqid}"
    )


def _adds(setkey: str) -> str:
    return "\n".join(sentence + ";" for sentence in re.findall(r"\badd [^;]*", setkey))


def _complete(packet: bytes, protocol: int) -> bytes:
    if protocol == 1:
        value = 0xFFFF - checksum.ones_complement(packet[20:])
        return packet[:22] + value.to_bytes(2, "big") + packet[24:]
    return checksum.complete(packet)


def _fragment(packet: bytes, *, later: bool) -> bytes:
    """The first 40 octets of payload with more to come, or the rest, as a fragment."""
    if packet[0] >> 4 == 4:
        part = packet[60:] if later else packet[20:60]
        word = 5 if later else 0x2000
        head = bytearray(packet[:20])
        head[2:4] = (20 + len(part)).to_bytes(2, "big")
        head[6:8] = word.to_bytes(2, "big")
        ipv4.fix_checksum(head)
        return bytes(head) + part
    part = packet[80:] if later else packet[40:80]
    word = 5 << 3 if later else 1
    extension = bytes((packet[6], 0)) + word.to_bytes(2, "big") + b"\0\0\0\x07"
    return packet[:4] + (8 + len(part)).to_bytes(2, "big") + b"\x2c" + packet[7:40] + extension + part


def _quoted(about: str, sent: list[bytes]) -> bytes:
    packet = bytearray(sent[0])
    header = 20 if packet[0] >> 4 == 4 else 40
    if about == "forged-spi":
        packet[header : header + 4] = b"\0\0\x77\x77"
    elif about == "forged-sequence":
        packet[header + 4 : header + 8] = b"\x77\0\0\0"
    elif about != "sent":
        raise ValueError(about)
    return bytes(packet[:128])
