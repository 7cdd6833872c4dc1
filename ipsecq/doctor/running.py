"""Faults that a running daemon's counters tell of: ``examine(status)`` over the answer of ``ipsecq status --json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ipsecq.doctor.finding import Finding, Grade
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.packet.address import text as _text
from ipsecq.policy.model import Policy
from ipsecq.setkey import printer

Status = dict[str, Any]

_COUNTED: Final = (
    ("esp_notdb", Grade.WARN, "unknown SPI", "the peer uses ESP SAs that are not here ({count} packets): the ends have "
     "different SPIs or addresses, or this end lost its SAs", "compare 'ipsecq setkey -D' at both ends, or restart IKE"),
    ("ah_notdb", Grade.WARN, "unknown SPI", "the peer uses AH SAs that are not here ({count} packets)",
     "compare 'ipsecq setkey -D' at both ends"),
    ("esp_natt", Grade.FAIL, "NAT-T", "ESP came in UDP where the SA has none, or the other way round ({count} packets)",
     "protocol esp-udp at both ends, or esp at both"),
    ("esp_badilen", Grade.FAIL, "algorithm", "{count} ESP packets have a length that the SA's cipher cannot make: the "
     "algorithms differ", "compare the algorithms at both ends"),
    ("in_polvio", Grade.WARN, "policy", "{count} packets came in clear, or through another SA than policy wants, and were "
     "dropped", "the 'in' policies must mirror the peer's 'out' policies"),
    ("in_history", Grade.WARN, "policy", "{count} packets went through other transforms than their policy names",
     "the 'in' policies must mirror the peer's 'out' policies, transform by transform"),
    ("send_failed", Grade.WARN, "send", "{count} finished datagrams could not be sent: no route to the peer, or an output "
     "rule of your own drops ESP", "ip route get PEER; nft list ruleset"),
    ("inject_failed", Grade.WARN, "inject", "{count} opened packets could not enter through the enc device",
     "ip link show enc0"),
    ("out_held_overflow", Grade.WARN, "no SA", "{count} packets waited for an SA and found no room",
     "is a key daemon running? journalctl -u iked"),
    ("in_pmtu_refused", Grade.WARN, "spoofed ICMP", "{count} ICMP errors quoted packets that live SAs of ours have not sent "
     "of late, and were not believed", "nothing, unless a router on the way sends them"),
    ("overload", Grade.WARN, "offload", "{count} super-packets could not be cut", "set [offload] gso = false"),
)  # fmt: skip


def examine(status: Status, policies: Sequence[Policy], knobs: Mapping[str, int]) -> Iterator[Finding]:
    """What the daemon counts, most telling first; ``policies`` and ``knobs`` (sysctls by name) are those in force."""
    found = [
        *_life(status), *_sas(status), *_missing(status, policies), *_switched_off(policies, knobs), *_counters(status)
    ]  # fmt: skip
    yield from found
    if not any(finding.grade is not Grade.OK for finding in found):
        yield Finding(Grade.OK, "daemon", f"{status['sa_count']} SAs, {status['policy_count']} policies, nothing amiss")


def _life(status: Status) -> Iterator[Finding]:
    if not status["reload"]["success"]:
        yield Finding(
            Grade.WARN, "reload", "the last reload was refused: the files differ from what is in force",
            "ipsecq reload, and read what it says",
        )  # fmt: skip
    for what in status["fail_open"]:
        yield Finding(Grade.WARN, "fail open", f"packets pass in clear when ipsecq is down: {what}", "take it out")
    for what in status["state"]:
        yield Finding(Grade.WARN, "state", what, "new keys for SAs that were made by hand; ipsecq state reset --help")
    for worker in status["workers"]:
        name = f"worker {worker['index']}"
        if not worker["up"]:
            yield Finding(Grade.FAIL, "worker", f"{name} is down: its packets are dropped", "journalctl -u ipsecq")
        elif worker["restarts"]:
            yield Finding(Grade.WARN, "worker", f"{name} was restarted {worker['restarts']} times", "journalctl -u ipsecq")
    lost = sum(worker["kernel_drops"] for worker in status["workers"]) + status["counters"].get("enobufs", 0)
    if lost:
        yield Finding(
            Grade.WARN, "queue", f"the kernel dropped {lost} packets because a queue was full: more load than the "
            "workers take", "more [daemon] workers, more tunnels to spread, or less load",
        )  # fmt: skip


def _sas(status: Status) -> Iterator[Finding]:
    sas = status["sas"]
    for sa in sas:
        name = f"SA {sa['protocol']} {sa['spi']} {sa['src']} > {sa['dst']}"
        if sa["problem"]:
            yield Finding(
                Grade.FAIL, "SA", f"{name} does not send: {sa['problem']}",
                f"make new keys, or if they were never used: ipsecq state reset {sa['spi']}",
            )  # fmt: skip
        if sa["icv_failures"]:
            yield _icv(name, sa)
        if sa["replays"]:
            yield Finding(
                Grade.WARN, "replay", f"{name}: {sa['replays']} packets were older than its window of "
                f"{sa['replay_window']} packets, or came twice: reordering on the way, or an attacker",
                "a larger window (setkey's -r, in octets of 8 packets) where packets overtake one another",
            )  # fmt: skip
        if sa["state"] in {"dying", "dead"} and not _successor(sa, sas):
            word = "is past its soft lifetime" if sa["state"] == "dying" else "has expired"
            yield Finding(
                Grade.WARN if sa["state"] == "dying" else Grade.FAIL, "expiry", f"{name} {word} and has no successor",
                "rekey: is the key daemon running? Manual SAs need new keys by hand",
            )  # fmt: skip
        if sa["direction"] == "out" and sa["packets"] and not sa["problem"]:
            yield from _silence(name, sa, sas)


def _icv(name: str, sa: dict[str, Any]) -> Finding:
    if not sa["packets"]:
        return Finding(
            Grade.FAIL, "keys", f"{name}: not one packet is authentic ({sa['icv_failures']} failures): key, salt or "
            "algorithm differ at the two ends, in this direction", "the same 'add' line at both ends",
        )  # fmt: skip
    return Finding(
        Grade.WARN, "ICV", f"{name}: {sa['icv_failures']} of {sa['packets'] + sa['icv_failures']} packets were not "
        "authentic: damaged on the way, or forged", "tcpdump on the way; AH does not survive NAT",
    )  # fmt: skip


def _successor(sa: dict[str, Any], sas: list[dict[str, Any]]) -> bool:
    same = ("protocol", "mode", "src", "dst", "reqid")
    return any(
        other is not sa and other["state"] == "mature" and all(other[key] == sa[key] for key in same) for other in sas
    )


def _silence(name: str, sa: dict[str, Any], sas: list[dict[str, Any]]) -> Iterator[Finding]:
    """Packets leave and nothing comes back: the commonest fault of all."""
    back = [
        other for other in sas
        if (other["src"], other["dst"], other["protocol"]) == (sa["dst"], sa["src"], sa["protocol"])
    ]  # fmt: skip
    if not back:
        yield Finding(
            Grade.WARN, "one way", f"{name} is in use and no SA leads back", "add one from the peer to this machine"
        )
    elif sa["packets"] >= 3 and not any(
        other["packets"] or other["icv_failures"] or other["replays"] or other["drops"] for other in back
    ):
        advice = (
            f"ask the peer's administrator; tcpdump -ni DEVICE udp port {sa['natt'][0]}"
            if sa["natt"]
            else "tcpdump -ni DEVICE proto 50; where a NAT or firewall eats ESP, use UDP encapsulation (NAT-T)"
        )
        yield Finding(
            Grade.WARN, "one way", f"{name}: {sa['packets']} packets left and none has ever come back: ESP is eaten on "
            "the way, or the peer is down or drops it", advice,
        )  # fmt: skip


def _missing(status: Status, policies: Sequence[Policy]) -> Iterator[Finding]:
    """Outbound policies whose SAs are not there: their packets wait for a key daemon, then they are dropped."""
    there = {(sa["protocol"], sa["src"], sa["dst"]) for sa in status["sas"] if sa["state"] in {"mature", "dying"}}
    needed = status["counters"].get("out_acquire", 0)
    if len(status["sas"]) < status["sa_count"]:
        return
    for policy in policies:
        if policy.direction is not Direction.OUT or policy.action is not Action.IPSEC:
            continue
        for each in policy.transforms:
            if each.mode is not Mode.TUNNEL or each.src is None or each.dst is None or each.level is Level.USE:
                continue
            name = Protocol(each.protocol).name.lower()
            if (name, _text(each.src), _text(each.dst)) not in there:
                yield Finding(
                    Grade.FAIL if needed else Grade.WARN, "no SA", f"no {name.upper()} SA {_text(each.src)} > "
                    f"{_text(each.dst)} for: {printer.config_policy(policy)}"
                    + ("; packets have asked for it" if needed else ""),
                    "add it (ipsecq setkey), or run a key daemon: ipsecq exec -- iked",
                )  # fmt: skip


def _switched_off(policies: Sequence[Policy], knobs: Mapping[str, int]) -> Iterator[Finding]:
    used = {transform.protocol for policy in policies for transform in policy.transforms}
    for name, value in knobs.items():
        protocol = name.rsplit(".", 1)[1].removesuffix("_enable")
        if not value and protocol in {each.name.lower() for each in used}:
            yield Finding(
                Grade.FAIL, "switched off", f"{name} is 0: every packet that needs {protocol.upper()} is dropped",
                f"ipsecq sysctl {name}=1",
            )  # fmt: skip


def _counters(status: Status) -> Iterator[Finding]:
    counters = status["counters"]
    for counter, grade, subject, message, mend in _COUNTED:
        count = counters.get(counter, 0)
        if count:
            yield Finding(grade, subject, message.format(count=count), mend)
