"""Lifetimes: every limit on its own, at its edge."""

from dataclasses import replace

import pytest

from ipsecq.numbers import Protocol, SaState
from ipsecq.sa.association import SLOT_HEADER_WORDS, Lifetime, SecurityAssociation, Slot
from ipsecq.sa.lifetime import SOFT_SEQUENCE, judge

SA = SecurityAssociation(Protocol.ESP, 0x100, bytes(4), bytes(4), created=1000.0, slot=0)


def slot(**values: int) -> memoryview:
    words = memoryview(bytearray(8 * SLOT_HEADER_WORDS)).cast("Q")
    for name, value in values.items():
        words[Slot[name.upper()]] = value
    return words


@pytest.mark.parametrize(
    ("limit", "used", "now"),
    [
        (Lifetime(allocations=10), {"packets": 10}, 1000),
        (Lifetime(bytes=4096), {"bytes": 4096}, 1000),
        (Lifetime(addtime=60), {}, 1060),
        (Lifetime(usetime=60), {"first_use": 1500}, 1560),
    ],
)
def test_each_limit_bites_exactly_when_it_is_reached(limit, used, now):
    hard, soft = replace(SA, hard=limit), replace(SA, soft=limit)
    assert judge(hard, slot(**used), now) is SaState.DEAD
    assert judge(soft, slot(**used), now) is SaState.DYING
    if used.keys() & {"packets", "bytes"}:
        almost = slot(**{name: value - 1 for name, value in used.items()})
        assert judge(hard, almost, now) is SaState.MATURE
    else:
        assert judge(hard, slot(**used), now - 0.5) is SaState.MATURE


def test_usetime_does_not_run_before_the_first_packet():
    assert judge(replace(SA, hard=Lifetime(usetime=1)), slot(), 1e9) is SaState.MATURE


def test_no_limits_means_no_end():
    assert judge(SA, slot(packets=1 << 60, bytes=1 << 63, first_use=1), 1e10) is SaState.MATURE


def test_an_sa_with_32_bit_numbers_gets_old_at_80_percent():
    assert judge(SA, slot(sequence=SOFT_SEQUENCE), 1000) is SaState.MATURE
    assert judge(SA, slot(sequence=SOFT_SEQUENCE + 1), 1000) is SaState.DYING
    assert judge(replace(SA, esn=True), slot(sequence=SOFT_SEQUENCE + 1), 1000) is SaState.MATURE


def test_an_sa_never_gets_younger():
    assert judge(replace(SA, state=SaState.DYING), slot(), 1000) is SaState.DYING
    assert judge(replace(SA, state=SaState.DEAD), slot(), 1000) is SaState.DEAD
    assert judge(replace(SA, state=SaState.LARVAL), slot(), 1000) is SaState.LARVAL
    assert judge(SA, slot(state=int(SaState.DYING)), 1000) is SaState.DYING
    assert judge(SA, slot(state=int(SaState.DEAD)), 1000) is SaState.DEAD
