# SPDX-License-Identifier: Apache-2.0
"""Builds gibbs_ext._C (ops against libtorch's stable ABI, and a pybind11 module) and, with nvcc, gibbs_ext/_cuda.so.

GIBBS_CUDA=auto (the default) builds the CUDA kernels where nvcc is found, 1 insists on them, 0 leaves them out; see
csrc/cuda/nvcc.py. They need CUDA's compiler alone, no CUDA build of PyTorch.
"""

import os
import sys
import sysconfig
from glob import glob

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

sys.path.insert(0, os.path.abspath("csrc/cuda"))  # pip does not look where setup.py lies
import nvcc

# ninja is found in this environment even where it has not been activated.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

# -ffp-contract=off: the sampling contract rounds each operation once. -g0: Python's own flags may say -g.
# No -march: the kernels choose their instruction set at run time.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
# With libtorch's stable ABI alone, one binary serves many versions of torch.
TORCH_MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000"), ("TORCH_STABLE_ONLY", None)]


class Build(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # pip builds in a temporary folder otherwise, and would compile again what build_ext --inplace already has.
        self.build_temp = os.path.join("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.define_macros.append(("GIBBS_VERSION", f'"{self.distribution.get_version()}"'))
            if extension.name == "gibbs_ext._cuda":
                assert cuda
                extension.extra_objects = nvcc.compile_kernels(cuda)
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        # No Python module: it serves every version.
        name = super().get_ext_filename(fullname)
        return name.removesuffix(sysconfig.get_config_var("EXT_SUFFIX")) + ".so" if fullname.endswith("_cuda") else name


cuda = nvcc.find()
include_dirs = [os.path.abspath("csrc"), *include_paths()]
extensions = [
    Extension(
        "gibbs_ext._C",
        sources=sorted(["csrc/python.cpp", *glob("csrc/ops/cpu/*.cpp"), *glob("csrc/cpu/**/*.cpp", recursive=True)]),
        # Before torch's folders, which hold a pybind11 too: torch 2.11's stops with #error under TORCH_STABLE_ONLY.
        include_dirs=[pybind11.get_include(), *include_dirs],
        library_dirs=library_paths(),
        # Not torch_python, which the stable ABI does without.
        libraries=["c10", "torch_cpu"],
        define_macros=list(TORCH_MACROS),
        extra_compile_args=CXX_FLAGS,
        language="c++",
    )
]
if cuda:
    extensions.append(
        Extension(
            "gibbs_ext._cuda",
            sources=sorted([*glob("csrc/ops/cuda/*.cpp"), *glob("csrc/cuda/*.cpp")]),
            include_dirs=[*include_dirs, str(cuda.home / "include")],
            library_dirs=[
                *library_paths(),
                *(str(cuda.home / lib) for lib in ("lib64", "lib", "targets/x86_64-linux/lib")),
            ],
            # The static runtime, and no libtorch_cuda: so it builds, and loads, without a CUDA build of PyTorch.
            libraries=["c10", "torch_cpu", "cudart_static", "dl", "rt", "pthread"],
            define_macros=[*TORCH_MACROS, ("GIBBS_ARCHITECTURES", f'"{";".join(cuda.architectures)}"')],
            extra_compile_args=CXX_FLAGS,
            language="c++",
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": Build})
