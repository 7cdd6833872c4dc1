"""What the kernel can is found by trying: together where all of it is there, and each for itself where something is not."""

import pytest

from ipsecq.errors import NetfilterError
from ipsecq.netfilter import capabilities

WORDS = {
    "native_queue": "queue to", "tproxy": "tproxy to", "conntrack": "ct state", "fib": "fib daddr",
    "socket_match": "socket mark", "owner": "flags owner", "egress": "hook egress",
}  # fmt: skip
"""What the script of each probe has, and no other."""


@pytest.fixture
def kernel(monkeypatch):
    """A kernel without some words: ``lacks`` is the set of them, ``asked`` the transactions it has seen."""

    class Kernel:
        def __init__(self):
            self.lacks, self.asked = frozenset(), []

        def run(self, script):
            self.asked.append(script)
            if any(word in script for word in self.lacks):
                raise NetfilterError("no such thing")

    found = Kernel()
    monkeypatch.setattr(capabilities, "run_nft", found.run)
    monkeypatch.setattr(capabilities.shutil, "which", lambda name: name)
    for trial in ("_try_compat", "_try_gso", "_try_tun"):
        monkeypatch.setattr(capabilities, trial, lambda argument=None: None)
    return found


@pytest.mark.parametrize("missing", WORDS)
def test_what_is_missing_hides_nothing_that_is_there(kernel, missing):
    kernel.lacks = {WORDS[missing]}
    found = capabilities.detect()
    assert found.nft
    assert [name for name in WORDS if not getattr(found, name)] == [missing]


def test_where_nothing_is_missing_two_transactions_say_so(kernel):
    found = capabilities.detect()
    assert found.nft
    assert all(getattr(found, name) for name in WORDS)
    assert len(kernel.asked) == 2


def test_what_a_probe_makes_is_deleted_in_the_same_transaction(kernel):
    capabilities.detect()
    for script in kernel.asked:
        made = [line.split()[2:4] for line in script.splitlines() if line.startswith("add table")]
        assert made == [line.split()[2:4] for line in script.splitlines() if line.startswith("delete table")]
