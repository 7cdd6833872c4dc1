"""The house of the daemon's tests."""

import pytest
from house import House


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.replica = None
    house.table.close()
