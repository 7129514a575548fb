# SPDX-License-Identifier: Apache-2.0
"""Where PyTorch has CUDA, GPU or not (``make cuda-import``): the kernels are loaded, every op has one, and a training
step of every kind runs on fake CUDA tensors: it waits for no GPU, and mixes no CPU tensor with those of one.
"""

import sys
from pathlib import Path

import torch

import gibbs_ext as gx

sys.path.append(str(Path(__file__).parents[1]))
import deviceless

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

for name, config in deviceless.CONFIGS.items():
    trainer = deviceless.take_steps(config, "cuda")
    assert trainer.terms.loss.device.type == "cuda", name
    assert all(p.grad is not None and p.grad.device.type == "cuda" for p in trainer.model.parameters()), name
print(f"{len(deviceless.CONFIGS)} kinds of training steps run on fake CUDA tensors")


def with_constant(self: deviceless.VAE, images: torch.Tensor, *args: object, **options: object) -> object:
    return forward(self, images * torch.ones(images.shape[1], device="cpu"), *args, **options)


forward = deviceless.VAE.forward
try:
    deviceless.take_steps(config, "cuda", forward=with_constant)
except RuntimeError as error:
    print(f"and a planted CPU tensor is found: {str(error).splitlines()[0]}")
else:
    sys.exit("a planted CPU tensor is not found")
