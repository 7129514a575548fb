# SPDX-License-Identifier: Apache-2.0
"""The parameters of a Boltzmann machine over bits as those of an Ising model over spins, and back."""

import torch
from torch import Tensor

from gibbs_ext.checks import check_tensors, check_units, shown
from gibbs_ext.graphs import ColoredGraph, Integers, as_integers

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The sign of h and J in an Ising energy.
CONVENTIONS = {"dimod": 1, "physics": -1}


def _sign(name: str, convention: str) -> int:
    if not isinstance(convention, str) or convention not in CONVENTIONS:
        raise ValueError(f"{name}: convention must be one of {', '.join(CONVENTIONS)}, got {shown(convention)}")
    return CONVENTIONS[convention]


def _check_parameters(name: str, edges: ColoredGraph | Integers, **parameters: Tensor) -> Tensor:
    """Checks that one parameter fits the nodes, the other the edges. Returns the edges [E, 2] on their device."""
    (on_nodes, on_edges), (nodes, couplings) = parameters, parameters.values()
    check_tensors(name, **parameters)
    for argument, tensor in parameters.items():
        if tensor.dtype not in _FLOATS or tensor.dtype != nodes.dtype:
            wanted = f"{on_nodes} and {on_edges} must be of one dtype, float16, bfloat16, float32 or float64"
            raise TypeError(f"{name}: {wanted}, got {argument} {tensor.dtype}")
    if isinstance(edges, ColoredGraph):
        check_units(name, on_nodes, nodes, edges.num_nodes)
        pairs = edges.edges_on(nodes.device)
    else:
        if not nodes.dim():
            raise ValueError(f"{name}: {on_nodes} must have shape [..., N], got []")
        n, pairs = nodes.shape[-1], as_integers(name, "edges", edges, pairs=True)
        for u, v in pairs[((pairs < 0) | (pairs >= n)).any(1) | (pairs[:, 0] == pairs[:, 1])].tolist()[:1]:
            raise ValueError(f"{name}: edges must join two of the nodes 0 .. {n - 1} of {on_nodes}, got ({u}, {v})")
    check_units(name, on_edges, couplings, len(pairs))
    try:
        torch.broadcast_shapes(nodes.shape[:-1], couplings.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name}: {on_edges} must broadcast with {on_nodes} {list(nodes.shape)}, got {list(couplings.shape)}"
        ) from None
    return pairs.to(nodes.device)


def _at_nodes(values: Tensor, edges: Tensor, num_nodes: int) -> Tensor:
    """The sum [..., N] of the values [..., E] of each node's edges."""
    # Values are added edge by edge, so that the rounding does not depend on the direction of an edge.
    zeros = values.new_zeros(*values.shape[:-1], num_nodes)
    return zeros.index_add(-1, edges.reshape(-1), values.repeat_interleave(2, -1))


def ising_to_boltzmann(
    h: Tensor, J: Tensor, edges: ColoredGraph | Integers, *, convention: str = "dimod"
) -> tuple[Tensor, Tensor, Tensor]:
    """The Boltzmann machine over bits z that is equivalent to an Ising model over spins s = 2 z - 1::

        ising_energy(s) = energy(z) + offset,        energy(z) = - bias . z - sum_e coupling_e z_u z_v

    with (u, v) = ``edges[e]``, where the energy of the Ising model is, by convention,

    - ``dimod``: ``ising_energy(s) = + h . s + sum_e J_e s_u s_v``; aligned spins are favoured by negative J;
    - ``physics``: ``ising_energy(s) = - h . s - sum_e J_e s_u s_v``; they are favoured by positive J.

    Both models have the probabilities ``exp(-beta * energy) / Z``, which are therefore equal.

    Args:
        h: [..., N] float16, bfloat16, float32 or float64.
        J: [..., E] of h's dtype. Batch dims broadcast.
        edges: The graph, or [E, 2] integers.
        convention: The sign of h and J.

    Returns:
        bias [*S, N]; coupling [..., E] with the batch dims of J; offset [*S] as in the formula. S is the broadcast of
        the batch shapes.

    Raises:
        TypeError, ValueError: An argument does not fit; the message begins with ``ising_to_boltzmann:``.

    Differentiable. Nothing is mutated.

    Example:
        >>> ising_to_boltzmann(torch.tensor([0.5, 0.0]), torch.tensor([-1.0]), [(0, 1)])
        (tensor([-3., -2.]), tensor([4.]), tensor(-1.5000))
    """
    name = "ising_to_boltzmann"
    sign = _sign(name, convention)
    pairs = _check_parameters(name, edges, h=h, J=J)
    bias = 2 * sign * (_at_nodes(J, pairs, h.shape[-1]) - h)
    return bias, -4 * sign * J, sign * (J.sum(-1) - h.sum(-1))


def boltzmann_to_ising(
    bias: Tensor, coupling: Tensor, edges: ColoredGraph | Integers, *, convention: str = "dimod"
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`ising_to_boltzmann`, with the same formulas and conventions, but for the offset::

        energy(z) = ising_energy(s) + offset

    So with ``dimod``, h, J and offset make a BinaryQuadraticModel whose energies are ``energy``. The offset is minus
    that of :func:`ising_to_boltzmann`.

    Args:
        bias: [..., N] float16, bfloat16, float32 or float64.
        coupling: [..., E] of bias's dtype. Batch dims broadcast.
        edges: The graph, or [E, 2] integers.
        convention: The sign of h and J.

    Returns:
        h [*S, N]; J [..., E] with the batch dims of coupling; offset [*S] as in the formula. S is the broadcast of the
        batch shapes.

    Raises:
        TypeError, ValueError: An argument does not fit; the message begins with ``boltzmann_to_ising:``.

    Differentiable. Nothing is mutated.
    """
    name = "boltzmann_to_ising"
    sign = _sign(name, convention)
    pairs = _check_parameters(name, edges, bias=bias, coupling=coupling)
    h = -sign * (bias / 2 + _at_nodes(coupling, pairs, bias.shape[-1]) / 4)
    return h, -sign * coupling / 4, -(bias.sum(-1) / 2 + coupling.sum(-1) / 4)
