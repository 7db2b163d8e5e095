"""The part of an installation that pyproject.toml cannot say: where nvcc is there, the CUDA kernels are built.

``MEGABYTE_DISTILL_NO_KERNELS=1 pip install .`` leaves them out. An editable installation builds nothing: `make kernels`
does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from megabyte_distill.kernels import build  # noqa: E402  (the standard library alone)

WITH_KERNELS = build.find_nvcc() is not None and os.environ.get("MEGABYTE_DISTILL_NO_KERNELS", "0") in ("", "0")


class BuildWithKernels(build_py):
    """Python files, then the kernel library beside them."""

    def run(self) -> None:
        super().run()
        if not WITH_KERNELS or self.editable_mode:
            return
        try:
            build.build_cuda(Path(self.build_lib) / build.LIBRARIES.relative_to(ROOT))
        except build.BuildError as error:
            raise SystemExit(
                f"{error}\nto install without the kernels: MEGABYTE_DISTILL_NO_KERNELS=1 pip install ."
            ) from None


class Wheel(bdist_wheel):
    """Of this platform where it holds the library, which no version of Python matters to."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if WITH_KERNELS else (python, abi, platform)


class WithLibrary(Distribution):
    """Says so where there is a compiled file, so that the wheel gets the platform's name."""

    def has_ext_modules(self) -> bool:
        return WITH_KERNELS


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": Wheel}, distclass=WithLibrary)
