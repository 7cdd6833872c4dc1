"""Manual pages, reference pages, default file and completion say what the program says; none is written by hand."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from ipsecq.cli import manual
from ipsecq.cli.app import app
from ipsecq.cli.tree import commands
from ipsecq.daemon import reference
from ipsecq.daemon.options import SECTIONS
from ipsecq.sysctl import VARIABLES

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", manual.DOCS)
def test_reference_pages_are_those_that_make_docs_writes(name):
    assert (ROOT / "docs" / name).read_text() == manual.DOCS[name](), "run: make docs"


def test_the_default_file_is_the_one_that_make_docs_writes():
    assert (ROOT / "ipsecq/daemon/ipsecq.toml").read_text() == reference.default_toml(), "run: make docs"


@pytest.mark.parametrize("name", manual.PAGES)
def test_groff_has_nothing_to_warn_of(name, tmp_path):
    page = tmp_path / name
    page.write_text(manual.PAGES[name]())
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", "-z", page], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def rendered(name, tmp_path):
    page = tmp_path / name
    page.write_text(manual.PAGES[name]())
    done = subprocess.run(["groff", "-man", "-Tascii", "-P-cbou", page], capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split())


def test_every_command_and_option_of_help_is_in_the_manual_page(tmp_path):
    text = rendered("ipsecq.8", tmp_path)
    assert len(list(commands(app))) > 10
    for command in commands(app):
        done = subprocess.run(
            [sys.executable, "-m", "ipsecq", *command.name.split()[1:], "--help"],
            capture_output=True, text=True, check=True, env={"TERM": "dumb", "COLUMNS": "200"},
        )  # fmt: skip
        assert command.usage in text
        for option in command.options:
            assert option.spelling in text
            assert option.help[:40] in " ".join(done.stdout.split())


def test_every_option_and_variable_is_in_the_manual_page(tmp_path):
    text = rendered("ipsecq.conf.5", tmp_path)
    for name, options in SECTIONS.items():
        assert f"[{name}]" in text
        for option in fields(options):
            assert f"{option.name} = " in text
            assert option.metadata["meaning"][:30] in text
    for variable in VARIABLES.values():
        assert f'"{variable.name}" = ' in text


def test_every_option_has_a_meaning_that_is_a_sentence():
    for options in SECTIONS.values():
        for option in fields(options):
            assert option.metadata["meaning"].endswith("."), option.name


def test_bash_completes_commands_and_variables(tmp_path):
    script = tmp_path / "ipsecq"
    script.write_text(manual.completion("bash"))

    def complete(*words):
        quoted = " ".join(f"'{word}'" for word in words)
        program = (
            f"PATH={Path(sys.executable).parent}:$PATH; . {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
            'compopt() { :; }; _ipsecq_completion ipsecq; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("ipsecq", "st") == ["status", "stat", "state"]
    assert complete("ipsecq", "sysctl", "net.inet.ipsec.df") == ["net.inet.ipsec.dfbit"]


@pytest.mark.parametrize("shell", manual.COMPLETIONS)
def test_there_is_a_completion_for(shell):
    assert "ipsecq" in manual.completion(shell)
