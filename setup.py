"""Builds the optional compiled modules (ipsecq/compiled, ipsecq/fastpath); the rest of the build is in pyproject.toml."""

import os

from setuptools import Extension, setup

SANITIZE = bool(os.environ.get("IPSECQ_SANITIZE"))
FLAGS = (
    ["-fsanitize=address", "-O1", "-g", "-fno-omit-frame-pointer"]
    if SANITIZE
    else ["-O3", "-g0", "-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-Wno-unused-function"]
)
SOURCES = (
    "compiled/aead",
    "fastpath/known",
    "fastpath/heads",
    "fastpath/runs",
    "fastpath/sealer",
    "fastpath/opener",
    "fastpath/ring",
    "fastpath/reader",
)


def extensions() -> list[Extension]:
    """None of them, where Cython is missing; one that fails to build is left out."""
    try:
        from Cython.Build import cythonize  # noqa: PLC0415
    except ImportError:
        return []
    found = [
        Extension(
            f"ipsecq.{name.replace('/', '.')}", [f"ipsecq/{name}.py"], libraries=["crypto"] if name.endswith("aead") else [],
            extra_compile_args=FLAGS, extra_link_args=FLAGS[:1] if SANITIZE else [], optional=True,
        )
        for name in SOURCES
    ]  # fmt: skip
    made: list[Extension] = cythonize(found, build_dir="build/cython", quiet=True)
    return made


setup(ext_modules=extensions())
