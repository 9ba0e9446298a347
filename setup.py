"""The kernels in C, beside what setup.cfg says: a plain shared library, which needs no version of Python.

Without a compiler the package installs all the same, and plain operations of torch run in the library's place.
"""

import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


SOURCES = "hf_dirembed/kernels/csrc"


class BuildLibrary(build_ext):
    """Builds what `ctypes` loads, no module of Python."""

    def get_ext_filename(self, fullname):
        """The name without a version of Python in it."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext):
        """None but those that the sources export themselves."""
        return []

    def get_libraries(self, ext):
        """Python's own is not needed."""
        return ext.libraries


class PlatformWheel(bdist_wheel):
    """Names the platform, but no version of Python."""

    def get_tag(self):
        """The tag."""
        return "py3", "none", super().get_tag()[2]


def checksum() -> int:
    """That of all files that the library is built from, as hf_dirembed/kernels/library.py takes it."""
    files = sorted(each for each in Path(SOURCES).iterdir() if each.suffix in (".c", ".h"))
    return zlib.crc32(b"".join(each.read_bytes() for each in files))


setup(
    ext_modules=[
        Extension(
            "hf_dirembed.kernels._dirembed",
            sorted(map(str, Path(SOURCES).glob("*.c"))),
            depends=sorted(map(str, Path(SOURCES).glob("*.h"))),
            define_macros=[("DIREMBED_SOURCES", str(checksum()))],
            extra_compile_args=[
                "-std=gnu11", "-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-g0",
            ],
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)  # fmt: skip
