"""SAs as ``ip xfrm state`` prints them, as sentences of setkey(8)."""

from __future__ import annotations

from typing import Final

from ipsecq.setkey.xfrm_record import CannotError, Line, Record, ends, is_passed_over, lifetimes, number, pairs

# Names of Linux's crypto API (net/xfrm/xfrm_algo.c); for AEADs and truncated hashes with the ICV in bits.
_ENCRYPTION: Final = {
    "cbc(aes)": "aes-cbc", "rfc3686(ctr(aes))": "aes-ctr", "ecb(cipher_null)": "null", "cbc(des3_ede)": "3des-cbc",
}  # fmt: skip
_AEAD: Final = {
    ("rfc4106(gcm(aes))", "128"): "aes-gcm-16", ("rfc4106(gcm(aes))", "96"): "aes-gcm-12",
    ("rfc4106(gcm(aes))", "64"): "aes-gcm-8", ("rfc4309(ccm(aes))", "128"): "aes-ccm-16",
    ("rfc4309(ccm(aes))", "96"): "aes-ccm-12", ("rfc4309(ccm(aes))", "64"): "aes-ccm-8",
    ("rfc4543(gcm(aes))", "128"): "aes-gmac", ("rfc7539esp(chacha20,poly1305)", "128"): "chacha20-poly1305",
}  # fmt: skip
_AUTHENTICATION: Final = {
    ("hmac(sha1)", "96"): "hmac-sha1", ("hmac(sha256)", "128"): "hmac-sha2-256", ("hmac(sha384)", "192"): "hmac-sha2-384",
    ("hmac(sha512)", "256"): "hmac-sha2-512", ("xcbc(aes)", "96"): "aes-xcbc-mac", ("cmac(aes)", "96"): "aes-cmac",
    ("hmac(md5)", "96"): "hmac-md5",
}  # fmt: skip
_NO_AUTHENTICATION: Final = "digest_null"
_LIFETIMES: Final = {"add": "l", "bytes": "b", "use": "u", "packets": "a"}
_REPLAY_LINE: Final = ("replay-window", "seq", "flag", "extra_flag")


def state(record: Record) -> str:
    """The ``add`` sentence.  CannotError where anything that the record says has no counterpart."""
    src, dst = ends(record.head)
    lines = {line.words[0]: line for line in record.lines if not is_passed_over(line)}
    if len(lines) != sum(not is_passed_over(line) for line in record.lines):
        raise CannotError("the same is said twice")
    what = pairs(lines.pop("proto").words, ("proto", "spi", "reqid", "mode"))
    protocol, mode = what["proto"], what.get("mode", "transport")
    if protocol not in ("esp", "ah", "comp"):
        raise CannotError(f"protocol {protocol}")
    if mode not in ("transport", "tunnel"):
        raise CannotError(f"mode {mode}")
    _check_selector(lines.pop("sel", None), src, dst, mode)
    name = {"comp": "ipcomp"}.get(protocol, protocol)
    if (encap := lines.pop("encap", None)) is not None:
        sport, dport = _encapsulation(encap.words[1:])
        src, dst, name = f"{src}[{sport}]", f"{dst}[{dport}]", "esp-udp"
    words = [f"add {src} {dst} {name} 0x{number(what['spi']):x} -m {mode}"]
    if reqid := number(what.get("reqid", "0")):
        words.append(f"-u {reqid}")
    # Linux fills AH over IPv4 up to 8 octets, unless told not to.
    flags = _flags(lines.get("replay-window"))
    if protocol == "ah" and ":" not in dst and "align4" not in flags:
        words.append("-align 8")
    words += _window(record, lines.pop("replay-window", None))
    if "esn" in flags:
        words.append("-esn")
    if (padding := lines.pop("tfcpad", None)) is not None:
        words.append(f"-tfc {number(padding.words[1])}")
    if (config := lines.pop("lifetime", None)) is not None:
        words += [f"-{_LIFETIMES[kind]}{which[0]} {value}" for (which, kind), value in _split(lifetimes(config))]
    algorithms = _algorithms(lines)
    lines.pop("dir", None)  # which way is in the addresses
    for line in lines.values():
        # No more of it: a line that nobody knows may hold a key.
        raise CannotError(f"'{' '.join(line.words[:2])}' has no counterpart")
    return " ".join([*words, *algorithms, ";"])


def _split(limits: dict[str, int]) -> list[tuple[tuple[str, str], int]]:
    return [((name.split()[0], name.split()[1]), value) for name, value in limits.items()]


def _check_selector(line: Line | None, src: str, dst: str, mode: str) -> None:
    """An SA's selector is let go where it narrows nothing: all addresses, or in transport mode the ends themselves."""
    if line is None:
        return
    said = pairs(line.words[1:], ("src", "dst", "uid"))
    near, far = said.get("src", ""), said.get("dst", "")
    everything = near in ("0.0.0.0/0", "::/0") and far in ("0.0.0.0/0", "::/0")
    width = 128 if ":" in dst else 32
    itself = mode == "transport" and (near, far) == (f"{src}/{width}", f"{dst}/{width}")
    if not (everything or itself) or said.get("uid", "0") != "0":
        raise CannotError(f"'{' '.join(line.words)}' has no counterpart: policies say what an SA is for")


def _encapsulation(words: list[str]) -> tuple[int, int]:
    said = pairs(words, ("type", "sport", "dport", "addr"))
    if said.get("type") != "espinudp":
        raise CannotError(f"encapsulation {said.get('type')}")
    if said.get("addr", "0.0.0.0") not in ("0.0.0.0", "::"):  # noqa: S104  # no address, rather than all
        raise CannotError(f"'addr {said['addr']}' (an original address): write -oai or -oar")
    return number(said["sport"]), number(said["dport"])


def _flags(line: Line | None) -> list[str]:
    """Flags that have a counterpart; CannotError for the first of the others."""
    found: list[str] = []
    name = ""
    for word in line.words if line is not None else ():
        if word in _REPLAY_LINE:
            name = word
        elif name in ("flag", "extra_flag") and not word.startswith("(0x"):
            if name == "extra_flag" or word not in ("esn", "af-unspec", "align4"):
                raise CannotError(f"'flag {word}' has no counterpart")
            found.append(word)
    return found


def _window(record: Record, line: Line | None) -> list[str]:
    # With ESN, and windows above 32, the context says the size: "replay_window 128, bitmap-length 4".
    wide = next(
        (part[1].rstrip(",") for each in record.lines for part in each.parts if part[0] == "replay_window"), ""
    )
    size = number(wide or (line.words[1] if line is not None else "0"))
    return [f"-r {(size + 7) // 8}"] if size else []


def _algorithms(lines: dict[str, Line]) -> list[str]:
    """The algorithms, taken out of ``lines``."""
    found: list[str] = []
    if (aead := lines.pop("aead", None)) is not None:
        words = aead.words
        found.append(f"-E {_named(_AEAD, (words[1], words[-1]))} {_key(words)}")
    if (enc := lines.pop("enc", None)) is not None:
        name = _named(_ENCRYPTION, enc.words[1])
        found.append(f"-E {name}" if name == "null" else f"-E {name} {_key(enc.words)}")
    cut, whole = lines.pop("auth-trunc", None), lines.pop("auth", None)
    if (auth := cut or whole) is not None and auth.words[1] != _NO_AUTHENTICATION:
        words = auth.words
        bits = words[-1] if cut else next((bits for name, bits in _AUTHENTICATION if name == words[1]), "")
        found.append(f"-A {_named(_AUTHENTICATION, (words[1], bits))} {_key(words)}")
    if (comp := lines.pop("comp", None)) is not None:
        if comp.words[1] != "deflate":
            raise CannotError(f"compression {comp.words[1]}")
        found.append("-C deflate")
    if not found:
        raise CannotError("no algorithm is shown: run ip xfrm state as root")
    return found


def _key(words: list[str]) -> str:
    if len(words) < 3 or not words[2].startswith("0x"):
        raise CannotError("no key is shown: run ip xfrm state as root, without nokeys")
    return words[2]


def _named(table: dict[str, str] | dict[tuple[str, str], str], key: object) -> str:
    name = table.get(key)  # type: ignore[call-overload]
    if name is None:
        raise CannotError(f"algorithm {' '.join(key) if isinstance(key, tuple) else key} is not here")
    return str(name)
