"""What is installed: the Debian package, and make install into a scratch root."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.root, pytest.mark.seconds(600)]


def run(*argv, check=True, **more):
    done = subprocess.run([str(each) for each in argv], capture_output=True, text=True, check=False, cwd=ROOT, **more)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_package_holds_what_an_administrator_looks_for(package):
    listing = {line.split()[5]: line.split() for line in run("dpkg-deb", "-c", package).splitlines()}
    assert all(words[1] == "root/root" for words in listing.values())
    assert not [path for path, words in listing.items() if "w" in words[0][4:] and words[0][0] != "l"], "writable by others"
    for path in (
        "./etc/ipsecq/ipsecq.toml", "./usr/bin/ipsecq", "./usr/lib/ipsecq/bin/ipsecq",
        "./lib/systemd/system/ipsecq.service", "./lib/systemd/system/ipsecq-nft.service",
        "./lib/systemd/system/ipsecq-iked.service", "./usr/share/man/man8/ipsecq.8.gz",
        "./usr/share/man/man5/ipsecq.conf.5.gz", "./usr/share/bash-completion/completions/ipsecq",
        "./usr/share/zsh/vendor-completions/_ipsecq", "./usr/share/fish/vendor_completions.d/ipsecq.fish",
        "./usr/share/doc/ipsecq/copyright", "./usr/share/doc/ipsecq/docs/guide.md", "./usr/share/ipsecq/setkey.conf",
    ):  # fmt: skip
        assert path in listing
    assert not [path for path in listing if "/scapy" in path or path.endswith("/pip/")]
    assert "./etc/ipsecq/setkey.conf" not in listing, "keys are no conffile"


def test_lintian_has_nothing_to_say(package):
    assert run("lintian", "--allow-root", "--tag-display-limit", "0", package, check=False) == ""


def test_the_package_runs_where_it_is_unpacked(package, tmp_path):
    run("dpkg-deb", "-x", package, tmp_path)
    (tmp_path / "usr/bin/python3").symlink_to("/usr/bin/python3")
    # -I: nothing of this checkout helps it.
    python = tmp_path / "usr/lib/ipsecq/bin/python"
    assert run(python, "-I", tmp_path / "usr/bin/ipsecq", "version").startswith("ipsecq ")
    script = "import numpy.linalg, netfilterqueue, ipsecq.daemon.worker, ipsecq.daemon.supervisor, sys; print(sys.prefix)"
    assert run(python, "-I", "-c", script).strip() == str(tmp_path / "usr/lib/ipsecq")
    for unit in ("ipsecq", "ipsecq-nft"):
        text = (tmp_path / f"lib/systemd/system/{unit}.service").read_text()
        assert "/usr/bin/ipsecq" in text
        assert "/usr/local" not in text
        assert "/opt/" not in text


def everything(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def test_make_uninstall_leaves_configuration_and_nothing_else(tmp_path):
    places = {"PREFIX": "/srv/ipsecq", "BIN": "/usr/bin", "ETC": "/srv/etc", "UNITS": "/units", "SHARE": "/share"}
    argv = ["make", "-s", f"DESTDIR={tmp_path}", *(f"{name}={value}" for name, value in places.items())]
    environment = {**os.environ, "MAKEFLAGS": ""}
    run(*argv, "install", env=environment)
    assert run(tmp_path / "srv/ipsecq/bin/python", "-I", tmp_path / "srv/ipsecq/bin/ipsecq", "version").startswith("ipsecq ")
    assert (tmp_path / "usr/bin/ipsecq").readlink() == Path("/srv/ipsecq/bin/ipsecq")
    unit = (tmp_path / "units/ipsecq.service").read_text()
    assert "ExecStart=/usr/bin/ipsecq run --config /srv/etc/ipsecq.toml" in unit
    assert "RequiresMountsFor=/srv/etc /srv/ipsecq" in unit
    for path in ("man/man8/ipsecq.8", "man/man5/ipsecq.conf.5", "bash-completion/completions/ipsecq",
                 "doc/ipsecq/examples/inner.d/20-allow-https.nft", "doc/ipsecq/examples/prometheus/alerts.yml"):  # fmt: skip
        assert (tmp_path / "share" / path).stat().st_size > 100

    assert (tmp_path / "srv/etc/inner.d").is_dir()
    configuration = tmp_path / "srv/etc/ipsecq.toml"
    configuration.write_text("[daemon]\nworkers = 7\n")
    run(*argv, "install", env=environment)
    assert "workers = 7" in configuration.read_text(), "an upgrade overwrites nothing"

    run(*argv, "uninstall", env=environment)
    assert everything(tmp_path) == ["srv/etc/ipsecq.toml", "srv/etc/setkey.conf"]
