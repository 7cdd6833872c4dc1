"""Keys while the gateway runs: setkey, ACQUIRE and packets that wait, limits; over the real sockets."""

import secrets
import subprocess
import sys
import threading
import time

import pytest

from ipsecq.lab.capture import Capture
from ipsecq.lab.gateway import Gateway, start_all
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.topology import build, firewall
from ipsecq.lab.traffic import ping
from ipsecq.pfkey.client import PfkeyClient
from ipsecq.pfkey.constants import MessageType
from ipsecq.pfkey.messages import Message

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def pair():
    """Two gateways with policies in their files and no SAs."""
    with Lab() as lab:
        network = build(lab)
        gateways = []
        for near, far in (network.sites, network.sites[::-1]):
            firewall(near)
            text = (
                f"spdadd {near.lan4} {far.lan4} any -P out ipsec esp/tunnel/{near.wan4}-{far.wan4}/require;\n"
                f"spdadd {far.lan4} {near.lan4} any -P in ipsec esp/tunnel/{far.wan4}-{near.wan4}/require;\n"
            )
            gateways.append(Gateway(near.gateway, text))
        start_all(gateways)
        yield network, gateways


def sentences(network, more="", spi=0x2000):
    one, two = network.sites
    return "".join(
        f"add {near.wan4} {far.wan4} esp {spi + near.number} -m tunnel -r 4 {more}"
        f" -E aes-gcm-16 0x{secrets.token_hex(20)};\n"
        for near, far in ((one, two), (two, one))
    )


def setkey(gateway, text, *options, check=True):
    done = subprocess.run(
        gateway.space.argv((sys.executable, "-m", "ipsecq", "setkey", *options, "-c", "--config", str(gateway.config))),
        input=text, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(autouse=True)
def _no_sas(request):
    yield
    for gateway in request.getfixturevalue("pair")[1]:
        setkey(gateway, "flush;")


def events(client, kind, timeout=5.0):
    client.socket.settimeout(timeout)
    while True:
        message = client.receive()
        if message.type == kind:
            return message


def test_a_packet_without_an_sa_asks_for_one_waits_for_it_and_arrives(pair):
    network, gateways = pair
    one, two = network.sites
    with PfkeyClient.connect(gateways[0].directory / "run" / "pfkey") as client:
        client.request(Message(MessageType.REGISTER, 3))
        answered = []
        thread = threading.Thread(
            target=lambda: answered.append(one.host.run("ping", "-n", "-c", "1", "-W", "8", two.host4, check=False))
        )
        thread.start()
        acquire = events(client, MessageType.ACQUIRE)
        assert (acquire.src.address, acquire.dst.address) == (bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2)))
        assert acquire.seq
        assert acquire.proposal.combinations
        # More packets of the same kind ask nothing (and no more than are kept: the newest would push the first one out).
        ping(one.host, two.host4, count=3, wait=0.1)
        text = sentences(network)
        for gateway in gateways[::-1]:
            setkey(gateway, text)
        thread.join()
        assert "1 received" in answered[0].stdout
        with pytest.raises(TimeoutError):
            events(client, MessageType.ACQUIRE, timeout=0.3)


def test_the_packet_beyond_a_hard_limit_is_not_sent_and_the_listeners_hear_of_both_limits(pair):
    network, gateways = pair
    one, two = network.sites
    text = sentences(network, "-as 3 -ah 5")
    with PfkeyClient.connect(gateways[0].directory / "run" / "pfkey") as client:
        client.request(Message(MessageType.REGISTER, 3))
        for gateway in gateways:
            setkey(gateway, text)
        with Capture(one.gateway, "wan") as wire:
            assert ping(one.host, two.host4, count=3) == 3
            # A supervisor that looks when both limits are behind tells of the hard one alone.
            soft = [events(client, MessageType.EXPIRE) for _ in range(2)]
            assert ping(one.host, two.host4, count=9, wait=3) == 2
            hard = [events(client, MessageType.EXPIRE) for _ in range(2)]
            wire.settle()
        out = [frame.esp[1] for frame in wire.frames() if frame.esp and frame.esp[0] == 0x2001]
        assert out == [1, 2, 3, 4, 5]
        assert {message.sa.spi for message in soft if message.lifetime_soft is not None} == {0x2001, 0x2002}
        assert {message.sa.spi for message in hard if message.lifetime_hard is not None} == {0x2001, 0x2002}
        assert not [sa for sa in gateways[0].status()["sas"] if sa["spi"] == "0x00002001"]


def test_setkey_shows_what_it_added_in_the_words_of_setkey_and_keys_to_root_only(pair):
    network, gateways = pair
    setkey(gateways[0], "add 10.0.0.1 10.0.0.2 esp 0x3001 -m tunnel -r 40 -u 7 -E aes-cbc 0x00112233445566778899aabbccddeeff"
           " -A hmac-sha1 0x000102030405060708090a0b0c0d0e0f10111213;")  # fmt: skip
    shown = gateways[0].command("setkey", "-D").stdout
    assert "10.0.0.1 10.0.0.2\n\tesp mode=tunnel spi=12289(0x00003001) reqid=7(0x00000007)\n" in shown
    assert "\tE: aes-cbc  00112233 44556677 8899aabb ccddeeff\n" in shown
    assert "replay=40 " in shown
    assert "state=mature" in shown
    policies = gateways[0].command("setkey", "-D", "-P").stdout
    one, two = network.sites
    assert f"{one.lan4}[any] {two.lan4}[any] any\n\tout ipsec" in policies.replace(" ip4", " any") or "out ipsec" in policies
    # An unprivileged user does not get to the socket at all: its mode keeps it out.
    done = gateways[0].space.run(
        "setpriv", "--reuid", "65534", "--clear-groups", "cat", str(gateways[0].directory / "run" / "pfkey"), check=False
    )
    assert done.returncode != 0


def test_a_sentence_that_is_refused_is_named_by_line_and_column_and_the_rest_is_done(pair):
    _, gateways = pair
    text = (
        "add 10.0.0.1 10.0.0.2 esp 0x4001 -E null -A hmac-sha1 0x000102030405060708090a0b0c0d0e0f10111213;\n"
        "  delete 10.0.0.1 10.0.0.2 esp 0x4999;\n"
        "add 10.0.0.1 10.0.0.2 esp 0x4002 -E null -A hmac-sha1 0x000102030405060708090a0b0c0d0e0f10111213;\n"
    )
    done = setkey(gateways[0], text, check=False)
    assert done.returncode == 1
    assert "stdin:2:3: " in done.stderr
    assert {sa["spi"] for sa in gateways[0].status()["sas"]} == {"0x00004001", "0x00004002"}
    assert "000102" not in done.stderr

    setkey(gateways[0], "flush;")
    done = setkey(gateways[0], text, "--atomic", check=False)
    assert done.returncode != 0
    assert "stdin:2:3: " in done.stderr
    assert gateways[0].status()["sas"] == []

    done = setkey(gateways[0], "add 10.0.0.1 10.0.0.2 esp 0x4001 -E nonsense 0x00;\n", check=False)
    assert done.returncode == 2
    assert "stdin:1:" in done.stderr
    assert setkey(gateways[0], text, "-n").returncode == 0
    assert gateways[0].status()["sas"] == []


def test_listeners_hear_of_setkey_as_of_any_client(pair):
    network, gateways = pair
    with PfkeyClient.connect(gateways[0].directory / "run" / "pfkey") as client:
        setkey(gateways[0], sentences(network))
        assert {events(client, MessageType.ADD).sa.spi for _ in range(2)} == {0x2001, 0x2002}
        setkey(gateways[0], "flush;")
        assert events(client, MessageType.FLUSH).errno == 0


def test_a_dump_of_20_000_sas_reaches_a_slow_reader_whole_while_others_change_things(pair):
    _, gateways = pair
    key = secrets.token_hex(20)
    setkey(gateways[0], "".join(
        f"add 10.0.0.1 10.0.0.2 esp {0x10000 + n} -E aes-gcm-16 0x{key};\n" for n in range(20_000)
    ))  # fmt: skip
    wait_for(lambda: gateways[0].status()["sa_count"] == 20_000, "all SAs", 10)
    with PfkeyClient.connect(gateways[0].directory / "run" / "pfkey") as client:
        spis = []
        for number, message in enumerate(client.dump()):
            spis.append(message.sa.spi)
            if number % 4000 == 10:
                time.sleep(0.2)
                setkey(gateways[0], f"delete 10.0.0.1 10.0.0.2 esp {0x10000 + 19_999 - number};")
        assert sorted(spis) == list(range(0x10000, 0x10000 + 20_000))


def watch(gateway, *options, until):
    """The lines that a command that goes on for ever prints, until one of them holds a text."""
    argv = gateway.space.argv((sys.executable, "-m", "ipsecq", "setkey", *options, "--config", str(gateway.config)))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if until in line:
                break
            if len(lines) == 1 and "-D" not in options:  # it listens
                keys = f"-E aes-cbc 0x{'0f' * 16} -A hmac-sha2-256 0x{'5a' * 32}"
                setkey(gateway, f"add 10.0.0.1 10.0.0.2 esp 0x3055 -lh 600 -ls 500 {keys};")
        process.terminate()
    return lines


def test_setkey_shows_messages_and_sas_as_they_come_and_go(pair):
    _, gateways = pair
    shown = "".join(watch(gateways[0], "-xx", "-h", until="0a000002"))
    assert "SADB_ADD satype=3" in shown
    assert "spi=0x00003055" in shown
    assert shown.split()[0].replace(".", "").isdigit()
    assert "5a5a5a5a" not in shown
    lines = watch(gateways[0], "-D", "-l", until="00003055")
    assert lines[0].split() == ["time", "p", "s", "spi", "ltime", "src", "->", "dst"]
    assert lines[-1].split()[1:4] == ["esp", "M", "00003055"]
    assert "/600" in lines[-1]
    assert gateways[0].command("setkey", "-D", "-P", "-t").stdout == "No SPD entries.\n"
    assert gateways[0].command("setkey", "-D", "-P", "-g", "-r").stdout != "No SPD entries.\n"
