# SPDX-License-Identifier: Apache-2.0
"""Builds gibbs_ext._C, the one shared library: tensor ops against libtorch's stable ABI, and a pybind11 module."""

import os
import sys
import sysconfig
from glob import glob

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

# ninja is found in this environment even where it has not been activated.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


class Build(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # pip builds in a temporary folder otherwise, and would compile again what build_ext --inplace already has.
        self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.define_macros.append(("GIBBS_VERSION", f'"{self.distribution.get_version()}"'))
        super().build_extensions()


setup(
    ext_modules=[
        Extension(
            "gibbs_ext._C",
            sources=sorted([*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")]),
            include_dirs=[os.path.abspath("csrc"), pybind11.get_include(), *include_paths()],
            library_dirs=library_paths(),
            # Not torch_python: with libtorch's stable ABI alone, one binary serves many versions of torch.
            libraries=["c10", "torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)],
            # -ffp-contract=off: the sampling contract rounds each operation once. -g0: Python's own flags may say -g.
            # No -march: the kernels choose their instruction set at run time.
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": Build},
)
