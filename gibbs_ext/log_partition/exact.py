# SPDX-License-Identifier: Apache-2.0
"""Exact log Z, marginals and samples. Each model names the solver that it needs: enumeration or elimination."""

from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from gibbs_ext.arguments import as_seed
from gibbs_ext.checks import check_integers
from gibbs_ext.log_partition.machine import Machine, Solver, check_model


class Marginals(NamedTuple):
    """The result of :func:`exact_marginals`; M stands for the model's batch shape."""

    single: Tensor  # [M, N] float64: P(z_i = 1); of a bipartite model left before right, [M, n1 + n2]
    pair: Tensor  # [M, E] float64: P(z_u = z_v = 1) of each edge (u, v); bipartite [M, n1, n2]: P(left_i = right_j = 1)


def exact_log_partition(model: Machine) -> Tensor:
    """``log Z``: of a bipartite model by enumerating the smaller side, of a graph by eliminating its nodes.

    Args:
        model: A bipartite model whose smaller side has at most 25 units; 2^20 states of 100 other units take seconds.
            Or a model on a graph, of width 24 or less in the order found (a Chimera graph's is
            shore * min(rows, cols)). Width 16 takes less than a second, 20 seconds, 24 minutes and a gigabyte.

    Returns:
        [*batch_shape] float64. Differentiable in the parameters; for graphs once only, and at several times the cost.

    Raises:
        ValueError: The model is too large, and how large it is; or a parameter is not finite.
        NotImplementedError: A second derivative of a graph's; or torch.func.grad of a bipartite model for which only
            torch.autograd.grad has the memory, as it computes parts again.
    """
    name = "exact_log_partition"
    check_model(name, model)
    return model._solver.log_partition(name, model._parameters)


@torch.no_grad()
def exact_marginals(model: Machine) -> Marginals:
    """Probabilities of units and of coupled pairs: by enumeration, or by eliminating the nodes and then going back.

    Args:
        model: A bipartite model, as for :func:`exact_log_partition`, at three times its cost. Or a model on a graph, as
            there; the width may be about 20, because all tables are kept.

    Returns:
        :class:`Marginals`. Not differentiable.

    Raises:
        ValueError: The model is too large, and how large it is; or a parameter is not finite.
    """
    name = "exact_marginals"
    check_model(name, model)
    return log_partition_and_marginals(name, model)[1]


@torch.no_grad()
def exact_samples(
    model: Machine,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Independent draws from the model itself, without a Markov chain.

    The smaller side of a bipartite model is drawn from all its states, and the other side given that. A graph's nodes
    are eliminated, and drawn in the reverse order.

    Args:
        model: A model as for :func:`exact_marginals`; a bipartite one takes about twice the time of
            :func:`exact_log_partition`.
        num_samples: C, draws per model.
        generator: Supplies the seed; the default generator when neither is given.
        seed: A 64-bit integer, instead of a generator. PyTorch's generators look at its lower 32 bits.

    Returns:
        [C, *batch_shape, N] bits of the parameters' dtype; of a bipartite model left before right.

    Raises:
        TypeError, ValueError: As :func:`exact_marginals`; or num_samples, generator or seed do not fit.
        NotImplementedError: Under torch.vmap, where a parameter or the seed is mapped.
    """
    name = "exact_samples"
    check_model(name, model)
    check_integers(name, 0, num_samples=num_samples)
    number = as_seed(name, generator, seed, model.device)
    parameters = [parameter.detach() for parameter in model._parameters]
    z: Tensor = _Samples.apply(model._solver, num_samples, number, *parameters)  # type: ignore[no-untyped-call]
    return z.movedim(-2, 0).to(model.dtype)


@torch.no_grad()
def log_partition_and_marginals(name: str, model: Machine) -> tuple[Tensor, Marginals]:
    """log Z [*batch_shape] and :class:`Marginals`. ``name`` is the caller's, for errors."""
    parameters = [parameter.detach() for parameter in model._parameters]
    log_partition, single, pair = model._solver.marginals(name, parameters)
    return log_partition, Marginals(single, pair)


def without_derivative(name: str, value: Tensor, model: Machine) -> Tensor:
    """``value``, a function of the parameters; asking for its gradient is an error rather than zero."""
    return cast(Tensor, _NotDifferentiable.apply(name, value, *model._parameters))  # type: ignore[no-untyped-call]


class _NotDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, value: Tensor, *parameters: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> NoReturn:
        raise NotImplementedError(f"{ctx.name}: derivatives are not supported")

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:
        raise NotImplementedError(f"{ctx.name}: derivatives are not supported")


class _Samples(torch.autograd.Function):
    """[*S, C, N] by a solver. A Function, because torch.vmap would refuse its random draws."""

    @staticmethod
    def forward(solver: Solver, num_samples: int, seed: Tensor, *parameters: Tensor) -> Tensor:
        generator = torch.Generator(parameters[0].device).manual_seed(int(seed))
        return solver.samples("exact_samples", parameters, num_samples, generator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise NotImplementedError("exact_samples: torch.vmap is not supported; give the model a batch shape instead")
