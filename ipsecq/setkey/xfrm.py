"""What ``ip xfrm state`` and ``ip xfrm policy`` print, as sentences of setkey(8).

The two listings may follow each other in one text.  What has no counterpart becomes a comment that says why.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

# Names of Linux's crypto API; for AEADs and truncated hashes with the ICV in bits.
_ENCRYPTION: Final = {
    "cbc(aes)": "aes-cbc", "rfc3686(ctr(aes))": "aes-ctr", "ecb(cipher_null)": "null", "cbc(des3_ede)": "3des-cbc",
}  # fmt: skip
_AEAD: Final = {
    ("rfc4106(gcm(aes))", "128"): "aes-gcm-16", ("rfc4106(gcm(aes))", "96"): "aes-gcm-12",
    ("rfc4106(gcm(aes))", "64"): "aes-gcm-8", ("rfc7539esp(chacha20,poly1305)", "128"): "chacha20-poly1305",
}  # fmt: skip
_AUTHENTICATION: Final = {
    ("hmac(sha1)", "96"): "hmac-sha1", ("hmac(sha256)", "128"): "hmac-sha2-256", ("hmac(sha384)", "192"): "hmac-sha2-384",
    ("hmac(sha512)", "256"): "hmac-sha2-512", ("xcbc(aes)", "96"): "aes-xcbc-mac",
}  # fmt: skip


class _CannotError(Exception):
    """Why a record has no counterpart."""


@dataclass(slots=True)
class _Record:
    """One entry: the words of its first line, then those of each indented line with their depth."""

    head: list[str]
    lines: list[list[str]] = field(default_factory=list)

    def words(self, first: str) -> list[str]:
        """The line that begins with this word, without it; empty when there is none."""
        return next((line[1:] for line in self.lines if line[0] == first), [])


def convert(text: str) -> tuple[list[str], int]:
    """The sentences (and comments), and how many records have no counterpart."""
    states: list[str] = []
    policies: list[tuple[int, str]] = []
    comments: list[str] = []
    records = list(_records(text.splitlines()))
    inbound = {tuple(record.head) for record in records if record.words("dir")[:1] == ["in"]}
    for record in records:
        try:
            if record.words("dir"):
                if record.words("dir")[0] == "fwd" and tuple(record.head) in inbound:
                    continue  # `in` means forwarded packets, too
                policies.append(_policy(record))
            elif record.words("proto"):
                states.append(_state(record))
        except _CannotError as error:
            comments.append(f"# {' '.join(record.head)}: {error}")
    # Linux: the lower priority wins; here, among policies of one priority, the one that was added first.
    policies.sort(key=lambda each: each[0])
    return [*states, *(sentence for _, sentence in policies), *comments], len(comments)


def _records(lines: Iterable[str]) -> Iterable[_Record]:
    record = None
    for line in lines:
        words = line.split()
        if not words:
            continue
        if line[0] not in " \t":
            if record is not None:
                yield record
            record = _Record(words)
        elif record is not None:
            record.lines.append(words)
    if record is not None:
        yield record


def _pairs(words: list[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=False))


def _state(record: _Record) -> str:
    ends = _pairs(record.head)
    what = _pairs(["proto", *record.words("proto")])
    protocol, mode = what["proto"], what.get("mode", "transport")
    if protocol not in ("esp", "ah", "comp"):
        raise _CannotError(f"protocol {protocol}")
    if mode not in ("transport", "tunnel"):
        raise _CannotError(f"mode {mode}")
    encap = _pairs(record.words("encap"))
    src, dst = ends["src"], ends["dst"]
    name = {"comp": "ipcomp"}.get(protocol, protocol)
    if encap:
        if encap.get("type") != "espinudp":
            raise _CannotError(f"encapsulation {encap.get('type')}")
        src, dst, name = f"{src}[{encap['sport']}]", f"{dst}[{encap['dport']}]", "esp-udp"
    words = [f"add {src} {dst} {name} {what['spi']} -m {mode}"]
    if int(what.get("reqid", "0").split("(")[0]):
        words.append(f"-u {what['reqid'].split('(')[0]}")
    words += _window(record)
    algorithms = _algorithms(record)
    if not algorithms:
        raise _CannotError("no algorithm is shown: run ip xfrm state as root")
    return " ".join([*words, *algorithms, ";"])


def _window(record: _Record) -> list[str]:
    plain = record.words("replay-window")
    # With ESN, and windows above 32, the context says the size: "replay_window 128, bitmap-length 4".
    wide = next((line[1].rstrip(",") for line in record.lines if line[0] == "replay_window"), "")
    size = int(wide or (plain[0] if plain else 0))
    words = [f"-r {(size + 7) // 8}"] if size else []
    flags = plain[plain.index("flag") + 1 :] if "flag" in plain else []
    flags += record.words("flag")
    return [*words, "-esn"] if "esn" in flags else words


def _algorithms(record: _Record) -> list[str]:
    found: list[str] = []
    if aead := record.words("aead"):
        found.append(f"-E {_named(_AEAD, (aead[0], aead[2]))} {aead[1]}")
    if enc := record.words("enc"):
        key = "" if enc[0] == "ecb(cipher_null)" else f" {enc[1]}"
        found.append(f"-E {_named(_ENCRYPTION, enc[0])}{key}")
    if auth := record.words("auth-trunc"):
        found.append(f"-A {_named(_AUTHENTICATION, (auth[0], auth[2]))} {auth[1]}")
    elif auth := record.words("auth"):
        standard = next((bits for name, bits in _AUTHENTICATION if name == auth[0]), "")
        found.append(f"-A {_named(_AUTHENTICATION, (auth[0], standard))} {auth[1]}")
    if comp := record.words("comp"):
        if comp[0] != "deflate":
            raise _CannotError(f"compression {comp[0]}")
        found.append("-C deflate")
    return found


def _named(table: dict[object, str] | dict[str, str] | dict[tuple[str, str], str], key: object) -> str:
    name = table.get(key)  # type: ignore[call-overload]
    if name is None:
        raise _CannotError(f"algorithm {' '.join(key) if isinstance(key, tuple) else key} is not here")
    return str(name)


def _policy(record: _Record) -> tuple[int, str]:
    ends = _pairs(record.head)
    what = record.words("dir")
    direction = {"fwd": "in"}.get(what[0], what[0])
    rest = _pairs(what[1:])
    ports = [f"[{ends[name]}]" if name in ends else "[any]" for name in ("sport", "dport")]
    upper = ends.get("proto", "any")
    head = f"spdadd {ends['src']}{ports[0]} {ends['dst']}{ports[1]} {upper} -P {direction}"
    priority = int(rest.get("priority", "0"))
    if rest.get("action") == "block":
        return priority, f"{head} discard ;"
    rules: list[str] = []
    templates = [index for index, line in enumerate(record.lines) if line[0] == "tmpl"]
    for index in templates:
        outer = _pairs(record.lines[index][1:])
        inner = _pairs(record.lines[index + 1])
        mode, protocol = inner.get("mode", "transport"), {"comp": "ipcomp"}.get(inner["proto"], inner["proto"])
        if mode not in ("transport", "tunnel"):
            raise _CannotError(f"mode {mode}")
        ends_text = f"{outer['src']}-{outer['dst']}" if mode == "tunnel" else ""
        reqid = int(inner.get("reqid", "0").split("(")[0])
        level = "use" if inner.get("level") == "use" else f"unique:{reqid}" if 0 < reqid < 0x4000 else "require"
        rules.append(f"{protocol}/{mode}/{ends_text}/{level}")
    return priority, f"{head} ipsec {' '.join(rules)} ;" if rules else f"{head} none ;"
