"""What ``ip xfrm state`` and ``ip xfrm policy`` print, as sentences of setkey(8).

The two listings may follow each other in one text.  What has no counterpart becomes a comment that says why: a word
that was passed over could make a policy wider than it was, and let pass in clear what was protected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ipsecq.numbers import Action
from ipsecq.policy import setpolicy
from ipsecq.policy.model import Transform
from ipsecq.setkey import values
from ipsecq.setkey.forward import covers
from ipsecq.setkey.xfrm_record import (
    CannotError,
    Line,
    Record,
    ends,
    is_passed_over,
    lifetimes,
    number,
    pairs,
    records,
)
from ipsecq.setkey.xfrm_state import state

_SELECTOR: Final = ("src", "dst", "proto", "sport", "dport", "type", "code", "uid")
_ALL_ONES: Final = "ffffffff"


@dataclass(slots=True, frozen=True)
class _Policy:
    """One policy: ``selector`` and what stands behind the direction, in setkey's words."""

    direction: str
    selector: str
    priority: int
    options: str
    body: str

    @property
    def sentence(self) -> str:
        direction = "in" if self.direction == "fwd" else self.direction
        return f"spdadd {self.selector} {self.options}-P {direction} {self.body} ;"

    @property
    def asks(self) -> tuple[Action | None, tuple[Transform, ...]]:
        spec = setpolicy.parse(f"in {self.body}")
        return spec.action, spec.transforms


def convert(text: str) -> tuple[list[str], int]:
    """The sentences (and comments), and how many records have no counterpart."""
    states: list[str] = []
    policies: list[tuple[Record, _Policy]] = []
    comments: list[str] = []

    def refuse(record: Record, error: CannotError) -> None:
        head = record.head or record.lines[0].words
        # A line that nobody understands may hold a key.
        comments.append(f"# {' '.join(head) if head[0] == 'src' else 'a line'}: {error}")

    for record in records(text.splitlines()):
        # An SA has a line that begins with dir, too, on Linux 6.10 and later.
        first = record.lines[0].words[0] if record.lines and record.head[:1] == ["src"] else ""
        try:
            if first == "proto":
                states.append(state(record))
            elif first == "dir":
                policies.append((record, _policy(record)))
            elif first != "socket":
                raise CannotError("not understood")
        except CannotError as error:
            refuse(record, error)
        except (KeyError, IndexError):
            refuse(record, CannotError("not understood"))
    chosen: list[_Policy] = []
    inbound = {policy.selector: policy for _, policy in policies if policy.direction == "in"}
    for record, policy in policies:
        try:
            if policy.direction != "fwd" or not _is_part_of_in(policy, inbound.get(policy.selector)):
                chosen.append(policy)
        except CannotError as error:
            refuse(record, error)
    # Linux: the lower priority wins, and of one priority the policy that was added first, which is listed last.  Here
    # they have one priority, in which the first wins.
    chosen.reverse()
    chosen.sort(key=lambda policy: policy.priority)
    return [*states, *(policy.sentence for policy in chosen), *comments], len(comments)


def _is_part_of_in(policy: _Policy, inbound: _Policy | None) -> bool:
    """``in`` means forwarded packets, too: is there one that asks for what this *fwd* policy does?"""
    if inbound is None:
        if not policy.body.startswith("ipsec "):
            raise CannotError("a fwd policy without its in policy: in would be for packets to the gateway itself, too")
        return False
    alike = (inbound.priority, inbound.options) == (policy.priority, policy.options)
    if not alike or not covers(inbound.asks, policy.asks):
        raise CannotError("this fwd policy says something else than the in policy with its selector, one is for both here")
    return True


def _policy(record: Record) -> _Policy:
    selector = _selector(record.head)
    what, flags = _what(record.lines[0].words)
    rules: list[str] = []
    options = ""
    for line in record.lines[1:]:
        if line.words[0] == "tmpl":
            rules.append(_rule(line))
        elif line.words[:2] == ["lifetime", "config:"]:
            options = _lifetime(line)
        elif not is_passed_over(line):
            raise CannotError(f"'{' '.join(line.words)}' has no counterpart")
    for flag in flags:
        if flag != "localok":
            raise CannotError(f"'flag {flag}' has no counterpart")
    if what.get("action", "allow") not in ("allow", "block"):
        raise CannotError(f"action {what['action']}")
    if what.get("ptype", "main") != "main" or what.get("share", "any") != "any":
        raise CannotError(f"ptype {what.get('ptype')}, share {what.get('share', 'any')}")
    body = f"ipsec {' '.join(rules)}" if rules else "none"
    if what.get("action") == "block":
        body = "discard"
    return _Policy(what["dir"], selector, number(what.get("priority", "0")), options, body)


def _what(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The line with the direction: names and values, and flags."""
    known = ("dir", "action", "index", "priority", "ptype", "share")
    at = words.index("flag") if "flag" in words else len(words)
    flags = [word for word in words[at + 1 :] if not word.startswith("(0x")]
    return pairs([word for word in words[:at] if not word.startswith("(0x")], known), flags


def _selector(head: list[str]) -> str:
    said = pairs(head, _SELECTOR)
    if said.get("uid", "0") != "0":
        raise CannotError(f"'uid {said['uid']}' has no counterpart")
    try:
        protocol = values.parse_upper(said.get("proto", "any"))
    except ValueError:
        raise CannotError(f"protocol {said['proto']}") from None
    upper = values.format_upper(protocol)
    if protocol in values.ICMP:
        ports = ("[any]", "[any]")
        if "type" in said or "code" in said:
            upper += f" {_one(said.get('type'))},{_one(said.get('code'))}"
    elif "type" in said or "code" in said:
        raise CannotError(f"'type {said.get('type')}' of protocol {upper} has no counterpart")
    else:
        ports = (f"[{_one(said.get('sport'))}]", f"[{_one(said.get('dport'))}]")
    return f"{said['src']}{ports[0]} {said['dst']}{ports[1]} {upper}"


def _one(text: str | None) -> str:
    """A port, a type or a code; 0 alone would be any."""
    return "any" if text is None else "0-0" if number(text) == 0 else str(number(text))


def _lifetime(line: Line) -> str:
    limits = lifetimes(line)
    seconds = limits.pop("hard add", 0)
    for name, value in limits.items():
        raise CannotError(f"a {name} limit of {value} has no counterpart")
    return f"-lh {seconds} " if seconds else ""


def _rule(line: Line) -> str:
    src, dst = ends(line.words[1:])
    inner = pairs(line.parts[0], ("proto", "spi", "reqid", "mode"))
    optional = False
    for words in line.parts[1:]:
        said = pairs(words, ("level", "share", "enc-mask", "auth-mask", "comp-mask"))
        if said.get("level", "required") not in ("required", "use") or said.get("share", "any") != "any":
            raise CannotError(f"'{' '.join(words)}' has no counterpart")
        optional |= said.get("level") == "use"
        for name, mask in said.items():
            if name.endswith("-mask") and mask != _ALL_ONES:
                raise CannotError(f"'{name} {mask}': SAs are not chosen by their algorithms here")
    mode, protocol = inner.get("mode", "transport"), {"comp": "ipcomp"}.get(inner["proto"], inner["proto"])
    if mode not in ("transport", "tunnel"):
        raise CannotError(f"mode {mode}")
    if protocol not in ("esp", "ah", "ipcomp"):
        raise CannotError(f"protocol {protocol}")
    if number(inner.get("spi", "0")):
        raise CannotError(f"'spi {inner['spi']}': an SA is chosen by its reqid here")
    reqid = number(inner.get("reqid", "0"))
    level = "use" if optional else "unique" if reqid else "require"
    return f"{protocol}/{mode}/{f'{src}-{dst}' if mode == 'tunnel' else ''}/{level}{f':{reqid}' if reqid else ''}"
