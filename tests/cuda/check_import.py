# SPDX-License-Identifier: Apache-2.0
"""Where PyTorch has CUDA, GPU or not (``make cuda-import``): the kernels are loaded, and every op has one."""

import sys

import torch

import gibbs_ext as gx

info = gx.build_info()
if info["cuda"] != "loaded":
    sys.exit(f"PyTorch {torch.__version__}: {info['cuda']}")
ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gibbs_ext::")]
missing = [name for name in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
if missing or not ops:
    sys.exit(f"no CUDA kernel for {missing or 'any op'}")
left, right = gx.bipartite_gibbs(torch.zeros(4), torch.zeros(4), torch.zeros(3), torch.zeros(4, 3), 2, seed=1)
assert (left.shape, right.shape) == ((4,), (3,))
print(f"PyTorch {torch.__version__}: {len(ops)} ops have CUDA kernels, for {', '.join(info['cuda_architectures'])}")
