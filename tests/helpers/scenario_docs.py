"""Write docs/scenarios.md from tests/scenarios: ``python tests/helpers/scenario_docs.py``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from scenarios import Scenario, Step, Table, load

TARGET = Path(__file__).parents[2] / "docs" / "scenarios.md"

HEAD = """# Scenarios

What happens to a packet, case by case: the statements of ipsec(4) as configurations, packets and fates. Each row runs
with bytes against the engine (`tests/unit/engine/test_scenarios.py`). This file is made from `tests/scenarios/*.toml` by
`make scenarios`; a test keeps the two in step.

The machine under test is A among hosts, G among gateways (`a` and its network behind it); its peers are B and H (`b`), X
and C are others. SAs have SPIs from 0x1001 on the way out, from 0x2001 on the way in; `tests/scenarios/sas.toml` has them.
A packet that *arrives sealed* was sealed by a second engine, by the policies named. *Dropped* comes with the counter that
grows. Layouts are outermost first.
"""


def render(tables: list[Table]) -> str:
    """The whole document."""
    lines = [HEAD]
    total = sum(len(table.scenarios) for table in tables)
    lines.append(f"{total} scenarios in {len(tables)} tables.\n")
    for table in tables:
        lines += [f"## {table.title}", "", "> " + " ".join(table.manual.split()), ""]
        lines += ["| Rule | Configuration | Packet | Fate |", "|---|---|---|---|"]
        lines += [row for scenario in table.scenarios for row in _rows(scenario)]
        lines.append("")
    return "\n".join(lines)


def _rows(scenario: Scenario) -> list[str]:
    setup = [*_sentences(scenario.policy)]
    setup += [f"SAs: {', '.join(scenario.sas)}"] if scenario.sas else []
    setup += _socket(scenario, scenario.steps[0])
    setup += [f"`{name}={value}`" for name, value in scenario.knobs.items()]
    setup += [f"peer: `{name}={value}`" for name, value in scenario.peer_knobs.items()]
    rows = []
    for number, step in enumerate(scenario.steps):
        if number:
            setup = [*_sentences(step.setkey), *_socket(scenario, step)]
            setup += [f"`{name}={value}`" for name, value in step.knobs.items()]
        rule = scenario.rule if not number else "… then"
        rows.append(f"| {_cell(rule)} | {_cell('<br>'.join(setup))} | {_cell(_packet(step))} | {_cell(_fate(step))} |")
    return rows


def _socket(scenario: Scenario, step: Step) -> list[str]:
    who = "" if scenario.user == "root" else f" ({scenario.user}'s)"
    return [f"socket{who}: `{text}`" for text in step.socket]


def _packet(step: Step) -> str:
    parts = [f"{step.way}: `{' '.join(step.packet.split())}`"]
    if step.mtu != 1500:
        parts.append(f"path MTU {step.mtu}")
    if step.sealed:
        parts.append("sealed by " + " ".join(_sentences(step.sealed)))
    if step.tamper:
        parts.append("on the way: " + ", ".join(f"`{what}`" for what in step.tamper))
    return "<br>".join(parts)


def _fate(step: Step) -> str:
    parts = [f"**{step.fate}**"]
    for name, value in step.expected.items():
        if name == "layout":
            parts.append(f"`{value}`")
        elif isinstance(value, dict):
            parts.append(f"{name}: " + ", ".join(f"{key} {each}" for key, each in value.items()))
        elif isinstance(value, list):
            parts.append(f"{name}: " + ", ".join(value))
        else:
            parts.append(f"{name}: {value}")
    return "<br>".join(parts)


def _sentences(setkey: str) -> list[str]:
    # Keys of examples are no secrets, but they fill lines.
    texts = [re.sub(r"0x[0-9a-f]{20,}", "KEY", " ".join(text.split())) for text in setkey.split(";")]
    return [f"`{text};`" for text in texts if text]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write the document; with ``--check`` say whether it is in step."""
    text = render(load())
    if "--check" in sys.argv:
        return 0 if TARGET.read_text("utf-8") == text else 1
    TARGET.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
