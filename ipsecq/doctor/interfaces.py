"""Route-based tunnels, by the running daemon's answer: devices, ends, SAs, and policies that get in their way."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ipsecq.doctor.finding import Finding, Grade
from ipsecq.numbers import Direction
from ipsecq.policy.model import Policy


def examine(
    interfaces: Iterable[dict[str, Any]], policies: Sequence[Policy], is_local: Callable[[bytes], bool]
) -> Iterator[Finding]:
    """``interfaces`` as ``ipsecq interface --json`` shows them."""
    for each in interfaces:
        found = list(_one(each, policies, is_local))
        yield from found
        if not found:
            yield Finding(Grade.OK, each["name"], "up, with SAs both ways")


def _one(
    each: dict[str, Any], policies: Sequence[Policy], is_local: Callable[[bytes], bool]
) -> Iterator[Finding]:
    name, local, remote = each["name"], each["local"], each["remote"]
    ends = {_packed(local), _packed(remote)}
    if not is_local(_packed(local)):
        yield Finding(
            Grade.FAIL, name, f"its local end {local} is no address of this machine",
            f"ip address add {local} dev DEVICE, or mend [[interface]]",
        )  # fmt: skip
    if not each["up"]:
        yield Finding(Grade.FAIL, name, "the device is down: nothing passes", f"ip link set {name} up, then its routes")
    if each["problem"]:
        yield Finding(
            Grade.FAIL, name, f"{each['problem']} between {local} and {remote} with reqid {each['reqid']}",
            f"esp, -m tunnel, -u {each['reqid']} in setkey.conf, or look at key management",
        )  # fmt: skip
    for policy in policies:
        for transform in policy.transforms:
            if transform.reqid == each["reqid"]:
                yield Finding(
                    Grade.FAIL, name, f"a policy has its reqid {each['reqid']} ({policy.label}): what comes by those SAs "
                    "enters from the device or is dropped", "another reqid for the policy's SAs",
                )  # fmt: skip
            elif not transform.reqid and {transform.src, transform.dst} == ends and policy.direction is Direction.OUT:
                yield Finding(
                    Grade.WARN, name, f"a policy between the same ends takes any SA, this one's too ({policy.label})",
                    "a level unique:NUMBER for the policy, and -u NUMBER for its SAs",
                )  # fmt: skip


def _packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
