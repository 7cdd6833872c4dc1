"""What the engine puts on the wire, read by tshark: ESP with its keys, AH and IPComp around and inside it."""

import os
import shutil
import socket
import struct
import subprocess
from dataclasses import replace

import pytest
from engine_peers import udp

from ipsecq.engine.emit import Emissions
from ipsecq.engine.outbound import Outbound
from ipsecq.engine.standalone import build
from ipsecq.lab.cells import AEAD, IPCOMP, Cell, Ends, ah, esp, setkey
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey import apply, parser

pytestmark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs Debian package tshark")

CHAT = "2097152"
ENCRYPTION = {
    "aes-gcm-16": "AES-GCM with 16 octet ICV [RFC4106]",
    "aes-gcm-12": "AES-GCM with 12 octet ICV [RFC4106]",
    "aes-gcm-8": "AES-GCM with 8 octet ICV [RFC4106]",
    "aes-cbc": "AES-CBC [RFC3602]",
    "aes-ctr": "AES-CTR [RFC3686]",
    "3des-cbc": "TripleDES-CBC [RFC2451]",
    "null": "NULL",
}
"""tshark 4.0 knows neither AES-CCM, AES-GMAC nor ChaCha20-Poly1305 for ESP."""
AUTHENTICATION = {
    "": "NULL",
    "hmac-sha1": "HMAC-SHA-1-96 [RFC2404]",
    "hmac-md5": "HMAC-MD5-96 [RFC2403]",
    "hmac-sha2-256": "HMAC-SHA-256-128 [RFC4868]",
    "hmac-sha2-384": "HMAC-SHA-384-192 [RFC4868]",
    "hmac-sha2-512": "HMAC-SHA-512-256 [RFC4868]",
    "aes-cmac": "ANY 96 bit authentication [no checking]",
    "aes-xcbc-mac": "ANY 96 bit authentication [no checking]",
}
SUITES = [
    *AEAD[:3],
    *(esp("aes-cbc", mac) for mac in AUTHENTICATION if mac),
    esp("aes-ctr", "hmac-sha2-256"), esp("3des-cbc", "hmac-md5"), esp("null", "hmac-sha1"),
]  # fmt: skip
SHAPES = [("transport", 4, 4), ("transport", 6, 6), ("tunnel", 4, 4), ("tunnel", 6, 6), ("tunnel", 4, 6), ("tunnel", 6, 4)]
SIZES = (1, 2, 100, 1400)


def place(number):
    return {
        4: Ends(f"192.0.2.{number}", f"198.51.100.{number}", f"10.1.0.{number}", f"10.2.0.{number}"),
        6: Ends(f"2001:db8:a::{number:x}", f"2001:db8:b::{number:x}", f"fd00:1::{number:x}", f"fd00:2::{number:x}"),
    }


def ends_of(cell, number):
    outer, inner = place(number)[cell.outer], place(number)[cell.inner]
    if cell.mode == "transport":
        return Ends(outer.near_outer, outer.far_outer, outer.near_outer, outer.far_outer)
    return Ends(outer.near_outer, outer.far_outer, inner.near_inner, inner.far_inner)


def sealed(cell, ends):
    """The datagrams of one cell."""
    done = apply.apply(parser.parse(setkey(cell, ends)), Sad(), Spd(), now=1.0, allow_legacy=True)
    engine = Outbound(build(done.sad.dump(), done.spd.dump(), os.urandom), lambda _: 65535, lambda dst: bytes(len(dst)))
    emit = Emissions()
    for size in SIZES:
        engine.process(udp(ends.near_inner, ends.far_inner, bytes(size)), 1.0, emit)
    return emit.wire


def uat(cell, ends):
    """tshark's words for the cell's outbound ESP SA."""
    (number,) = (place for place, suite in enumerate(cell.suites) if suite.protocol == "esp")
    suite, (enc_key, auth_key) = cell.suites[number], cell.keys[number][0]
    known = AUTHENTICATION[suite.authentication]
    row = (
        f"IPv{cell.outer}", ends.near_outer, ends.far_outer, f"0x{cell.spi + 2 * number:08x}",
        ENCRYPTION[suite.encryption], f"0x{enc_key}" if enc_key else "",
        known, f"0x{auth_key}" if auth_key and "ANY" not in known else "",
    )  # fmt: skip
    return "uat:esp_sa:" + ",".join(f'"{field}"' for field in row)


def read(tmp_path, datagrams, options, fields):
    """tshark's fields of each datagram."""
    path = tmp_path / "wire.pcap"
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101))  # LINKTYPE_RAW
        for number, datagram in enumerate(datagrams):
            file.write(struct.pack("<IIII", number, 0, len(datagram), len(datagram)) + datagram)
    argv = ["tshark", "-r", str(path), "-T", "fields", *(word for option in options for word in ("-o", option))]
    argv += [word for field in fields for word in ("-e", field)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


DECODE = ("esp.enable_encryption_decode:TRUE", "esp.enable_authentication_check:TRUE")
FIELDS = [
    "frame.protocols", "udp.length", "esp.sequence", "esp.icv_good", "esp.icv_bad", "_ws.malformed",
    "_ws.expert.severity", "_ws.expert.message",
]  # fmt: skip


def check(tmp_path, cells):
    # tshark follows sequence numbers by SPI alone.
    cells = [replace(cell.keyed(), spi=0x2000 + 16 * number) for number, cell in enumerate(cells)]
    datagrams, options = [], list(DECODE)
    options += ["ip.check_checksum:TRUE", "udp.check_checksum:TRUE"]
    for number, cell in enumerate(cells, 1):
        ends = ends_of(cell, number)
        wire = sealed(cell, ends)
        assert len(wire) == len(SIZES)
        datagrams += wire
        if any(suite.protocol == "esp" for suite in cell.suites):
            options.append(uat(cell, ends))
    rows = read(tmp_path, datagrams, options, FIELDS)
    assert len(rows) == len(datagrams)
    for cell, four in zip(cells, zip(*[iter(rows)] * len(SIZES), strict=True), strict=True):
        lengths = [row[1].split(",")[-1] for row in four]
        assert lengths == [str(8 + size) for size in SIZES], (cell.name, four)  # it has found the datagram inside
        protected = [suite for suite in cell.suites if suite.protocol == "esp"]
        for place_, row in enumerate(four):
            for suite in {suite.protocol for suite in cell.suites}:
                compressed = suite != "ipcomp" or SIZES[place_] >= 100
                assert (f":{suite}" in row[0]) == compressed, (cell.name, row)
            if protected:
                assert row[2] == str(place_ + 1), (cell.name, row)
                checked = "ANY" not in AUTHENTICATION[protected[0].authentication]
                assert row[3:5] == [str(int(checked)), "0"], (cell.name, row)
            assert row[5] == "", (cell.name, row)
            assert set(row[6].split(",")) <= {"", CHAT}, (cell.name, *row)  # no note, warning or error


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}in{shape[2]}")
@pytest.mark.parametrize("natt", [False, True], ids=["esp", "esp-in-udp"])
def test_every_esp_that_tshark_knows_decrypts_with_a_good_icv(tmp_path, shape, natt):
    mode, inner, outer = shape
    check(tmp_path, [Cell((suite,), mode, outer, inner, natt=natt) for suite in SUITES])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}in{shape[2]}")
def test_bundles_read_cleanly_layer_by_layer(tmp_path, shape):
    mode, inner, outer = shape
    gcm, cbc = AEAD[0], esp("aes-cbc", "hmac-sha2-256")
    bundles = [
        (ah("hmac-sha2-256"),), (ah("hmac-sha2-512"),), (IPCOMP,), (IPCOMP, gcm), (IPCOMP, cbc),
        (gcm, ah("hmac-sha1")), (cbc, ah("hmac-sha2-384")), (IPCOMP, cbc, ah("hmac-sha2-256")),
    ]  # fmt: skip
    check(tmp_path, [Cell(bundle, mode, outer, inner) for bundle in bundles])


def test_the_check_sees_a_bad_icv(tmp_path):
    cell = Cell((esp("aes-cbc", "hmac-sha2-256"),)).keyed()
    ends = ends_of(cell, 1)
    spoiled = [wire[:-1] + bytes((wire[-1] ^ 1,)) for wire in sealed(cell, ends)]
    rows = read(tmp_path, spoiled, [*DECODE, uat(cell, ends)], ["esp.icv_bad"])
    assert [row[0] for row in rows] == ["1"] * len(SIZES)
    assert socket.inet_aton(ends.near_outer) == spoiled[0][12:16]
