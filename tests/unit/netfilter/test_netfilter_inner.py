"""The operator's inner rules are regular files: nft would wait for anything else."""

import os

import pytest

from ipsecq.errors import NetfilterError
from ipsecq.netfilter.inner import inner_files
from ipsecq.netfilter.settings import NetfilterSettings


def test_files_come_in_the_order_of_their_names_and_a_fifo_is_refused(tmp_path):
    settings = NetfilterSettings(inner_dir=str(tmp_path))
    for name in ("20-b.nft", "10-a.nft", "README"):
        (tmp_path / name).touch()
    assert inner_files(settings) == [str(tmp_path / "10-a.nft"), str(tmp_path / "20-b.nft")]
    os.mkfifo(tmp_path / "30-c.nft")
    with pytest.raises(NetfilterError, match=r"30-c\.nft: expected a regular file$"):
        inner_files(settings)
