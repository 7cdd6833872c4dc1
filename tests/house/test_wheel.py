"""A wheel is whole: the compiled modules are in it, and it works where there is neither compiler nor checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
LOCAL = ("--no-index", "--no-deps")  # with the setuptools and Cython of the test extra


@pytest.mark.slow
@pytest.mark.seconds(400)
def test_a_wheel_brings_the_compiled_fast_path(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(f"git -C {ROOT} ls-files -z | tar -C {ROOT} --null -T - -c | tar -C {source} -x", shell=True, check=True)
    subprocess.run([*PIP, "wheel", *LOCAL, "--no-build-isolation", "--wheel-dir", tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("ipsecq-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "build/")) or name.endswith(".c")]
    subprocess.run([*PIP, "install", *LOCAL, "--target", tmp_path / "site", wheel], check=True, timeout=60)
    done = subprocess.run(
        [sys.executable, "-c", "import ipsecq, ipsecq.fastpath as fast; print(fast.active, ipsecq.__file__)"],
        env={"PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True", str(tmp_path / "site" / "ipsecq" / "__init__.py")]
