"""``docs/interop.md``: what one run of the matrix found, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ipsecq.lab.cells import Cell
from ipsecq.lab.matrix import SIZES, Matrix, Outcome
from ipsecq.lab.matrix_cells import CHAINS, NOT_RUN, SHAPES

_HEAD = """# Interoperability with the Linux kernel

Written by `python -m ipsecq.lab.matrix --write docs/interop.md`; don't edit. `tests/interop/test_matrix.py` runs the same
cells with every `make test`.

The engine stands on one side of a wire, the IPsec of an unmodified Linux {kernel} (Debian's User-Mode Linux) on the other.
Every cell has SAs with fresh keys in both directions, and policies that require them. Its datagrams go to the kernel's end
and must come back unchanged: {sizes} octets of UDP payload
over an MTU of 1500, random and compressible, in transport mode also with IPv4 options or IPv6 hop-by-hop or
destination options, which the kernel sends in front of its transforms. The
kernel's `xfrm_stat` must not move, every SA of it must have carried packets and count no failure, and nothing may have been
dropped at our side. ESN cells begin eight packets before the low half of the sequence number wraps, in both directions.

**{ran} cells ran, {passed} passed, {failed} failed, {left_out} were left out.**
{datagrams} datagrams each way in {seconds:.0f} s, the boot included.
"""


def document(matrix: Matrix) -> str:
    """The whole page."""
    ran, failed = matrix.ran, matrix.failed
    sections = [
        _HEAD.format(
            kernel=matrix.kernel, sizes=", ".join(map(str, SIZES)), ran=len(ran), passed=len(ran) - len(failed),
            failed=len(failed), left_out=len(matrix.left_out), datagrams=matrix.datagrams, seconds=matrix.seconds,
        ),
        "## Chains and shapes\n\nPassed cells of those that ran. A chain is in written order: its first protocol\n"
        "is applied first and has the mode, the others are in transport mode around it.\n",
        _table(
            "chain", CHAINS, [f"{mode} {inner}in{outer}" for mode, inner, outer in SHAPES], ran,
            lambda cell: [_chain(cell)], lambda cell: [f"{cell.mode} {cell.inner}in{cell.outer}"],
        ),
        "## Variants\n",
        _table("chain", CHAINS, ["plain", "ESN", "NAT-T", "ESN, NAT-T"], ran, lambda cell: [_chain(cell)], _variant),
        "## Algorithms\n",
        _table(
            "algorithm", list(dict.fromkeys(suite.name for each in ran for suite in each.cell.suites)), list(CHAINS), ran,
            lambda cell: [suite.name for suite in cell.suites], lambda cell: [_chain(cell)],
        ),
        "## Left out\n",
        "\n".join(
            [f"- {what}: {why}." for what, why in NOT_RUN.items()]
            + [f"- {each.cell.name}: {each.missing}." for each in matrix.left_out]
        ) + "\n",
    ]  # fmt: skip
    if failed:
        sections += ["## Failed\n", "\n".join(f"- {each.cell.name}: {'; '.join(each.failures)}" for each in failed) + "\n"]
    return "\n".join(sections)


def _chain(cell: Cell) -> str:
    return "+".join(suite.protocol for suite in cell.suites)


def _variant(cell: Cell) -> list[str]:
    return [", ".join(name for name, on in (("ESN", cell.esn), ("NAT-T", cell.natt)) if on) or "plain"]


def _table(
    corner: str,
    rows: Iterable[str],
    columns: Iterable[str],
    outcomes: Iterable[Outcome],
    row_of: Callable[[Cell], list[str]],
    column_of: Callable[[Cell], list[str]],
) -> str:
    """A Markdown table of "passed/ran"."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for outcome in outcomes:
        for key in [(row, column) for row in row_of(outcome.cell) for column in column_of(outcome.cell)]:
            passed, ran = counts.get(key, (0, 0))
            counts[key] = passed + outcome.passed, ran + 1
    columns = list(columns)
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        values = ["{}/{}".format(*counts[row, column]) if (row, column) in counts else "" for column in columns]
        lines.append(f"| {row} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"
