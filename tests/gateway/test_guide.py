"""Every command block of README, guide and the pages of interfaces and parallel SAs does what the text says."""

import re
from pathlib import Path

import pytest
from guide import MountPoints, Theatre, sections

from ipsecq.lab.netns import Lab

ROOT = Path(__file__).parents[2]
PAGES = {"README": ROOT / "README.md"} | {name: ROOT / f"docs/{name}.md" for name in ("guide", "interfaces", "parallel")}
SECTIONS = [(page, section) for page, path in PAGES.items() for section in sections(path)]
BEFORE = {section.title: section for page, section in SECTIONS if page == "guide"}
PROLOGUE = "Before you begin"
"""What every section of the guide takes for granted."""
UP = ("Changing keys", "Filtering what is inside", "Watching")
"""Sections that say: a tunnel as in "Site to site" is up."""
PLAYED = [(page, section) for page, section in SECTIONS if any("norun" not in each.attributes for each in section.blocks)]
NOT_RUN = {"install": 4, "systemd": 10}
"""Blocks that only a machine with systemd can run, or that install software."""


@pytest.fixture(scope="module", autouse=True)
def mount_points():
    with MountPoints() as points:
        yield points


@pytest.mark.root
@pytest.mark.parametrize(("page", "section"), PLAYED, ids=[f"{page}: {section.title}" for page, section in PLAYED])
def test_the_blocks_do_what_the_text_says(page, section, tmp_path):
    with Lab() as lab:
        theatre = Theatre(lab, tmp_path)
        blocks = list(section.blocks)
        if page == "guide" and section.title in UP:
            # What it takes to bring the tunnel up; what one looks at on the way has been played in its own section.
            tunnel = BEFORE["Site to site"].blocks
            blocks[:0] = [each for each in tunnel if each.language == "conf" or "does" in each.attributes]
        if page == "guide" and section.title != PROLOGUE:
            blocks[:0] = BEFORE[PROLOGUE].blocks
        for block in blocks:
            theatre.play(block)


def test_blocks_that_cannot_run_here_are_counted():
    blocks = [block for _, section in SECTIONS for block in section.blocks]
    reasons = [block.attributes["norun"] for block in blocks if "norun" in block.attributes]
    assert {reason: reasons.count(reason) for reason in set(reasons)} == NOT_RUN
    assert len(blocks) - len(reasons) > 40


def test_no_commands_hide_in_indented_text():
    """Four spaces are for pictures; commands are fenced, so that they are run."""
    for path in PAGES.values():
        outside = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        indented = re.findall(r"(?:^    .*\n)+", outside, re.MULTILINE)
        assert [part for part in indented if not re.search("[─│┌└├┤]", part)] == []


def test_links_lead_somewhere():
    for path in PAGES.values():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
