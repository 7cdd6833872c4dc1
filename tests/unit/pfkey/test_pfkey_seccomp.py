"""The filter of ``ipsecq exec``: which system calls of a program the supervisor hears of."""

import struct

import pytest

from ipsecq.pfkey.seccomp import ARCHITECTURES, filter_program


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES))
def test_the_filter_notifies_for_what_ipsecq_serves_and_allows_all_else(machine):
    """The program, run by an interpreter of the BPF that seccomp allows."""
    arch = ARCHITECTURES[machine]
    octets = filter_program(arch)
    program = [struct.unpack_from("=HBBI", octets, at) for at in range(0, len(octets), 8)]

    def verdict(call, *arguments, audit=arch.audit):
        data = struct.pack("=iIQ6Q", call, audit, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
        at, accumulator = 0, 0
        while True:
            code, yes, no, operand = program[at]
            if code == 0x20:
                accumulator = struct.unpack_from("=I", data, operand)[0]
            elif code == 0x15:
                at += yes if accumulator == operand else no
            elif code == 0x25:
                at += yes if accumulator > operand else no
            else:
                return {0x7FFF0000: "allow", 0x7FC00000: "notify"}[operand]
            at += 1

    assert verdict(arch.socket, 15, 3, 2) == "notify"
    assert verdict(arch.setsockopt, 3, 0, 16) == "notify"
    assert verdict(arch.setsockopt, 3, 41, 34) == "notify"
    assert verdict(arch.getsockopt, 3, 0, 16) == "notify"
    assert verdict(arch.getsockopt, 3, 41, 34) == "notify"
    assert verdict(arch.socket, 15, 3, 2, audit=0x40000003) == "allow"
    for family in (1, 2, 10, 16, 17):
        assert verdict(arch.socket, family, 3, 2) == "allow"
    for level, option in ((0, 34), (41, 16), (1, 16), (1, 34), (0, 17), (6, 16)):
        assert verdict(arch.setsockopt, 3, level, option) == "allow"
        assert verdict(arch.getsockopt, 3, level, option) == "allow"
    for call in {*range(500)} - {arch.socket, arch.setsockopt, arch.getsockopt, arch.poll}:
        assert verdict(call, 15, 0, 16) == "allow"
    assert verdict(arch.poll, 0x7000, 1, 1) == "notify"
    assert verdict(arch.poll, 0x7000, 2, 1) == "allow"
    for call in arch.sends:
        assert verdict(call, 1000) == "allow"
    octets = filter_program(arch, range(960, 1024))
    program = [struct.unpack_from("=HBBI", octets, at) for at in range(0, len(octets), 8)]
    for call in arch.sends:
        for number, decision in ((0, "allow"), (959, "allow"), (960, "notify"), (1023, "notify"), (1024, "allow"),
                                 (0xFFFFFFFF, "allow")):  # fmt: skip
            assert verdict(call, number, 0x7000, 16) == decision
    assert verdict(arch.socket, 15, 3, 2) == "notify"
    for timeout in (0, 1000, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF):
        assert verdict(arch.poll, 0x7000, 1, timeout) == ("notify" if arch.poll_has_timespec else "allow")
