"""One boot of the peer's kernel serves all cells of the session."""

import pytest

from ipsecq.lab.interop import Bench
from ipsecq.lab.netns import Lab


@pytest.fixture(scope="session")
def kernel_peer():
    with Lab() as lab:
        yield Bench(lab)
