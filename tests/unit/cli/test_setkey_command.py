"""``ipsecq setkey`` without a daemon: ``-n``, and the options that people of other systems type."""

import subprocess
import sys

import pytest

LEGACY = f"""add 192.0.2.1 192.0.2.2 esp 0x500 -E aes-gcm-16 0x{"00" * 20};
add 192.0.2.1 192.0.2.2 ah 0x501 -A hmac-md5 "0123456789abcdef";
"""
TEXT = """delete 192.0.2.1 192.0.2.2 esp 0x9999;
get 192.0.2.1 192.0.2.2 esp 0x9999;
spddelete 10.0.0.0/8 10.0.0.0/8 any -P in;
add 192.0.2.1 192.0.2.2 esp 5 -E aes-gcm-16 0x00;
  add 192.0.2.1 192.0.2.2 esp 0x501 -E aes-cbc 0x0011;
add 192.0.2.1 192.0.2.2 ah 0x503 -A hmac-sha1 "01234567890123456789";
add 192.0.2.1 192.0.2.2 ah 0x503 -A hmac-sha1 "01234567890123456789";
exit;
add 192.0.2.1 192.0.2.2 esp 5 -E aes-gcm-16 0x00;
"""


def setkey(*argv, **more):
    words = [sys.executable, "-m", "ipsecq", "setkey", *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, **more)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "ipsecq.toml"
    path.write_text(f'[daemon]\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n')
    return path


def test_n_names_every_sentence_that_a_load_would_refuse_and_no_other(tmp_path, config):
    file = tmp_path / "setkey.conf"
    file.write_text(TEXT)
    done = setkey("--config", config, "-n", "-f", file)
    places = [line.split(": ")[1] for line in done.stderr.splitlines()]
    assert (done.returncode, done.stdout) == (1, "")
    assert places == [f"{file}:4:1", f"{file}:5:3", f"{file}:7:1"]
    assert "0011" not in done.stderr


def test_n_goes_by_the_allow_legacy_of_the_configuration(tmp_path, config):
    refused = setkey("--config", config, "-n", "-c", input=LEGACY)
    assert (refused.returncode, "stdin:2:1: hmac-md5" in refused.stderr) == (1, True)
    config.write_text(config.read_text() + "allow_legacy = true\n")
    assert setkey("--config", config, "-n", "-c", input=LEGACY).stdout == "stdin: 2 sentences, no mistake\n"
    assert setkey("--config", tmp_path / "none.toml", "-n", "-c", input=LEGACY).returncode == 1


def test_options_of_ipsec_tools_are_taken_or_say_what_to_write(config):
    assert "setkey" in setkey("-?").stdout
    assert setkey("--config", config, "-k", "-r", "-N", "-n", "-c", input="flush;").returncode == 0
    file = setkey("messages.bin")
    assert (file.returncode, "-f messages.bin" in file.stderr) == (2, True)
