# SPDX-License-Identifier: Apache-2.0
"""Annealed importance sampling of log Z, one model, from the same base: independent units of the model's biases."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

import gibbs_ext as gx

from .harness import Call, Case, benchmark_of, on_gpu, warm
from .tables import OURS

N1, N2, NUM_CHAINS, NUM_BETAS = 100, 100, 4000, 500


def draws() -> gx.BipartiteBoltzmann:
    torch.manual_seed(1)
    weight = torch.randn(N1, N2) / ((N1 + N2) / 2) ** 0.5
    return gx.BipartiteBoltzmann(torch.randn(N1), torch.randn(N2), weight)


def ours(model: gx.BipartiteBoltzmann) -> Call:
    return lambda: gx.annealed_importance_sampling(model, NUM_CHAINS, NUM_BETAS, base="bias", seed=1).log_partition


def torch_ais(model: gx.BipartiteBoltzmann) -> Call:
    """Products in preallocated buffers; the field of the right units serves the weight and the draw."""
    left_bias, right_bias, weight = model.left_bias, model.right_bias, model.weight
    transposed = weight.T.contiguous()
    betas = torch.linspace(0, 1, NUM_BETAS, dtype=torch.float64).tolist()
    base = float(softplus(left_bias).sum() + softplus(right_bias).sum())

    def run() -> Tensor:
        left = (torch.rand(NUM_CHAINS, N1) < left_bias.sigmoid()).float()
        field, back = torch.empty(NUM_CHAINS, N2), torch.empty(NUM_CHAINS, N1)
        log_weight = torch.zeros(NUM_CHAINS)
        before = 0.0
        for beta in betas[1:]:
            torch.mm(left, weight, out=field)
            log_weight += (softplus(field * beta + right_bias) - softplus(field * before + right_bias)).sum(1)
            right = (torch.rand_like(field) < (field * beta + right_bias).sigmoid_()).float()
            torch.mm(right, transposed, out=back)
            left = (torch.rand_like(back) < back.mul_(beta).add_(left_bias).sigmoid_()).float()
            before = beta
        return base + log_weight.logsumexp(0) - torch.tensor(float(NUM_CHAINS)).log()

    return run


def rbms_ais(model: gx.BipartiteBoltzmann) -> Call:
    from rbms.bernoulli_bernoulli.classes import BBRBM
    from rbms.partition_function.ais import compute_partition_function_ais

    peer = BBRBM(model.weight, model.left_bias, model.right_bias)
    return warm(warm(lambda: compute_partition_function_ais(NUM_CHAINS, NUM_BETAS, peer)))


def cases() -> Iterator[Case]:
    contenders = {OURS: ours, "PyTorch": torch_ais}
    if not on_gpu():
        contenders["rbms"] = rbms_ais
    yield Case(f"AIS, {N1}+{N2}, {NUM_CHAINS} chains, {NUM_BETAS} betas", draws, contenders)


log_partition = benchmark_of(cases, "log_partition")
