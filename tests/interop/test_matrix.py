"""Every chain of transforms, mode, pair of IP versions and algorithm, packet by packet against the kernel's IPsec."""

import itertools
import re
from pathlib import Path

import pytest

from ipsecq.crypto import registry
from ipsecq.lab import matrix, matrix_cells
from ipsecq.lab.cells import CIPHERS, MACS
from ipsecq.lab.matrix_report import document

CELLS = list(matrix_cells.cells())


def names(part, cells=CELLS):
    return {getattr(suite, part) for cell in cells for suite in cell.suites} - {""}


def test_the_matrix_holds_every_chain_in_every_shape_and_variant():
    shapes = {(tuple(suite.protocol for suite in cell.suites), cell.mode, cell.inner, cell.outer) for cell in CELLS}
    chains = [tuple(chain.split("+")) for chain in matrix_cells.CHAINS]
    assert shapes == {(chain, *shape) for chain, shape in itertools.product(chains, matrix_cells.SHAPES)}
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    for chain, *_ in shapes:
        variants = {(cell.esn, cell.natt) for cell in CELLS if tuple(s.protocol for s in cell.suites) == chain}
        assert (False, False) in variants
        assert any(esn for esn, _ in variants) or chain == ("ipcomp",)
        assert any(natt for _, natt in variants) == ("esp" in chain and "ah" not in chain)


@pytest.mark.parametrize("shape", matrix_cells.SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}in{shape[2]}")
def test_every_algorithm_that_we_have_is_in_each_shape(shape):
    cells = [cell for cell in CELLS if (cell.mode, cell.inner, cell.outer) == shape]
    assert names("encryption", cells) == set(registry.ENCRYPTION)
    # The kernel has no AES-GMAC for AH; NOT_RUN says so.
    assert names("authentication", cells) == set(registry.AUTHENTICATION) - {"aes-gmac"} == set(MACS)
    assert set(CIPHERS) < names("encryption", cells)


@pytest.mark.root
@pytest.mark.uml
@pytest.mark.slow
@pytest.mark.seconds(420)
def test_every_cell_passes_against_the_kernel(capsys):
    found = matrix.run(CELLS)
    with capsys.disabled():
        print(f"\n{found.summary()}")
    assert len(found.outcomes) == len(CELLS)
    assert [(each.cell.name, each.failures) for each in found.failed] == []
    assert [each.cell.name for each in found.left_out] == []
    assert counts(document(found)) == counts((Path(__file__).parents[2] / "docs" / "interop.md").read_text()), (
        "docs/interop.md is old: python -m ipsecq.lab.matrix --write docs/interop.md"
    )


def counts(text):
    """The tables of the page, which do not depend on the machine's speed or the kernel's version."""
    return [line for line in text.splitlines() if line.startswith("|") or re.match(r"\*\*\d+ cells", line)]
