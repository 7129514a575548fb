# SPDX-License-Identifier: Apache-2.0
"""Checks a PyTorch with CUDA, with or without a GPU (``make cuda-import``): the kernels load, every op has one, and
training steps of every kind run on fake CUDA tensors, so they do not wait for a GPU or mix its tensors with the CPU's.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import gibbs_ext as gx

sys.path.append(str(Path(__file__).parents[1]))
import deviceless
from support import OPS, ops_without_cuda, registered_ops

info = gx.build_info()
if info["cuda"] != "loaded":
    sys.exit(f"PyTorch {torch.__version__}: {info['cuda']}")
assert registered_ops() == list(OPS), registered_ops()
if missing := ops_without_cuda():
    sys.exit(f"no CUDA kernel for {missing}")
left, right = gx.bipartite_gibbs(torch.zeros(4), torch.zeros(4), torch.zeros(3), torch.zeros(4, 3), 2, seed=1)
assert (left.shape, right.shape) == ((4,), (3,))
print(f"PyTorch {torch.__version__}: {len(OPS)} ops have CUDA kernels, for {', '.join(info['cuda_architectures'])}")

# Without a GPU, a fake driver tells the engine of autograd which devices are in use. FakeTensorMode puts a
# guard that does nothing in place of CUDA's only while there are 0 devices, but the engine needs more than 0. So the
# number of devices is set in between.
DRIVER = """
namespace c10::cuda { signed char device_count() noexcept; }
static signed char devices = 0;
extern "C" void set_devices(int count) { devices = static_cast<signed char>(count); }
signed char c10::cuda::device_count() noexcept { return devices; }
extern "C" int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0; *active = 1; return 0; }
"""


def compile_driver(folder: str) -> str:
    """Makes a libcuda.so.1 with this one function; all others that PyTorch looks up fail, as without a driver."""
    nvrtc = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"
    wanted = subprocess.run(["nm", "-D", "--undefined-only", nvrtc], capture_output=True, text=True, check=True).stdout
    others = set(re.findall(r"\bcu[A-Z]\w*", wanted)) - {"cuDevicePrimaryCtxGetState"}
    source, library = Path(folder, "driver.cpp"), Path(folder, "libcuda.so.1")
    missing = "".join(f'extern "C" int {name}() {{ return 100; }}\n' for name in sorted(others))  # CUDA_ERROR_NO_DEVICE
    source.write_text(DRIVER + missing)
    subprocess.run(["g++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", library], check=True)
    return str(library)


def with_constant(self: deviceless.VAE, images: torch.Tensor, *args: object, **options: object) -> object:
    return forward(self, images * torch.ones(images.shape[1], device="cpu"), *args, **options)


def with_item(self: deviceless.VAE, *args: object, **options: object) -> object:
    terms = forward(self, *args, **options)
    return terms._replace(loss=terms.loss * terms.loss.item())


if not torch.cuda.is_available():
    preloaded = os.environ.get("LD_PRELOAD", "")
    if not preloaded.endswith("libcuda.so.1"):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"LD_PRELOAD": compile_driver(folder)}
            sys.exit(subprocess.run([sys.executable, __file__], env=environment).returncode)
    with deviceless.fake():
        pass
    ctypes.CDLL(preloaded).set_devices(64)

for name, config in deviceless.CONFIGS.items():
    trainer = deviceless.take_steps(config, "cuda")
    assert trainer.terms.loss.device.type == "cuda", name
    assert all(p.grad is not None and p.grad.device.type == "cuda" for p in trainer.model.parameters()), name
print(f"{len(deviceless.CONFIGS)} kinds of training steps run on fake CUDA tensors")
forward = deviceless.VAE.forward
for fault in (with_constant, with_item):
    try:
        deviceless.take_steps(config, "cuda", forward=fault)
    except Exception as error:  # errors of FakeTensorMode are of many classes
        print(f"a step {fault.__name__} is found: {type(error).__name__}: {str(error).splitlines()[0]}")
    else:
        sys.exit(f"a step {fault.__name__} is not found")
