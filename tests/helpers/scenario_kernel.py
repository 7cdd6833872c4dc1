"""Run a scenario end to end: a gateway with the real kernel, one network, packets put on its wires by hand.

    lan ── machine ── wire          A and G are addresses of the machine, `a` is a host of the lan, all others are beyond
                                    the wire, and all of them are this program.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scenario_run import Runner, build
from scenarios import Scenario, Step

from ipsecq.daemon.control import ask
from ipsecq.lab.gateway import Gateway
from ipsecq.lab.netns import Lab
from ipsecq.packet import icmp
from ipsecq.packet.view import PacketView
from ipsecq.sysctl import Sysctl

BEYOND = ["10.0.0.2", "10.0.0.3", "192.0.2.2", "192.0.2.9", "fd00::2", "fd00::3", "2001:db8::2", "2001:db8::9"]
NOISE = range(130, 144)  # MLD, neighbour discovery
LISTENER = """
table inet observer {
    counter enters { }
    counter clear { }
    chain prerouting {
        type filter hook prerouting priority -160; policy accept;
        iifname "enc0" counter name enters
        iifname "wire" counter name clear
    }
}
"""
KERNEL_DROPS = {
    "in_polvio": ("in_clear_dropped",), "in_discard": ("in_discard_dropped", "in_default_dropped"),
    "out_discard": ("out_discard_dropped", "out_default_dropped"),
}  # fmt: skip
"""The engine's counter to those of the ruleset: the kernel drops what it can without asking."""
PATIENCE = 10.0
SETTLE = 0.03
SEEN_OUTSIDE = ("layout", "error", "learned", "pieces")


def expected(step: Step) -> dict[str, Any]:
    """What the table says of a step, without what only the engine shows."""
    return {"fate": step.fate, **{name: step.expected[name] for name in SEEN_OUTSIDE if name in step.expected}}


class Stage:
    """The network and its gateway."""

    def __init__(self, lab: Lab) -> None:
        self.machine, world = lab.namespace("machine"), lab.namespace("world")
        world.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        world.sysctl("net.ipv6.conf.default.disable_ipv6", 1)
        for device in ("wire", "lan"):
            lab.link(self.machine, device, world, device)
        machine = self.machine
        machine.sysctl("net.ipv4.ip_forward", 1)
        machine.sysctl("net.ipv6.conf.all.forwarding", 1)
        self.macs = {
            (space, device): bytes.fromhex(space.run("cat", f"/sys/class/net/{device}/address").stdout.replace(":", ""))
            for space in (machine, world) for device in ("wire", "lan")
        }  # fmt: skip
        self.world = world
        for device, addresses in (
            ("wire", ("10.0.0.1/24", "192.0.2.1/24", "fd00::1/64", "2001:db8::1/64")),
            ("lan", ("10.1.0.1/24", "fd01::1/64")),
        ):
            for text in addresses:
                machine.run("ip", "addr", "add", text, "dev", device, *(["nodad"] if ":" in text else []))
        for text in [*BEYOND, "10.1.0.7", "fd01::7"]:
            device = "lan" if text in {"10.1.0.7", "fd01::7"} else "wire"
            mac = self.macs[world, device].hex(":")
            machine.run("ip", "neigh", "replace", text, "lladdr", mac, "dev", device, "nud", "permanent")
        machine.run("ip", "route", "add", "default", "via", "192.0.2.2")
        machine.run("ip", "-6", "route", "add", "default", "via", "2001:db8::2")
        machine.nft(LISTENER)
        self.ends = {device: self._end(device) for device in ("wire", "lan")}
        self.raw = {
            4: machine.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
            6: machine.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW),
        }
        for sock in [*self.ends.values(), *self.raw.values()]:
            lab.on_close(sock.close)
        self.gateway = Gateway(machine, "", workers=1).start()
        self.control = self.gateway.directory / "run" / "control"
        self.knobs = Sysctl().all()
        self.number = 0
        self.mtu = 1500

    def _end(self, device: str) -> socket.socket:
        sock = self.world.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self.world.call(lambda: sock.bind((device, 3)))
        sock.setblocking(False)
        return sock

    def set_mtu(self, mtu: int) -> None:
        """Of the wire, as the machine knows it."""
        if mtu != self.mtu:
            self.machine.link_mtu("wire", mtu)
            self.mtu = mtu

    def send(self, device: str, packet: bytes) -> None:
        """Put a packet on a wire, for the machine."""
        kind = b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
        self.ends[device].send(self.macs[self.machine, device] + self.macs[self.world, device] + kind + packet)

    def emit(self, packet: bytes) -> None:
        """Let the machine itself send a packet."""
        version = packet[0] >> 4
        dst = socket.inet_ntop(*((socket.AF_INET, packet[16:20]) if version == 4 else (socket.AF_INET6, packet[24:40])))
        with contextlib.suppress(PermissionError):  # that is what a sender hears of a packet that the ruleset drops
            self.raw[version].sendto(packet, (dst, 0))

    def taken(self, device: str) -> list[bytes]:
        """The IP packets that the machine has put on a wire since the last call."""
        found = []
        view = PacketView()
        while True:
            try:
                frame, name = self.ends[device].recvfrom(1 << 16)
            except BlockingIOError:
                return found
            if name[2] == socket.PACKET_OUTGOING or frame[12:14] not in {b"\x08\x00", b"\x86\xdd"}:
                continue
            if view.load(frame[14:]) and not (view.protocol == 58 and view.sport in NOISE):
                found.append(frame[14 : 14 + view.length])

    def counters(self) -> dict[str, int]:
        """The engine's counters, those of the ruleset, and ours."""
        found = dict(ask(self.control, "status", limit=0)["counters"])
        for each in json.loads(self.machine.run("nft", "-j", "list", "counters").stdout)["nftables"]:
            counter = each.get("counter")
            if counter and counter["table"] in {"observer", "ipsecq"}:
                found[counter["name"]] = counter["packets"]
        return found

    def set_knobs(self, values: dict[str, int]) -> None:
        """Variables that have other values now."""
        changed = {name: str(value) for name, value in values.items() if self.knobs[name] != value}
        if changed:
            ask(self.control, "sysctl-set", values=changed)
            self.knobs |= values


class KernelRunner:
    """A scenario on the stage.  Its keys are made its own, as the gateway remembers what it has seen under a key."""

    def __init__(self, stage: Stage, scenario: Scenario) -> None:
        self.stage = stage
        stage.number += 1
        fresh = replace(
            scenario,
            sas={name: self._own(text) for name, text in scenario.sas.items()},
            peer_sas={name: self._own(text) for name, text in scenario.peer_sas.items()},
            steps=[replace(step, setkey=self._own(step.setkey)) for step in scenario.steps],
        )
        self.steps = fresh.steps
        self.runner = Runner(fresh)
        stage.set_knobs(Sysctl().all() | fresh.knobs)
        self._setkey("flush; spdflush;\n" + "\n".join(fresh.sas.values()) + "\n" + fresh.policy)
        self.seen: dict[str, list[bytes]] = {}
        self._collect()
        self.seen.clear()

    def _collect(self) -> None:
        """Keep what the machine has put on its wires."""
        for device in self.stage.ends:
            self.seen[device] = self.seen.get(device, []) + self.stage.taken(device)

    def _own(self, text: str) -> str:
        return re.sub(r"\b0x[0-9a-f]{4}(?=[0-9a-f]{28,})", f"0x{self.stage.number:04x}", text)

    def _setkey(self, text: str) -> None:
        answer = ask(self.stage.control, "setkey", text=text)
        assert not answer["errors"], answer["errors"]

    def run(self, step: Step) -> dict[str, Any]:
        """The outcome of a step, in the words of :func:`expected`."""
        stage = self.stage
        stage.set_knobs(step.knobs)
        if step.setkey:
            self._setkey(step.setkey)
            self.runner.change(step)
        stage.set_mtu(step.mtu)
        original, *arriving = [build(step.packet, self.runner.wire)] * 2 if step.way == "out" else self.runner.arriving(step)
        for packet in arriving[:-1]:
            before = stage.counters()
            stage.send("wire", packet)
            self._wait(before, step, lambda grown: "enters" in grown)
            self._settle(before)
        self.seen.clear()
        before = stage.counters()
        packet = arriving[-1]
        if step.way == "in":
            stage.send("wire", packet)
        elif packet[12:14] in {b"\x0a\x01"} or packet[8:10] == b"\xfd\x01":
            stage.send("lan", packet)
        else:
            stage.emit(packet)
        judge = self._inbound if step.way == "in" else self._outbound

        def right(grown: dict[str, int]) -> bool:
            with contextlib.suppress(AssertionError):  # the first piece of several cannot be opened
                return judge(step, original, grown) == expected(step)
            return False

        self._wait(before, step, right)
        return judge(step, original, self._settle(before))

    def _wait(self, before: dict[str, int], step: Step, right: Callable[[dict[str, int]], bool]) -> None:
        """Until the packet's fate is decided and ``right``, as counters grow before the packet is out, or for long."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            grown = self._grown(before)
            if ((step.way == "out" and any(self.seen.values())) or self._decided(grown, step.way)) and right(grown):
                break
            time.sleep(0.005)

    def _settle(self, before: dict[str, int]) -> dict[str, int]:
        """What has grown when nothing more comes."""
        time.sleep(SETTLE)
        return self._grown(before)

    def _grown(self, before: dict[str, int]) -> dict[str, int]:
        """What has grown so far; what is on the wires is collected."""
        now = self.stage.counters()
        self._collect()
        return {name: value - before.get(name, 0) for name, value in now.items() if value > before.get(name, 0)}

    @staticmethod
    def _decided(grown: dict[str, int], way: str) -> bool:
        signs = {
            "in": ("enters", "clear", "in_", "esp_", "ah_", "ipcomp_"),
            "out": ("out_discard", "out_default", "out_packets"),
        }[way]  # fmt: skip
        return any(name.startswith(signs) and name not in {"in_packets", "in_bytes", "esp_output"} for name in grown)

    def _drop(self, step: Step, grown: dict[str, int]) -> str:
        """The engine's name of the drop that was counted; "" for none."""
        engine = [name for name in grown if step.fate == f"dropped: {name}"]
        kernel = [reason for reason, names in KERNEL_DROPS.items() if any(name in grown for name in names)]
        found = sorted({*engine, *kernel})
        assert len(found) < 2, grown
        return f"dropped: {found[0]}" if found else ""

    def _inbound(self, step: Step, original: bytes, grown: dict[str, int]) -> dict[str, Any]:
        entered, clear, dropped = grown.get("enters", 0), grown.get("clear", 0), self._drop(step, grown)
        assert (entered > 0) + (clear > 0) + bool(dropped) <= 1, grown
        if entered and not step.expected.get("inner"):
            # What is for the machine itself has gone up its stack.
            assert all(_payload(each) == _payload(original) for each in self.seen["lan"])
        if entered:
            return {"fate": "enters"}
        if clear:
            return {"fate": "enters in clear"}
        return {"fate": dropped or "absorbed", **self._learned(step, grown)}

    def _learned(self, step: Step, grown: dict[str, int]) -> dict[str, str]:
        """What `explain` says of the path to the peer now."""
        if not grown.get("in_pmtu_learned"):
            return {}
        where = step.expected.get("learned", "").split()[:1] or ["nowhere"]
        told = ask(self.stage.control, "explain", **_words(self.steps[0].packet))["data"]
        return {"learned": f"{where[0]} mtu={told['path_mtu']}"}

    def _outbound(self, step: Step, original: bytes, grown: dict[str, int]) -> dict[str, Any]:
        dropped = self._drop(step, grown)
        sent = self.seen["wire"]
        outcome: dict[str, Any] = {}
        for datagram in self.seen["lan"]:
            error = icmp.parse_error(datagram)
            if error is not None:
                mtu = f" mtu={error.mtu}" if error.mtu else ""
                outcome["error"] = f"{'ICMP' if error.version == 4 else 'ICMPv6'} {error.type},{error.code}{mtu}"
        assert not (dropped and sent), grown
        if dropped:
            return {"fate": dropped, **outcome}
        if not sent:
            return {"fate": "held" if grown.get("out_packets") else "nothing came of it", **outcome}
        if sent == [_same(sent[0], original)]:
            return {"fate": "clear", **outcome}
        self.runner.wire = sent
        if len(sent) > 1:
            return {"fate": "protected", "pieces": len(sent), **outcome}
        return {"fate": "protected", "layout": self.runner.layout(sent[0]), **outcome}


def _same(sent: bytes, original: bytes) -> bytes:
    """``sent`` when it is ``original``, but for what a router and a raw socket change in the IP header."""
    view, other = PacketView(), PacketView()
    view.load(sent)
    other.load(original)
    same = view.flow() == other.flow() and _payload(sent) == _payload(original)
    return sent if same else b""


def _payload(packet: bytes) -> bytes:
    view = PacketView()
    view.load(packet)
    return bytes(packet[view.offset : view.length])


def _words(packet: str) -> dict[str, Any]:
    src, _, dst, protocol, *rest = packet.split()
    ports = [int(word) for word in rest[:2] if word.isdigit()]
    return {"src": src, "dst": dst, "protocol": protocol, **dict(zip(("sport", "dport"), ports, strict=False))}
