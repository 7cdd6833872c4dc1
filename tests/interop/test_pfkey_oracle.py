"""The kernel's own PF_KEY as the oracle: the same datagrams go to af_key of Linux and to our server, field by field.

What differs is listed, with the reason, in ``DIFFERENCES``; a difference that isn't listed fails, and so does one that
is listed and doesn't occur.  ``docs/pfkey.md`` has the list for people.
"""

import itertools
import json
import struct
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from ipsecq.pfkey import messages
from ipsecq.pfkey.constants import MessageType
from ipsecq.pfkey.extensions import Address, KeyExt, LifetimeExt, Sa, SpiRange
from ipsecq.pfkey.memory import MemoryDatabase
from ipsecq.pfkey.messages import Message, build
from ipsecq.pfkey.policyext import PolicyExt, Request
from ipsecq.pfkey.server import PfkeyServer
from ipsecq.pfkey.xextensions import Filter, NatPort, NatType, Sa2
from ipsecq.secret import Key

T = MessageType
A, B = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
A6, B6 = bytes(15) + b"\x01", bytes(15) + b"\x02"
NET1, NET2 = bytes((10, 1, 0, 0)), bytes((10, 2, 0, 0))

# In the peer: plays [client, hex, step to take a policy id from or null] and prints what every client got after each.
PLAYER = """
import json, socket, struct, sys
steps = json.load(sys.stdin)
clients = {n: socket.socket(15, 3, 2) for n in (1, 2)}
for s in clients.values(): s.settimeout(0.05)
out, ids = [], []
def policy_id(data):
    at = 16
    while at < len(data):
        words, kind = struct.unpack_from("=HH", data, at)
        if kind == 18: return data[at + 8:at + 12]
        at += words * 8
for client, text, source in steps:
    data = bytearray.fromhex(text)
    if source is not None: data[24:28] = ids[source] or bytes(4)
    error, replies = 0, {}
    try: clients[client].send(data)
    except OSError as e: error = e.errno
    for n, s in clients.items():
        replies[n] = []
        while True:
            try: replies[n].append(s.recv(65536))
            except OSError: break
    first = replies[client][0] if replies[client] else b""
    ids.append(policy_id(first))
    out.append([error, {n: [d.hex() for d in r] for n, r in replies.items()}])
print(json.dumps(out))
"""


@dataclass
class Step:
    name: str
    message: Message | bytes
    client: int = 1
    id_from: str | None = None


def host(address):
    return Address(address, len(address) * 8)


def add(spi, kind=T.ADD, src=A, dst=B, satype=3, **more):
    return Message(kind, satype, **{
        "seq": 5, "pid": 77, "sa": Sa(spi, 32, 1, 3, 12), "src": host(src), "dst": host(dst),
        "key_auth": KeyExt(Key(bytes(range(20)))), "key_encrypt": KeyExt(Key(bytes(16))), "sa2": Sa2(2, 9),
    } | more)  # fmt: skip


def named(kind, spi, src=A, dst=B, satype=3, **more):
    return Message(kind, satype, seq=6, pid=77, sa=Sa(spi), src=host(src), dst=host(dst), **more)


def getspi(low, high, satype=3, **more):
    return Message(T.GETSPI, satype, seq=4, pid=77, src=host(A), dst=host(B), spirange=SpiRange(low, high), **more)


def spd(kind=T.X_SPDADD, direction=2, requests=None, action=2, src=NET1, dst=NET2, prefix=16, protocol=255, **more):
    if requests is None:
        requests = [Request(50, 2, 2, 0, A, B)] if action == 2 else []
    return Message(kind, **{
        "seq": 8, "pid": 77,
        "src": src if isinstance(src, Address) else Address(src, prefix, protocol),
        "dst": dst if isinstance(dst, Address) else Address(dst, prefix, protocol),
        "policy": PolicyExt(action, direction, 0, 0x80000005, requests),
    } | more)  # fmt: skip


def by_id(kind, source):
    return Step(f"{kind.name} by id", Message(kind, seq=9, pid=77, policy=PolicyExt(0, 2)), id_from=source)


def header(kind, words=2, version=2, reserved=0, satype=0):
    return struct.pack("=BBBBHHII", version, kind, 0, satype, words, reserved, 7, 8)


LIMITS = {"lifetime_hard": LifetimeExt(10, 20000, 3600, 1800), "lifetime_soft": LifetimeExt(8, 16000, 3000, 1500)}
NATT = {"natt_type": NatType(2), "natt_sport": NatPort(4500), "natt_dport": NatPort(1024)}

SCRIPT = [
    # Errors of the base header: the kernel's send() fails, ours answers.
    Step("short", b"\2\12\0\0"),
    Step("version 1", header(10, version=1)),
    Step("type 0", header(0)),
    Step("type 25", header(25)),
    Step("reserved 1", header(10, reserved=1)),
    Step("length too large", header(10, words=3)),
    Step("length too small", header(10, words=1)),
    Step("extension of no words", header(3, words=3) + bytes(8)),
    Step("extension beyond the end", header(3, words=3) + struct.pack("=HHI", 2, 1, 0)),
    Step("extension twice", header(3, words=6) + struct.pack("=HHIQ", 2, 19, 0, 0) * 2),
    Step("unknown extension", header(10, words=3) + struct.pack("=HHI", 1, 99, 0)),
    # Empty databases.
    Step("dump of nothing", Message(T.DUMP, seq=1, pid=77)),
    Step("spddump of nothing", Message(T.X_SPDDUMP, seq=1, pid=77)),
    Step("flush of nothing", Message(T.FLUSH, seq=1, pid=77)),
    Step("spdflush of nothing", Message(T.X_SPDFLUSH, seq=1, pid=77)),
    Step("get of nothing", named(T.GET, 0x1000)),
    Step("delete of nothing", named(T.DELETE, 0x1000)),
    # Registration.
    Step("register esp", Message(T.REGISTER, 3, seq=2, pid=77)),
    Step("register esp again", Message(T.REGISTER, 3, seq=2, pid=77)),
    Step("register unspec", Message(T.REGISTER, 0, seq=2, pid=77)),
    Step("register type 10", Message(T.REGISTER, 10, seq=2, pid=77)),
    # SAs.
    Step("add", add(0x1000)),
    Step("add again", add(0x1000)),
    Step("add with limits", add(0x1001, **LIMITS)),
    Step("add with one limit", add(0x1002, lifetime_hard=LifetimeExt(1))),
    Step("add natt", add(0x1003, **NATT)),
    Step("add natt type 1", add(0x1004, natt_type=NatType(1))),
    Step("add v6", add(0x1005, src=A6, dst=B6)),
    Step("add mixed families", add(0x1006, src=A6)),
    Step("add transport", add(0x1007, sa2=Sa2(1, 0))),
    Step("add without sa2", add(0x1008, sa2=None)),
    Step("add mode any", add(0x1009, sa2=Sa2(0, 7))),
    Step("add mode 4", add(0x100A, sa2=Sa2(4, 7))),
    Step("add without key", add(0x100B, key_encrypt=None)),
    Step("add with short key", add(0x100C, key_encrypt=KeyExt(Key(bytes(15))))),
    Step("add unknown encryption", add(0x100D, sa=Sa(0x100D, 32, 1, 3, 99))),
    Step("add unknown authentication", add(0x100E, sa=Sa(0x100E, 32, 1, 77, 12))),
    Step("add encryption out of range", add(0x100F, sa=Sa(0x100F, 32, 1, 3, 254))),
    Step("add ah", add(0x1010, satype=2, sa=Sa(0x1010, 32, 1, 3, 0), key_encrypt=None)),
    Step("add ah without key", add(0x1011, satype=2, sa=Sa(0x1011, 32, 1, 3, 0), key_encrypt=None, key_auth=None)),
    Step("add ipcomp", add(0x1012, satype=9, sa=Sa(0x1012, 0, 1, 0, 2), key_encrypt=None, key_auth=None)),
    Step("add ospf", add(0x1013, satype=6)),
    Step("add unspec", add(0x1014, satype=0)),
    Step("add sha2", add(0x1015, sa=Sa(0x1015, 32, 1, 5, 12), key_auth=KeyExt(Key(bytes(32))))),
    Step("add window 64", add(0x1016, sa=Sa(0x1016, 64, 1, 3, 12))),
    Step("add flags", add(0x1017, sa=Sa(0x1017, 32, 1, 3, 12, 0xE0000001))),
    Step("add spi 200", add(200)),
    Step("add null", add(0x1018, sa=Sa(0x1018, 32, 1, 3, 11), key_encrypt=None)),
    Step("add aes-gcm", add(0x1019, sa=Sa(0x1019, 32, 1, 0, 20), key_auth=None, key_encrypt=KeyExt(Key(bytes(20))))),
    Step("get", named(T.GET, 0x1000)),
    Step("get by another client", named(T.GET, 0x1000), 2),
    Step("get with another source", named(T.GET, 0x1000, src=bytes((10, 0, 0, 9)))),
    Step("get without sa", Message(T.GET, 3, seq=6, pid=77, src=host(A), dst=host(B))),
    Step("get unspec", named(T.GET, 0x1000, satype=0)),
    Step("update limits", add(0x1000, T.UPDATE, **LIMITS)),
    Step("update other key", add(0x1015, T.UPDATE, sa=Sa(0x1015, 32, 1, 5, 12), key_auth=KeyExt(Key(b"x" * 32)))),
    Step("get after update", named(T.GET, 0x1015)),
    Step("update of nothing", add(0x3000, T.UPDATE)),
    Step("getspi", getspi(0x2000, 0x2000, sa2=Sa2(2, 9))),
    Step("getspi taken", getspi(0x2000, 0x2000)),
    Step("getspi empty range", getspi(0x2001, 0x2000)),
    Step("getspi unspec", getspi(0x2000, 0x2001, satype=0)),
    Step("getspi cpi too large", getspi(0x100, 0x10000, satype=9)),
    Step("getspi without addresses", Message(T.GETSPI, 3, seq=4, pid=77)),
    Step("get larval", named(T.GET, 0x2000)),
    Step("add larval", add(0x2000)),
    Step("update larval", add(0x2000, T.UPDATE)),
    Step("get matured", named(T.GET, 0x2000)),
    Step("dump", Message(T.DUMP, seq=1, pid=77)),
    Step("dump ah", Message(T.DUMP, 2, seq=1, pid=77), 2),
    Step("dump ospf", Message(T.DUMP, 6, seq=1, pid=77)),
    Step("dump filtered", Message(T.DUMP, seq=1, pid=77, filter=Filter(A + bytes(12), B + bytes(12), 2, 32, 31))),
    Step("delete", named(T.DELETE, 0x1000)),
    Step("delete without sa", Message(T.DELETE, 3, seq=6, pid=77, src=host(A), dst=host(B))),
    # Policies.
    Step("spdadd", spd()),
    Step("spdadd again", spd()),
    Step("spdupdate", spd(T.X_SPDUPDATE, action=0)),
    Step("spdsetidx", spd(T.X_SPDSETIDX, 1, src=NET2, dst=NET1)),
    Step("spdadd fwd", spd(direction=3, src=NET2, dst=NET1)),
    Step("spdadd direction 0", spd(direction=0)),
    Step("spdadd direction 4", spd(direction=4)),
    Step("spdadd type 3", spd(action=3, src=bytes((10, 3, 0, 0)))),
    Step("spdadd none", spd(action=1, src=bytes((10, 3, 0, 0)))),
    Step("spdadd transport unique", spd(requests=[Request(50, 1, 3, 7)], src=bytes((10, 4, 0, 0)))),
    Step("spdadd tcp ports", spd(action=1, src=Address(A, 32, 6, 80), dst=Address(B, 32, 6, 1024))),
    Step("spdadd v6", spd(action=0, src=bytes(16), dst=bytes(16), prefix=0)),
    Step("spdadd two", spd(requests=[Request(108, 2, 1, 0, A, B), Request(50, 1, 2)], src=bytes((10, 5, 0, 0)),
                           direction=1)),
    Step("spdadd use tunnel out", spd(requests=[Request(50, 2, 1, 0, A, B)], src=bytes((10, 6, 0, 0)))),
    Step("spdadd default level", spd(requests=[Request(51, 1, 0)], src=bytes((10, 7, 0, 0)))),
    Step("spdadd bad protocol", spd(requests=[Request(6, 1, 2)], src=bytes((10, 8, 0, 0)))),
    Step("spdadd mode 0", spd(requests=[Request(50, 0, 2)], src=bytes((10, 8, 0, 0)))),
    Step("spdadd tunnel without ends", spd(requests=[Request(50, 2, 2)], src=bytes((10, 8, 0, 0)))),
    Step("spdadd limits", spd(action=0, src=bytes((10, 9, 0, 0)), lifetime_hard=LifetimeExt(0, 0, 600, 0),
                              lifetime_soft=LifetimeExt())),
    Step("spdadd host bits", spd(action=1, src=bytes((10, 10, 1, 1)))),
    Step("spdadd without policy", spd(policy=None)),
    by_id(T.X_SPDGET, "spdadd"),
    Step("spdget by another", Message(T.X_SPDGET, seq=9, pid=78, policy=PolicyExt(0, 2)), 2, "spdadd"),
    Step("spddump", Message(T.X_SPDDUMP, seq=1, pid=77)),
    by_id(T.X_SPDDELETE2, "spdadd"),
    Step("spddelete2 again", Message(T.X_SPDDELETE2, seq=9, pid=77, policy=PolicyExt(0, 2)), 1, "spdadd"),
    Step("spddelete", spd(T.X_SPDDELETE, 1, src=NET2, dst=NET1)),
    Step("spddelete again", spd(T.X_SPDDELETE, 1, src=NET2, dst=NET1)),
    Step("spddelete fwd", spd(T.X_SPDDELETE, 3, src=NET2, dst=NET1)),
    # What is not for clients to send, and the rest.
    Step("expire", Message(T.EXPIRE, 3, seq=1, pid=77)),
    Step("pchange", Message(T.X_PCHANGE, 3, seq=1, pid=77)),
    Step("spdacquire", Message(T.X_SPDACQUIRE, seq=1, pid=77)),
    Step("spdexpire", Message(T.X_SPDEXPIRE, seq=1, pid=77)),
    Step("new mapping", Message(T.X_NAT_T_NEW_MAPPING, 3, seq=1, pid=77)),
    Step("acquire error of nothing", Message(T.ACQUIRE, 3, 110, seq=99, pid=77)),
    Step("acquire with more", Message(T.ACQUIRE, 3, 110, seq=99, pid=77, src=host(A))),
    Step("promisc on", Message(T.X_PROMISC, 1, seq=1, pid=77), 2),
    Step("get seen by promisc", named(T.GET, 0x1001)),
    Step("delete seen by promisc", named(T.DELETE, 0x1001)),
    Step("promisc 2", Message(T.X_PROMISC, 2, seq=1, pid=77)),
    Step("promisc off", Message(T.X_PROMISC, 0, seq=1, pid=77), 2),
    Step("flush ah", Message(T.FLUSH, 2, seq=1, pid=77)),
    Step("flush ospf", Message(T.FLUSH, 6, seq=1, pid=77)),
    Step("flush", Message(T.FLUSH, 0, seq=1, pid=77)),
    Step("spdflush", Message(T.X_SPDFLUSH, seq=1, pid=77), 2),
]  # fmt: skip

DIFFERENCES = [
    ("*", "proxy.*", "af_key adds the empty selector of its xfrm state as an address; we have no such thing"),
    ("register *", "supported_*", "we list what we have: AEADs, no DES, CAST or Blowfish, and IV lengths as they are"),
    ("add natt type 1", "errno", "draft encapsulation with a non-IKE marker (UDP_ENCAP_ESPINUDP_NON_IKE) is not here"),
    ("add window 64", "sa.replay", "af_key cuts the replay window to 32 packets; we take up to 255"),
    ("add *", "sa2.mode", "mode any stays any, as in BSD; af_key makes transport mode of it"),
    ("dump*", "sa2.mode", "mode any stays any, as in BSD; af_key makes transport mode of it"),
    ("add spi 200", "errno", "SPIs up to 255 are reserved (RFC 4303): refused"),
    ("add null", "errno", "null encryption needs no key extension of zero bits"),
    ("add aes-gcm", "errno", "AEADs have numbers in <linux/pfkeyv2.h>, but af_key cannot use them"),
    ("update *", "sa.state", "af_key describes its discarded copy of the update, which is DEAD, not the SA"),
    ("update other key", "errno", "af_key keeps the old key, and answers with the new one as if it had it: we refuse"),
    ("dump*", "only here", "what one side refused, it doesn't show"),
    ("dump*", "only there", "what one side refused, it doesn't show"),
    ("dump*", "sa.replay", "af_key cuts the replay window to 32 packets; we take up to 255"),
    ("spdadd use tunnel out", "errno", "level use for outbound tunnels is ipsec(4)'s; af_key refuses it"),
    ("spdadd default level", "policy.requests[[]0[]].level", "default stays default, for the *_deflev knobs to decide"),
    ("spdadd host bits", "src.address", "host bits behind the prefix are cleared at once"),
    ("spddump", "policy.requests[[]0[]].level", "default stays default, for the *_deflev knobs to decide"),
    ("spddump", "only here", "what one side refused, it doesn't show"),
    ("spddump", "only there", "host bits behind the prefix are cleared at once"),
]
"""(step, what, why): patterns of fnmatch."""


def octets(step):
    return step.message if isinstance(step.message, bytes) else build(step.message)


def play_here():
    """The script against our server: for each step (errno of send, {client: datagrams})."""
    tick = itertools.count()
    server = PfkeyServer(MemoryDatabase(), lambda: 1.7e9, lambda n: next(tick) % n)
    for client in (1, 2):
        server.open(client, privileged=True)
    played, ids = [], {}
    for step in SCRIPT:
        data = bytearray(octets(step))
        if step.id_from is not None:
            data[24:28] = struct.pack("=I", ids[step.id_from])
        got = {1: [], 2: []}
        for client, reply in server.handle(step.client, bytes(data)):
            got[client].append(reply)
        while rest := server.more(step.client, 10):
            got[step.client] += rest
        parsed = [messages.parse(reply, reply=True) for reply in got[step.client]]
        ids[step.name] = next((each.policy.id for each in parsed if each.policy), 0)
        played.append((0, got))
    return played


def play_there(peer):
    """The script against the kernel's af_key."""
    names = [step.name for step in SCRIPT]
    steps = [
        [step.client, octets(step).hex(), names.index(step.id_from) if step.id_from else None] for step in SCRIPT
    ]
    answer = json.loads(peer.run("/usr/bin/python3", "-c", PLAYER, stdin=json.dumps(steps), timeout=120).out)
    return [
        (error, {int(client): [bytes.fromhex(text) for text in replies] for client, replies in got.items()})
        for error, got in answer
    ]


def flat(value, prefix=""):
    """A message as {path: plain value}, without what no two systems can share: times, ids, reference counts."""
    if is_dataclass(value):
        found = {}
        for field in fields(value):
            path = f"{prefix}{field.name}"
            if path in ("reserved", "policy.id"):
                continue
            inner = getattr(value, field.name)
            if inner is None:
                continue
            if path == "lifetime_current.addtime":
                inner = bool(inner)
            found |= flat(inner, path if not is_dataclass(inner) else f"{path}.")
        return found
    if isinstance(value, list):
        found = {}
        for number, inner in enumerate(value):
            found |= flat(inner, f"{prefix}[{number}]" if not is_dataclass(inner) else f"{prefix}[{number}].")
        return found
    return {prefix: value.octets.hex() if isinstance(value, Key) else value}


def record_key(message):
    """What makes a record of a dump one and the same on both sides."""
    if message.sa is not None:
        return f"{message.satype}:{message.sa.spi:#x}:{message.dst.address.hex()}"
    return ":".join(f"{end.address.hex()}/{end.prefix}[{end.port}]" for end in (message.src, message.dst)) + (
        f":{message.src.protocol}:{message.policy.direction}"
    )


def difference(mine, other):
    """{path: (ours, theirs)} of two messages; only the errno when one is an error."""
    if mine.errno != other.errno:
        return {"errno": (mine.errno, other.errno)}
    left, right = flat(mine), flat(other)
    return {
        path: (left.get(path), right.get(path)) for path in {*left, *right} if left.get(path) != right.get(path)
    }


def compare(ours, theirs):
    """{(step, what): (ours, theirs)} of all that differs."""
    found = {}
    for step, (_, our_replies), (error, their_replies) in zip(SCRIPT, ours, theirs, strict=True):
        if error:  # send() itself failed; our socket answers instead
            mine = [reply[2] for reply in our_replies[step.client]]
            if mine != [error]:
                found[step.name, "errno"] = (mine, error)
            continue
        for client in (1, 2):
            if (step.name, "errno") in found:
                continue  # what others hear of a request that one side refused
            both = our_replies[client], their_replies[client]
            one, two = ([messages.parse(each, reply=True) for each in replies] for replies in both)
            if step.name.startswith(("dump", "spddump")) and len(one) > 1:
                assert (one[-1].seq, two[-1].seq) == (0, 0)
                mine, other = ({record_key(each): each for each in got} for got in (one, two))
                assert (len(mine), len(other)) == (len(one), len(two))
                for name, only in (("only here", mine.keys() - other), ("only there", other.keys() - mine.keys())):
                    if only:
                        found[step.name, name] = sorted(only)
                for key in mine.keys() & other.keys():
                    mine[key].seq = other[key].seq = 0
                    found |= {(step.name, path): value for path, value in difference(mine[key], other[key]).items()}
            elif [each.type for each in one] != [each.type for each in two]:
                found[step.name, f"replies to {client}"] = ([m.type for m in one], [m.type for m in two])
            else:
                for left, right in zip(one, two, strict=True):
                    found |= {(step.name, path): value for path, value in difference(left, right).items()}
    return found


def test_the_documentation_has_every_difference_with_its_reason():
    text = " ".join((Path(__file__).parents[2] / "docs" / "pfkey.md").read_text().split())
    for step, what, why in DIFFERENCES:
        assert why in text, (step, what)


@pytest.mark.root
@pytest.mark.uml
def test_af_key_and_we_answer_the_same_but_for_what_is_listed(kernel_peer):
    kernel_peer.peer.flush()
    found = compare(play_here(), play_there(kernel_peer.peer))
    used = set()
    unlisted = []
    for (step, what), value in found.items():
        rows = [row for row in DIFFERENCES if fnmatchcase(step, row[0]) and fnmatchcase(what, row[1])]
        used.update(rows)
        if not rows:
            unlisted.append((step, what, value))
    assert unlisted == []
    assert [row for row in DIFFERENCES if row not in used] == []
