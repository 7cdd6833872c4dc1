"""The documentation that is installed is whole: what a page leads to is there."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
NAMED = re.compile(r"`((?:contrib|nftables)/[^`\s]*)`")


@pytest.fixture
def tree(tmp_path):
    """What ``make install`` and ``make deb`` lay out below share/doc/ipsecq."""
    subprocess.run([".ci/docs", tmp_path], cwd=ROOT, check=True)
    return tmp_path


def test_every_relative_link_of_an_installed_page_leads_to_a_file(tree):
    pages = sorted(tree.glob("*.md")) + sorted(tree.glob("docs/*.md"))
    assert {"README.md", "SECURITY.md", "guide.md"} <= {page.name for page in pages}
    broken = [
        f"{page.relative_to(tree)}: {target}"
        for page in pages for target in LINK.findall(page.read_text())
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists()
    ]  # fmt: skip
    assert broken == []


def test_every_example_that_an_installed_page_names_is_there(tree):
    pages = [tree / "README.md", *tree.glob("docs/*.md")]
    named = [name for page in pages for name in NAMED.findall(page.read_text())]
    assert "contrib/grafana/ipsecq.json" in named
    assert [name for name in named if not (tree / name).exists()] == []


def test_both_ways_of_installing_lay_the_pages_out_alike():
    assert '"$(dirname "$0")/docs" ' in (ROOT / ".ci/tree").read_text()
    for way in ("install", "deb"):
        assert '"$here/tree" ' in (ROOT / ".ci" / way).read_text()
