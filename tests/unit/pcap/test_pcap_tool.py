"""Captures through ``ipsecq pcap``: every link type and both formats, tshark's opinion, bad files, bounded memory."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys

import pytest
from engine_peers import udp
from typer.testing import CliRunner

from ipsecq.cli.pcap import app
from ipsecq.errors import CaptureError, ConfigError
from ipsecq.packet import fragments
from ipsecq.pcap import links
from ipsecq.pcap.format import Reader, Record, Writer

GCM = "-E aes-gcm-16 0x" + "11" * 20
CBC = "-E aes-cbc 0x" + "22" * 16 + " -A hmac-sha2-256 0x" + "33" * 32
TIME = 1_700_000_000_123_456_000
SECTION = struct.pack("<IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
LINKS = sorted(links.NAMES)


def config(algorithms: str = GCM, a: str = "192.0.2.1", b: str = "192.0.2.2", spi: int = 0x1001, extra: str = "") -> str:
    ends, back = f"esp/tunnel/{a}-{b}/require", f"esp/tunnel/{b}-{a}/require"
    return (
        f"add {a} {b} esp {spi} -m tunnel {extra} {algorithms};\nadd {b} {a} esp {spi + 1} -m tunnel {extra} {algorithms};\n"
        f"spdadd 10.1.0.0/24 10.2.0.0/24 any -P out ipsec {ends};\n"
        f"spdadd 10.2.0.0/24 10.1.0.0/24 any -P out ipsec {back};\n"
        f"spdadd fd01::/64 fd02::/64 any -P out ipsec {ends};\n"
    )


def frame(link: int, packet: bytes) -> bytes:
    six = packet[0] >> 4 == 6
    kind = b"\x86\xdd" if six else b"\x08\x00"
    if link == links.ETHERNET:
        return b"\2" * 6 + b"\4" * 6 + b"\x88\xa8\0\5\x81\0\0\7" + kind + packet
    if link == links.SLL:
        return bytes((0, 0, 0, 1, 0, 6)) + b"\2" * 6 + b"\0\0" + kind + packet
    if link == links.SLL2:
        return kind + b"\0\0" + bytes(4) + b"\0\1\0\6" + b"\2" * 6 + b"\0\0" + packet
    if link == links.NULL:
        return (30 if six else 2).to_bytes(4, "little") + packet
    if link == links.LOOP:
        return (24 if six else 2).to_bytes(4, "big") + packet
    if link == links.ENC:
        return (24 if six else 2).to_bytes(4, "little") + bytes(8) + packet
    return packet


def capture(path, packets, link=links.RAW, *, pcapng=False, nanoseconds=True, wire=0):
    with path.open("wb") as stream:
        writer = Writer(stream, pcapng=pcapng, nanoseconds=nanoseconds, link=link)
        for number, packet in enumerate(packets):
            writer.write(Record(TIME + number * 1_001_000, link, frame(link, packet), wire))


def records(path) -> list[Record]:
    with path.open("rb") as stream:
        return list(Reader(stream, str(path)))


def datagrams(path) -> list[bytes]:
    return [record.data[links.locate(record.link, record.data) :] for record in records(path)]


def call(*argv: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(each) for each in argv])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def conf(tmp_path):
    path = tmp_path / "setkey.conf"
    path.write_text(config())
    return path


FOUR = [udp("10.1.0.2", "10.2.0.2", bytes(size)) for size in (0, 1, 700, 1400, 9000)]


@pytest.mark.parametrize("pcapng", [False, True], ids=["pcap", "pcapng"])
@pytest.mark.parametrize("link", LINKS)
def test_what_was_encrypted_decrypts_to_the_same_frames(tmp_path, conf, link, pcapng):
    packets = [udp("fd01::2", "fd02::2", b"six")] if link == links.IPV6 else FOUR
    if link == links.IPV6:
        conf.write_text(config(a="2001:db8::1", b="2001:db8::2"))
    capture(tmp_path / "clear", packets, link, pcapng=pcapng)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    protected = datagrams(tmp_path / "esp")
    assert [p[9 if p[0] >> 4 == 4 else 6] for p in protected] == [50] * len(packets)
    output = call("decrypt", "-c", conf, tmp_path / "esp", tmp_path / "again")
    assert f"{len(packets)} decrypted" in output
    clear = records(tmp_path / "clear")
    assert records(tmp_path / "again") == [record._replace(link=links.written_as(link)) for record in clear]


@pytest.mark.parametrize("link", [link for link in LINKS if link not in (links.IPV4, links.IPV6)])
def test_the_link_header_names_the_inner_packet_of_a_mixed_tunnel(tmp_path, conf, link):
    six = [udp("fd01::2", "fd02::2", bytes(100))]
    capture(tmp_path / "clear", six, link)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    (outer,) = records(tmp_path / "esp")
    assert outer.data[links.locate(link, outer.data)] >> 4 == 4
    call("decrypt", "-c", conf, tmp_path / "esp", tmp_path / "again")
    assert datagrams(tmp_path / "again") == six


@pytest.mark.parametrize("nanoseconds", [False, True])
def test_times_keep_their_resolution(tmp_path, conf, nanoseconds):
    capture(tmp_path / "clear", FOUR[:3], nanoseconds=nanoseconds)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    assert (tmp_path / "clear").read_bytes()[:4] == (tmp_path / "esp").read_bytes()[:4]
    assert [r.time for r in records(tmp_path / "esp")] == [TIME, TIME + 1_001_000, TIME + 2_002_000]


def test_fragmented_outer_datagrams_are_put_together(tmp_path, conf):
    capture(tmp_path / "clear", FOUR)
    call("encrypt", "-c", conf, "--mtu", 1000, tmp_path / "clear", tmp_path / "esp")
    protected = datagrams(tmp_path / "esp")
    assert max(map(len, protected)) <= 1000
    assert len(protected) > len(FOUR)
    call("decrypt", "-c", conf, tmp_path / "esp", tmp_path / "again")
    assert datagrams(tmp_path / "again") == FOUR


def test_others_are_left_out_unless_they_are_wanted(tmp_path, conf):
    other = udp("198.51.100.1", "198.51.100.2", bytes(3000))
    pieces = fragments.fragment(other, 1500, 7)
    capture(tmp_path / "clear", [FOUR[0], other], links.ETHERNET)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    assert len(datagrams(tmp_path / "esp")) == 1
    mixed = [*datagrams(tmp_path / "esp"), *pieces, b"\x60no IP"]
    capture(tmp_path / "mixed", mixed, links.ETHERNET)
    call("decrypt", "-c", conf, tmp_path / "mixed", tmp_path / "some")
    assert datagrams(tmp_path / "some") == FOUR[:1]
    call("decrypt", "-c", conf, "--keep-others", tmp_path / "mixed", tmp_path / "all")
    assert datagrams(tmp_path / "all") == [FOUR[0], other, b"\x60no IP"]


def test_the_report_says_for_each_sa_what_failed_and_verbose_says_why(tmp_path, conf):
    conf.write_text(config(extra="-r 8"))
    capture(tmp_path / "clear", FOUR)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    good = datagrams(tmp_path / "esp")
    bad = good[1][:-1] + bytes((good[1][-1] ^ 1,))
    strange = good[0][:20] + b"\0\0\x77\x77" + good[0][24:]
    astray = good[0][:16] + bytes((192, 0, 2, 9)) + good[0][20:]
    capture(tmp_path / "esp", [good[0], bad, strange, good[0], astray, good[2]])
    output = call("decrypt", "-v", "-c", conf, tmp_path / "esp", tmp_path / "out")
    assert "esp 0x00001001 192.0.2.1 > 192.0.2.2: 2 decrypted, 1 ICV failures, 1 replays, 0 other drops" in output
    assert "esp 0x00007777 to 192.0.2.2: 1 with this unknown SPI" in output
    lines = [line for line in output.splitlines() if "DROPPED" in line]
    assert [line.split("DROPPED: ")[1] for line in lines] == [
        "ICV failure: another key or algorithm, or altered on the way",
        "unknown SPI",
        "replay: seen before, or left of the window",
        "unknown SPI: the SA with this SPI is for destination 192.0.2.2",
    ]
    again = call("decrypt", "--no-replay", "-c", conf, tmp_path / "esp")
    assert "3 decrypted, 1 ICV failures, 0 replays" in again


def test_text_mode_is_a_line_for_each_packet(tmp_path, conf):
    capture(tmp_path / "clear", [*FOUR[:2], udp("10.9.0.1", "10.9.0.2", b"")])
    call("encrypt", "-c", conf, "--keep-others", tmp_path / "clear", tmp_path / "esp")
    output = call("decrypt", "--text", "-c", conf, tmp_path / "esp").splitlines()
    assert output[1] == (
        "2023-11-14T22:13:20.124457Z 192.0.2.1 > 192.0.2.2 ESP spi=0x00001001 seq=2, 84 octets -> "
        "10.1.0.2.1000 > 10.2.0.2.2000 UDP, 29 octets"
    )
    assert output[2].endswith("10.9.0.1.1000 > 10.9.0.2.2000 UDP, 28 octets -> not protected")


@pytest.mark.parametrize("algorithms", [CBC, "-E aes-ctr 0x" + "44" * 20 + " -A hmac-sha1 0x" + "55" * 20])
def test_a_lost_authentication_key_is_no_obstacle_when_told_so(tmp_path, conf, algorithms):
    conf.write_text(config(algorithms))
    capture(tmp_path / "clear", FOUR)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    name = "hmac-sha2-256" if "sha2" in algorithms else "hmac-sha1"
    conf.write_text(config(algorithms.split("-A")[0] + f'-A {name} ""'))
    with pytest.raises(ConfigError, match="key of 0 bits"):
        call("decrypt", "-c", conf, tmp_path / "esp", tmp_path / "again")
    call("decrypt", "--no-auth", "-c", conf, tmp_path / "esp", tmp_path / "again")
    assert datagrams(tmp_path / "again") == FOUR


def test_no_auth_still_refuses_what_fails_under_a_key_that_is_there(tmp_path, conf):
    capture(tmp_path / "clear", FOUR[:1])
    conf.write_text(config(CBC))
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    conf.write_text(config(CBC.replace("33", "34")))
    assert "1 ICV failures" in call("decrypt", "--no-auth", "-c", conf, tmp_path / "esp", status=1)


@pytest.mark.parametrize("port", [4500, 34567])
def test_esp_in_udp_is_opened_on_the_ports_of_the_sa_in_both_directions(tmp_path, conf, port):
    text = (
        f"add 192.0.2.1[4500] 192.0.2.2[{port}] esp-udp 0x1001 -m tunnel {GCM};\n"
        f"add 192.0.2.2[{port}] 192.0.2.1[4500] esp-udp 0x1002 -m tunnel {GCM};\n"
    )
    conf.write_text(text + "".join(line + "\n" for line in config().splitlines() if line.startswith("spdadd 10")))
    both = [FOUR[2], udp("10.2.0.9", "10.1.0.9", b"back")]
    capture(tmp_path / "clear", both)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    capture(tmp_path / "esp2", [*datagrams(tmp_path / "esp"), udp("192.0.2.1", "192.0.2.2", b"\xff", dport=port)])
    output = call("decrypt", "--text", "-c", conf, tmp_path / "esp2", tmp_path / "again")
    assert "a NAT keepalive" in output
    assert f"192.0.2.1.4500 > 192.0.2.2.{port} ESP in UDP spi=0x00001001 seq=1" in output
    assert datagrams(tmp_path / "again") == both


def test_a_packet_that_the_snap_length_cut_is_named_so(tmp_path, conf):
    capture(tmp_path / "clear", FOUR[2:3])
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    whole = datagrams(tmp_path / "esp")[0]
    capture(tmp_path / "cut", [whole[:96]], wire=len(whole))
    assert "cut off by the snap length" in call("decrypt", "-v", "-c", conf, tmp_path / "cut", status=1)


def test_a_missing_sa_is_named_when_encrypting(tmp_path, conf):
    capture(tmp_path / "clear", FOUR[:1])
    conf.write_text("".join(line for line in config().splitlines(True) if line.startswith("spdadd")))
    output = call("encrypt", "-v", "-c", conf, tmp_path / "clear", tmp_path / "esp", status=1)
    assert "DROPPED: no esp SA from 192.0.2.1 to 192.0.2.2" in output


def test_lifetimes_and_times_that_run_backwards_do_not_matter(tmp_path, conf):
    conf.write_text(config(extra="-lh 1 -bh 10"))
    capture(tmp_path / "clear", FOUR)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    late = records(tmp_path / "esp")
    with (tmp_path / "odd").open("wb") as stream:
        writer = Writer(stream, pcapng=True)
        for number, record in enumerate(late):
            writer.write(record._replace(time=(0, 2**64 - 1, -5, 7, 10**18)[number]))
    call("decrypt", "--text", "-c", conf, tmp_path / "odd", tmp_path / "again")
    assert datagrams(tmp_path / "again") == FOUR


def test_status_is_1_when_nothing_was_there_to_do(tmp_path, conf):
    capture(tmp_path / "empty", [])
    assert "0 packets: 0 decrypted" in call("decrypt", "-c", conf, tmp_path / "empty", status=1)


def test_the_input_is_never_overwritten(tmp_path, conf):
    capture(tmp_path / "clear", FOUR)
    before = (tmp_path / "clear").read_bytes()
    with pytest.raises(CaptureError, match="is the input, too"):
        call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "clear")
    assert (tmp_path / "clear").read_bytes() == before


# -- bad files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pcapng", [False, True], ids=["pcap", "pcapng"])
def test_every_truncation_is_one_line_and_what_came_before_is_kept(tmp_path, conf, pcapng):
    capture(tmp_path / "clear", FOUR[:2], pcapng=pcapng)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    data = (tmp_path / "esp").read_bytes()
    with (tmp_path / "esp").open("rb") as stream:
        reader = Reader(stream, "esp")
        boundaries = {reader.position} | ({28, 60} if pcapng else set())
        boundaries.update(reader.position for _ in reader)
    kept = set()
    for size in range(len(data)):
        read, message = [], ""
        try:
            read.extend(Reader(io.BytesIO(data[:size]), "esp"))
        except CaptureError as error:
            message = str(error)
        assert "\n" not in message
        assert message.startswith("esp: ") or (size in boundaries and not message)
        kept.add(len(read))
    assert kept == {0, 1}
    (tmp_path / "esp").write_bytes(data[:-3])
    with pytest.raises(CaptureError, match="packet 2: the file ends in the middle"):
        call("decrypt", "-c", conf, tmp_path / "esp", tmp_path / "again")
    assert len(datagrams(tmp_path / "again")) == 1


@pytest.mark.parametrize(
    ("octets", "message"),
    [
        (b"", "truncated"),
        (b"GIF89a", "neither pcap nor pcapng: it begins with 0x47494638"),
        (b"\x1f\x8b\x08\x00", "is compressed: use 'gunzip' on it first"),
        (struct.pack("<IHHIIII", 0xA1B2C3D4, 9, 0, 0, 0, 0, 1), "pcap version 9.0"),
        (struct.pack("<IHHIIII", 0xA1B2CD34, 2, 4, 0, 0, 0, 1), "Kuznetsov"),
        (struct.pack("<IHHIIIIIIII", 0xA1B2C3D4, 2, 4, 0, 0, 0, 1, 0, 0, 1 << 30, 1 << 30), "a packet of 1073741824 octets"),
        (struct.pack("<III", 0x0A0D0D0A, 28, 0), "byte-order magic"),
        (SECTION + struct.pack("<III16xI", 6, 32, 0, 32), "not described"),
        (SECTION + struct.pack("<II", 6, 5), "a block of 5 octets"),
        (SECTION + struct.pack("<III", 99, 12, 16), "says 16 at its end"),
    ],
)  # fmt: skip
def test_what_is_no_capture_is_refused_with_the_reason(octets, message):
    with pytest.raises(CaptureError, match=message.replace("(", r"\(")):
        list(Reader(io.BytesIO(octets), "file"))


def test_big_endian_and_odd_time_units_are_read():
    header = struct.pack(">IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 0x20000065)
    old = header + struct.pack(">IIII", 5, 7, 3, 9) + b"abc"
    assert list(Reader(io.BytesIO(old), "old")) == [Record(5_000_007_000, 101, b"abc", 9)]
    section = struct.pack(">IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    options = struct.pack(">HHB3xHHqHH", 9, 1, 0x8A, 14, 8, -1, 0, 0)
    interface = struct.pack(">IIHHI", 1, 20 + len(options), 276, 0, 0) + options + struct.pack(">I", 20 + len(options))
    unknown = struct.pack(">IIII", 4, 16, 0, 16)
    packet = struct.pack(">IIIIIII4sI", 6, 36, 0, 0, 2048 + 512, 3, 3, b"xyz\0", 36)
    new = section + interface + unknown + packet
    assert list(Reader(io.BytesIO(new * 2), "new")) == [Record(1_500_000_000, 276, b"xyz", 3)] * 2


# -- by other eyes -----------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")
@pytest.mark.parametrize(
    ("algorithms", "row"),
    [
        pytest.param(GCM, ("AES-GCM with 16 octet ICV [RFC4106]", "0x" + "11" * 20, "NULL", ""), id="aes-gcm"),
        pytest.param(
            CBC, ("AES-CBC [RFC3602]", "0x" + "22" * 16, "HMAC-SHA-256-128 [RFC4868]", "0x" + "33" * 32), id="aes-cbc-hmac"
        ),
    ],
)
@pytest.mark.parametrize("pcapng", [False, True], ids=["pcap", "pcapng"])
def test_tshark_decrypts_what_we_encrypted(tmp_path, conf, algorithms, row, pcapng):
    conf.write_text(config(algorithms))
    capture(tmp_path / "clear", FOUR[:4], links.ETHERNET, pcapng=pcapng)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "esp")
    fields = '","'.join(("IPv4", "192.0.2.1", "192.0.2.2", "0x00001001", *row))
    done = subprocess.run(
        ["tshark", "-r", tmp_path / "esp", "-o", "esp.enable_encryption_decode:TRUE",
         "-o", "esp.enable_authentication_check:TRUE", "-o", f'uat:esp_sa:"{fields}"', "-T", "fields",
         "-e", "ip.src", "-e", "udp.length", "-e", "esp.icv_good", "-e", "esp.sequence", "-e", "_ws.malformed",
         "-e", "_ws.expert.severity", "-e", "_ws.expert.message"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["192.0.2.1,10.1.0.2"] * 4, done.stdout + done.stderr
    assert [line[1] for line in lines] == ["8", "9", "708", "1408"]
    assert {line[2] for line in lines} == {"1"}
    assert [line[3] for line in lines] == ["1", "2", "3", "4"]
    assert not [line[4:] for line in lines if line[4] or line[5] not in ("", "2097152")], done.stdout


_PEAK = r"""
import re, sys
from typer.testing import CliRunner
from ipsecq.cli.pcap import app
status = CliRunner().invoke(app, sys.argv[1:]).exit_code
# Not getrusage: its maximum counts what the parent had before exec.
print(status, re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


def test_memory_does_not_grow_with_the_file(tmp_path, conf):
    capture(tmp_path / "small", FOUR[3:4])
    large = [FOUR[3], udp("10.1.0.3", "10.2.0.3", bytes(1400))] * 20_000
    capture(tmp_path / "large", large)
    call("encrypt", "-c", conf, tmp_path / "large", tmp_path / "large-esp")
    call("encrypt", "-c", conf, tmp_path / "small", tmp_path / "small-esp")
    assert os.path.getsize(tmp_path / "large-esp") > 55_000_000
    peaks = []
    for name in ("small", "large"):
        argv = ["decrypt", "-c", conf, tmp_path / f"{name}-esp", tmp_path / "out"]
        done = subprocess.run([sys.executable, "-c", _PEAK, *map(str, argv)], capture_output=True, text=True, check=True)
        status, peak = done.stdout.split()
        assert status == "0", done.stderr
        peaks.append(int(peak))
    assert len(records(tmp_path / "out")) == len(large)
    assert peaks[1] - peaks[0] < 4096, f"KiB at most: {peaks}"


@pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")
@pytest.mark.parametrize("mode", ["transport", "tunnel"])
@pytest.mark.parametrize(
    ("protocol", "keys", "layer"),
    [
        ("ah", "-A hmac-sha2-256 0x" + "33" * 32, "ah"),
        ("ah", "-A hmac-sha2-512 0x" + "33" * 64, "ah"),
        ("ipcomp", "-C deflate", "ipcomp"),
    ],
)
def test_tshark_finds_nothing_wrong_with_our_ah_and_ipcomp(tmp_path, conf, protocol, keys, layer, mode):
    lines, packets = [], []
    for a, b in (("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")):
        ends = f"{a}-{b}" if mode == "tunnel" else ""
        lines += [
            f"add {a} {b} {protocol} 0x1001 -m {mode} {keys};",
            f"spdadd {a} {b} udp -P out ipsec {protocol}/{mode}/{ends}/require;",
        ]
        packets += [udp(a, b, bytes(size)) for size in (100, 1400)]
    conf.write_text("\n".join(lines))
    capture(tmp_path / "clear", packets)
    call("encrypt", "-c", conf, tmp_path / "clear", tmp_path / "out")
    fields = ["frame.protocols", "udp.length", "_ws.malformed", "_ws.expert.severity", "_ws.expert.message"]
    done = subprocess.run(
        ["tshark", "-r", tmp_path / "out", "-T", "fields", *(word for each in fields for word in ("-e", each))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == len(packets)
    for row in rows:
        assert f":{layer}" in row[0], row
        assert row[1] in ("108", "1408"), row  # tshark has found the datagram inside
        assert row[2:] in (["", "", ""], ["", "2097152", row[4]]), row  # at most a "chat", no note, warning or error
