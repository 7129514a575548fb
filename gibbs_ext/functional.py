# SPDX-License-Identifier: Apache-2.0
"""Functions that sample Boltzmann machines over bits by block Gibbs sweeps.

The bipartite model, with left units z [n1] and right units y [n2] in {0, 1}::

    energy(z, y) = - left_bias . z - right_bias . y - z^T weight y,      p(z, y) = exp(-beta * energy(z, y)) / Z(beta)

A sweep draws right given left, then left given right. Batch dims broadcast by stride, from the right: ``weight
[n1, n2]`` is one model that all chains share, and ``weight [M, n1, n2]`` with a state ``[C, M, n1]`` is M models of C
chains each.

The model on a coloured graph, with units z [N] in {0, 1} and a coupling [E] for each edge (u_e, v_e)::

    energy(z) = - sum_i bias_i z_i - sum_e coupling_e z_{u_e} z_{v_e},     p(z) = exp(-beta * energy(z)) / Z(beta)

A sweep draws the units of colour 0 given the rest, then the units of colour 1, and so on. ``coupling [E]`` is one model
that all chains share, and ``coupling [M, E]`` with a state ``[C, M, N]`` is M models of C chains each.

Randomness: the word that decides a unit depends on the seed, the chain, the sweep and the unit alone. Each call draws
one seed from the generator, so calls that continue a run (or do a part of it) must be given the same ``seed``.

Under torch.vmap each row of a call with a ``seed`` equals, to the bit, a call for that row alone. Without a seed
``randomness="different"`` makes rows of independent chains by one call of the op.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gibbs_ext import autograd, ops
from gibbs_ext.arguments import Beta, as_beta, as_clamp, as_counters, as_relaxation, check_graph
from gibbs_ext.checks import check_integers, check_tensors
from gibbs_ext.graphs import ColoredGraph


def bipartite_gibbs(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    num_sweeps: int,
    *,
    beta: Beta = 1.0,
    right: Tensor | None = None,
    clamp_left: Tensor | None = None,
    clamp_right: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Binary block Gibbs sweeps: right given left, then left given right, ``num_sweeps`` times.

    ``P(right_j = 1 | left) = sigmoid(beta * (right_bias_j + sum_i weight_ij left_i))``, and likewise for left, in the
    exact fixed-point arithmetic of csrc/README.md. Couplings are rounded once to ``coupling_resolution``. The resulting
    bits do not depend on the machine, the instruction set, the number of threads or the split of the batch.

    Args:
        left: Starting state [..., n1], values 0 and 1. Its dtype (bool, uint8, float16, bfloat16, float32, float64) is
            the dtype of the result.
        left_bias: [..., n1], floating, finite.
        right_bias: [..., n2], floating, finite.
        weight: [..., n1, n2], floating, finite.
        num_sweeps: Number of sweeps, at least 0.
        beta: Inverse temperature, one number or one per sweep. It multiplies biases and couplings. A tensor [..., 1] or
            [..., num_sweeps] of two or more dims gives each chain its own; the dims before the last are batch dims.
            Chains with one beta run together: a beta [B, 1, 1] for states [B, C, n] is as fast as B calls.
        right: Starting state [..., n2]. Only its clamped units matter, unless ``num_sweeps`` is 0.
        clamp_left: Mask of the left units that keep their value, bool, broadcast to [..., n1].
        clamp_right: Mask of the right units that keep their value, bool, broadcast to [..., n2]. It needs ``right``.
        chain_offset: Number of the first chain; the others follow row by row over the broadcast batch. An integer
            tensor, broadcast to the batch shape, gives the number of each chain. Numbers are below 2^48.
        sweep_offset: Number of the first sweep, below 2^44.
        generator: Generator that supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer that replaces the generator.

    Returns:
        left [*S, n1] and right [*S, n2], new contiguous tensors, where S is the broadcast of every batch shape. With 0
        sweeps they are the starting state, and right is zeros if it is not given.

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit; the message begins with ``bipartite_gibbs:``.
        KeyboardInterrupt: Ctrl-C during the call.

    Not differentiable: see :func:`bipartite_gibbs_relaxed`. Nothing is mutated. A call draws one seed from the
    generator, and one random word per chain, sweep and unit.

    Example:
        >>> left = torch.zeros(1000, 3)
        >>> left, right = bipartite_gibbs(left, torch.zeros(3), torch.zeros(2), torch.ones(3, 2), 10, seed=1)
        >>> left[:500].equal(bipartite_gibbs(torch.zeros(500, 3), torch.zeros(3), torch.zeros(2), torch.ones(3, 2), 10,
        ...                                  seed=1)[0])
        True
    """
    model = {"left": left, "left_bias": left_bias, "right_bias": right_bias, "weight": weight}
    clamps = {"clamp_left": as_clamp(clamp_left, left_bias), "clamp_right": as_clamp(clamp_right, right_bias)}
    args = _read(
        "bipartite_gibbs", model, None, (beta, "beta"), {"right": right, **clamps},
        (generator, seed, chain_offset), {"sweep_offset": sweep_offset, "num_sweeps": num_sweeps},
    )  # fmt: skip
    outputs: tuple[Tensor, Tensor] = ops.call_without_gradient("bipartite_gibbs", *args)
    return outputs


def bipartite_gibbs_relaxed(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    num_sweeps: int = 10,
    num_relaxed_sweeps: int = 1,
    *,
    relaxation: str = "pwl",
    sharpness: float = 4.0,
    slope_gradient: bool = True,
    beta: Beta = 1.0,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, ...]:
    """Binary sweeps without gradient, then relaxed sweeps with it: the sampler of an undirected posterior.

    A Gibbs sweep from z ~ p gives z' ~ p, too. So the gradient of E_p[f] is taken through the parameters of the last
    sweeps alone, which are relaxed to be differentiable (Vahdat, Andriyash, Macready, ICML 2020). A relaxed update has
    ``q = sigmoid(beta * field)``, a uniform u, and

    - ``pwl``: ``zeta = clip(0.5 + slope * (u - (1 - q)), 0, 1)``, ``slope = sharpness / 4 / (q * (1 - q) + 1e-2)``;
    - ``concrete``: ``zeta = sigmoid(sharpness * (beta * field + logit(u)))`` (Maddison et al. 2017);
    - ``straight_through``: ``zeta = [u > 1 - q]``, with the derivative of q;
    - ``mean_field``: ``zeta = q``.

    This gradient is truncated. With the kernel K of a sweep and r relaxed sweeps it is, but for the bias of the
    relaxation and of a binary state that is not from p::

        d E_p[K^r f]  with p held fixed   =   d (E_p[f] - E_p[K^r f])  with K held fixed

    It lacks ``d E_p[K^r f]`` with K held fixed, which is 0 without couplings and falls as r grows. On random machines
    of 6 + 6 units whose couplings have the standard deviations 0.5, 1, 2 and 4, what it lacks has 0.19, 0.38, 0.64 and
    0.81 of the length of the whole gradient if r = 1, and 0.04, 0.20, 0.53 and 0.77 if r = 2 (``python -m
    undirected_vae estimator``). Where that is too much, there are three ways:

    - Couplings can be kept weak, by a small start and weight decay.
    - A second relaxed sweep costs noise: 1.1, 1.7, 2.8 and 4 times that of one sweep of ``pwl``. Five sweeps have a
      noise of 50 and more times the gradient from couplings of 1 on.
    - A score estimator is not truncated, and unbiased for exact samples. The gradient of ``-((f - baseline).detach() *
      model.energy(z)).mean()`` estimates that of E_p[f], for several binary samples z of one ``model`` and the mean of
      f over the others as each one's baseline, with which the gradient of log Z cancels (Kool, van Hoof, Welling,
      2019). Its noise grows with the number of units: with groups of 8 samples and couplings of 0.5 it is 0.8, 1.0 and
      1.2 times that of one sweep of ``pwl`` for 3 + 3, 6 + 6 and 8 + 8 units.

    Args:
        left: Starting state [..., n1] of the parameters' dtype, bool or uint8. Its values are 0 and 1, or any finite
            values (meant to lie in [0, 1]) if ``num_sweeps`` is 0.
        left_bias: [..., n1], finite. All parameters have one dtype: float32, float64, or a half type, for which the
            function computes and returns float32.
        right_bias: [..., n2], finite.
        weight: [..., n1, n2], finite.
        num_sweeps: Number of binary sweeps, at least 0.
        num_relaxed_sweeps: Number of relaxed sweeps, at least 1.
        relaxation: One of the names above.
        sharpness: Positive number that ``pwl`` and ``concrete`` use.
        slope_gradient: Whether ``pwl`` lets the gradient through its slope (Vahdat et al. 2020 do, Andriyash et al.
            2018 stop it).
        beta: Inverse temperature, one number or one per sweep: first the binary, then the relaxed sweeps. Or one for
            each chain, as in :func:`bipartite_gibbs`.
        chain_offset: Number of the first chain, or the number of each, as in :func:`bipartite_gibbs`. Below 2^48.
        sweep_offset: Number of the first binary sweep, below 2^44. The relaxed sweeps follow.
        generator: Generator that supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer that replaces the generator.
        return_state: Whether to return also the binary state before the relaxed sweeps, which persistent chains keep.

    Returns:
        left [*S, n1] and right [*S, n2], in [0, 1], and left_mean [*S, n1], the q of the last left update. Used in
        place of left, it integrates left out of a loss that is linear in left, as an energy is. With ``return_state``
        also the binary state [*S, n1].

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit; the message begins with
            ``bipartite_gibbs_relaxed:``.
        KeyboardInterrupt: Ctrl-C during the call.

    Differentiable, once and in reverse mode, in left_bias, right_bias and weight, and in left if ``num_sweeps`` is 0.
    No gradient reaches beta or sharpness, or passes through the binary state. Nothing is mutated. Random numbers are
    drawn as in :func:`bipartite_gibbs`.
    """
    model = {"left": left, "left_bias": left_bias, "right_bias": right_bias, "weight": weight}
    numbers = {"sweep_offset": sweep_offset, "num_sweeps": num_sweeps, "num_relaxed_sweeps": num_relaxed_sweeps}
    args = _read(
        "bipartite_gibbs_relaxed", model, None, (beta, "beta"), {},
        (generator, seed, chain_offset), numbers, (relaxation, sharpness, slope_gradient),
    )  # fmt: skip
    *outputs, binary_state, _fields = autograd.relaxed_sweeps("bipartite_gibbs_relaxed", *args)
    return (*outputs, binary_state) if return_state else tuple(outputs)


def bipartite_ais(
    left: Tensor,
    left_bias: Tensor,
    right_bias: Tensor,
    weight: Tensor,
    base_left_bias: Tensor,
    base_right_bias: Tensor,
    betas: Sequence[float] | Tensor,
    *,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Annealed importance sampling from a factorial base model to a bipartite one (Neal 2001, Salakhutdinov 2008).

    The path is ``f_b(z, y) = exp(-b * energy(z, y)) * exp((1 - b) * (base_left_bias . z + base_right_bias . y))``. At
    each step from b to b' of ``betas`` every chain adds ``log f_b'(left) - log f_b(left)``, with right summed out,
    to its log-weight and then makes one sweep at b'.

    The estimator :func:`gibbs_ext.annealed_importance_sampling` uses this function.

    Args:
        left: States [..., n1] of values 0 and 1, distributed as ``f_betas[0]``. The results have the same dtype.
        left_bias: [..., n1], floating, finite.
        right_bias: [..., n2], floating, finite.
        weight: [..., n1, n2], floating, finite.
        base_left_bias: Biases [..., n1] of the base model, floating, finite.
        base_right_bias: Biases [..., n2] of the base model, floating, finite.
        betas: Inverse temperatures [K + 1], ascending for the usual direction, descending for the reverse one.
        chain_offset: Number of the first chain, or the number of each, as in :func:`bipartite_gibbs`. Below 2^48.
        sweep_offset: Number of the first sweep, below 2^44.
        generator: Generator that supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer that replaces the generator.

    Returns:
        left [*S, n1] and right [*S, n2] after the last sweep, and log-weights [*S] float64 whose exponentials average
        to ``Z(betas[-1]) / Z(betas[0])``. Logits are float32 and sums are float64: over 10000 steps of 100 + 100 units
        the log-weights are off by about 1e-4, far less than their spread.

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit; the message begins with ``bipartite_ais:``.
        KeyboardInterrupt: Ctrl-C during the call.

    Not differentiable. Nothing is mutated. Random numbers are drawn as in :func:`bipartite_gibbs`, for one sweep a
    step.
    """
    model = {"left": left, "left_bias": left_bias, "right_bias": right_bias, "weight": weight}
    bases = {"base_left_bias": base_left_bias, "base_right_bias": base_right_bias}
    args = _read(
        "bipartite_ais", model | bases, None, (betas, "betas"), {},
        (generator, seed, chain_offset), {"sweep_offset": sweep_offset},
    )  # fmt: skip
    outputs: tuple[Tensor, Tensor, Tensor] = ops.call_without_gradient("bipartite_ais", *args)
    return outputs


def graph_gibbs(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: ColoredGraph,
    num_sweeps: int,
    *,
    beta: Beta = 1.0,
    clamp: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Binary block Gibbs sweeps on a coloured graph: colour 0 given the rest, then colour 1, ..., ``num_sweeps`` times.

    ``P(z_i = 1 | rest) = sigmoid(beta * (bias_i + sum of coupling_ij over the neighbours j that are 1))``, in the exact
    fixed-point arithmetic of csrc/README.md. The resulting bits do not depend on the machine, the instruction set, the
    number of threads, the split of the batch or the route (tables or sums).

    Args:
        state: Starting state [..., N], values 0 and 1. Its dtype (bool, uint8, float16, bfloat16, float32, float64) is
            the dtype of the result.
        bias: [..., N], floating, finite.
        coupling: [..., E], floating, finite, of bias's dtype: one for each of ``graph.edges``.
        graph: A :class:`ColoredGraph` of N nodes and E edges, for instance a :class:`ChimeraGraph`.
        num_sweeps: Number of sweeps, at least 0.
        beta: Inverse temperature, one number or one per sweep. It multiplies biases and couplings. A tensor [..., 1] or
            [..., num_sweeps] of two or more dims gives each chain its own; the dims before the last are batch dims.
            Chains with one beta run together: a beta [B, 1, 1] for states [B, C, n] is as fast as B calls.
        clamp: Mask of the units that keep their value, bool, broadcast to [..., N].
        chain_offset: Number of the first chain; the others follow row by row over the broadcast batch. An integer
            tensor, broadcast to the batch shape, gives the number of each chain. Numbers are below 2^48.
        sweep_offset: Number of the first sweep, below 2^44.
        generator: Generator that supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer that replaces the generator.

    Returns:
        The state [*S, N], a new contiguous tensor, where S is the broadcast of every batch shape.

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit; the message begins with ``graph_gibbs:``.
        KeyboardInterrupt: Ctrl-C during the call.

    Not differentiable: see :func:`graph_gibbs_relaxed`. Nothing is mutated. A call draws one seed from the generator,
    and one random word per chain, sweep and unit.

    Calls are fastest with many chains that share coupling and bias, on a graph of degree at most 8, with a beta that
    stays the same for many sweeps. Threads take the chains of one model in groups of 16 (64 with tables), so that fewer
    chains use fewer threads.

    Example:
        >>> graph = ColoredGraph(3, [(0, 1), (1, 2)])
        >>> model = torch.zeros(3), torch.ones(2), graph
        >>> state = graph_gibbs(torch.zeros(1000, 3), *model, 10, beta=0.5, seed=1)
        >>> state[:500].equal(graph_gibbs(torch.zeros(500, 3), *model, 10, beta=0.5, seed=1))
        True
    """
    model = {"state": state, "bias": bias, "coupling": coupling}
    args = _read(
        "graph_gibbs", model, graph, (beta, "beta"), {"clamp": as_clamp(clamp, bias)},
        (generator, seed, chain_offset), {"sweep_offset": sweep_offset, "num_sweeps": num_sweeps},
    )  # fmt: skip
    output: Tensor = ops.call_without_gradient("graph_gibbs", *args)
    return output


def graph_metropolis(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: ColoredGraph,
    num_sweeps: int,
    *,
    beta: Beta = 1.0,
    clamp: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Metropolis sweeps on a coloured graph: colour 0 given the rest, then colour 1, ..., ``num_sweeps`` times.

    All units of a colour propose to flip at once. Unit i does so with probability ``min(1, exp(-beta * dE_i))``, where
    ``dE_i = (2 z_i - 1) * (bias_i + sum of coupling_ij over the neighbours j that are 1)`` is the energy that its flip
    adds (Metropolis et al., Equation of State Calculations by Fast Computing Machines, 1953). The sweeps leave the same
    law unchanged as those of :func:`graph_gibbs`, and their arithmetic is as exact: the resulting bits do not depend on
    the machine, the instruction set, the number of threads or the split of the batch.

    A flip that costs no energy is always made. So a sweep flips every unit at beta = 0, or without biases and
    couplings. The chain is periodic then, and does not approach the uniform law that it leaves unchanged.

    Args:
        state: Starting state [..., N], values 0 and 1. Its dtype (bool, uint8, float16, bfloat16, float32, float64) is
            the dtype of the result.
        bias: [..., N], floating, finite.
        coupling: [..., E], floating, finite, of bias's dtype: one for each of ``graph.edges``.
        graph: A :class:`ColoredGraph` of N nodes and E edges, for instance a :class:`ChimeraGraph`.
        num_sweeps: Number of sweeps, at least 0.
        beta: Inverse temperature, one number or one per sweep. It multiplies biases and couplings. A tensor [..., 1] or
            [..., num_sweeps] of two or more dims gives each chain its own; the dims before the last are batch dims.
            Chains with one beta run together: a beta [B, 1, 1] for states [B, C, n] is as fast as B calls. A flip that
            would add 22.19 / beta or more to the energy is never made.
        clamp: Mask of the units that keep their value, bool, broadcast to [..., N].
        chain_offset: Number of the first chain, or the number of each, as in :func:`graph_gibbs`. Below 2^48.
        sweep_offset: Number of the first sweep, below 2^44.
        generator: Generator that supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer that replaces the generator.

    Returns:
        The state [*S, N], a new contiguous tensor, where S is the broadcast of every batch shape.

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit; the message begins with ``graph_metropolis:``.
        KeyboardInterrupt: Ctrl-C during the call.

    Not differentiable. Nothing is mutated. Random numbers are drawn as in :func:`graph_gibbs`, with the same words for
    the same numbers. On the CPU chains are handled in groups of 16, and a partly filled group costs as much as a full
    one. With many chains of one model, tables make :func:`graph_gibbs` several times as fast.

    Example:
        >>> graph = ColoredGraph(3, [(0, 1), (1, 2)])
        >>> graph_metropolis(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3), torch.zeros(2), graph, 1)
        tensor([0., 1., 1.])
    """
    model = {"state": state, "bias": bias, "coupling": coupling}
    args = _read(
        "graph_metropolis", model, graph, (beta, "beta"), {"clamp": as_clamp(clamp, bias)},
        (generator, seed, chain_offset), {"sweep_offset": sweep_offset, "num_sweeps": num_sweeps},
    )  # fmt: skip
    output: Tensor = ops.call_without_gradient("graph_metropolis", *args)
    return output


def graph_gibbs_relaxed(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: ColoredGraph,
    num_sweeps: int = 10,
    num_relaxed_sweeps: int = 1,
    *,
    relaxation: str = "pwl",
    sharpness: float = 4.0,
    slope_gradient: bool = True,
    beta: Beta = 1.0,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, ...]:
    """Binary sweeps without gradient, then relaxed sweeps with it: :func:`bipartite_gibbs_relaxed` on a coloured graph.

    The gradient is truncated as described there: with the kernel K of a sweep over all colours and r relaxed sweeps it
    is ``d (E_p[f] - E_p[K^r f])`` with K held fixed, but for the relaxation's bias. The same holds for what it lacks,
    and for what to do where that is too much.

    Args:
        state: Starting state [..., N] of the parameters' dtype, bool or uint8. Its values are 0 and 1, or any finite
            values (meant to lie in [0, 1]) if ``num_sweeps`` is 0.
        bias: [..., N], finite, of coupling's dtype: float32, float64, or a half type, for which the function computes
            and returns float32.
        coupling: [..., E], finite: one for each of ``graph.edges``.
        graph: A :class:`ColoredGraph` of N nodes and E edges.
        num_sweeps: Number of binary sweeps, at least 0.
        num_relaxed_sweeps: Number of relaxed sweeps, at least 1.
        relaxation: ``"pwl"``, ``"concrete"``, ``"straight_through"`` or ``"mean_field"``, as described there.
        sharpness: Positive number that ``pwl`` and ``concrete`` use.
        slope_gradient: Whether ``pwl`` lets the gradient through its slope.
        beta: Inverse temperature, one number or one per sweep: first the binary, then the relaxed sweeps. Or one for
            each chain, as in :func:`graph_gibbs`.
        chain_offset: Number of the first chain, or the number of each, as in :func:`graph_gibbs`. Below 2^48.
        sweep_offset: Number of the first binary sweep, below 2^44. The relaxed sweeps follow.
        generator: Generator that supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer that replaces the generator.
        return_state: Whether to return also the binary state before the relaxed sweeps, which persistent chains keep.

    Returns:
        The relaxed state [*S, N] in [0, 1], and mean [*S, N], the q of each unit's last update. For the units of the
        last colour it is their conditional mean given all others. Used in their place, it integrates them out of a loss
        that is linear in them, as an energy is. With ``return_state`` also the binary state [*S, N].

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit; the message begins with
            ``graph_gibbs_relaxed:``.
        KeyboardInterrupt: Ctrl-C during the call.

    Differentiable, once and in reverse mode, in bias and coupling, and in state if ``num_sweeps`` is 0. No gradient
    reaches beta or sharpness, or passes through the binary state. Nothing is mutated. Random numbers are drawn as in
    :func:`graph_gibbs`.
    """
    model = {"state": state, "bias": bias, "coupling": coupling}
    numbers = {"sweep_offset": sweep_offset, "num_sweeps": num_sweeps, "num_relaxed_sweeps": num_relaxed_sweeps}
    args = _read(
        "graph_gibbs_relaxed", model, graph, (beta, "beta"), {},
        (generator, seed, chain_offset), numbers, (relaxation, sharpness, slope_gradient),
    )  # fmt: skip
    *outputs, binary_state, _fields = autograd.relaxed_sweeps("graph_gibbs_relaxed", *args)
    return (*outputs, binary_state) if return_state else tuple(outputs)


def graph_ais(
    state: Tensor,
    bias: Tensor,
    coupling: Tensor,
    graph: ColoredGraph,
    base_bias: Tensor,
    betas: Sequence[float] | Tensor,
    *,
    chain_offset: int | Tensor = 0,
    sweep_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Annealed importance sampling from a factorial base model to one on a coloured graph (Neal 2001).

    The path is ``f_b(z) = exp(-b * energy(z)) * exp((1 - b) * base_bias . z)``. At each step from b to b' of ``betas``
    every chain adds ``log f_b'(rest) - log f_b(rest)`` to its log-weight and then makes one sweep at b'. Here rest are
    the units of colour 1 and above, and the units of colour 0 are summed out. :func:`bipartite_ais` is the case of two
    colours.

    The estimator :func:`gibbs_ext.annealed_importance_sampling` uses this function.

    Args:
        state: States [..., N] of values 0 and 1, distributed as ``f_betas[0]``. The result has the same dtype.
        bias: [..., N], floating, finite.
        coupling: [..., E], floating, finite, of bias's dtype: one for each of ``graph.edges``.
        graph: A :class:`ColoredGraph` of N nodes and E edges.
        base_bias: Biases [..., N] of the base model, floating, finite.
        betas: Inverse temperatures [K + 1], ascending for the usual direction, descending for the reverse one.
        chain_offset: Number of the first chain, or the number of each, as in :func:`graph_gibbs`. Below 2^48.
        sweep_offset: Number of the first sweep, below 2^44.
        generator: Generator that supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer that replaces the generator.

    Returns:
        The state [*S, N] after the last sweep, and log-weights [*S] float64 whose exponentials average to
        ``Z(betas[-1]) / Z(betas[0])``. Logits are float32 and sums are float64.

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit; the message begins with ``graph_ais:``.
        KeyboardInterrupt: Ctrl-C during the call.

    Not differentiable. Nothing is mutated. Random numbers are drawn as in :func:`graph_gibbs`, for one sweep a step.
    """
    model = {"state": state, "bias": bias, "coupling": coupling}
    args = _read(
        "graph_ais", model | {"base_bias": base_bias}, graph, (betas, "betas"), {},
        (generator, seed, chain_offset), {"sweep_offset": sweep_offset},
    )  # fmt: skip
    outputs: tuple[Tensor, Tensor] = ops.call_without_gradient("graph_ais", *args)
    return outputs


def graph_fields(state: Tensor, bias: Tensor, coupling: Tensor, graph: ColoredGraph) -> Tensor:
    """``field_i = bias_i + sum_e coupling_e state_j`` over the edges e = (i, j) of each unit.

    An energy is ``- sum_i state_i (bias_i + field_i) / 2``. A unit's logit given the others is its field.

    Args:
        state: Bits or relaxed values [..., N], which are converted to the parameters' dtype.
        bias: [..., N], floating. For half types the function computes and returns float32.
        coupling: [..., E], of bias' dtype: one for each of ``graph.edges``.
        graph: A :class:`ColoredGraph` of N nodes and E edges.

    Returns:
        The fields [*S, N], where S is the broadcast of every batch shape. Each node's edges are summed in their order,
        on every run.

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit; the message begins with ``graph_fields:``.

    Differentiable in state, bias and coupling, any number of times, in reverse and in forward mode. Nothing is mutated.
    """
    name = "graph_fields"
    check_tensors(name, state=state, bias=bias, coupling=coupling)
    check_graph(name, graph)
    layout = graph.layout_on(state.device)
    return autograd.graph_fields(state.to(ops.computed_dtype(coupling)), bias, coupling, layout)


def _read(
    name: str,
    tensors: dict[str, Tensor],
    graph: ColoredGraph | None,
    beta: tuple[Beta, str],
    optional: dict[str, Tensor | None],
    counters: tuple[torch.Generator | None, int | Tensor | None, int | Tensor],
    numbers: dict[str, int],
    relaxation: tuple[str, float, bool] | None = None,
) -> list[Any]:
    """Checks arguments, and returns them as the op takes them, in the op's order.

    Args:
        name: Name of the op and of the function, with which errors begin.
        tensors: State, biases, coupling and base biases, by argument.
        graph: The graph of a model that has ``coupling``.
        beta: beta, and the argument's name.
        optional: Tensors that may be None, by argument.
        counters: generator, seed and chain_offset.
        numbers: Integers, by argument.
        relaxation: The relaxation's name, sharpness and slope_gradient, of relaxed sweeps.
    """
    given = tensors | {argument: tensor for argument, tensor in optional.items() if tensor is not None}
    check_tensors(name, **given)
    from_model = list(tensors.values())  # not by unpacking, which makes a tuple when PyTorch 2.10 compiles it
    device = from_model[0].device
    if "coupling" in tensors:
        from_model.insert(3, check_graph(name, graph).layout_on(device))  # after state, bias and coupling
    check_integers(name, **numbers)
    options = (*as_relaxation(name, *relaxation[:2]), bool(relaxation[2])) if relaxation else ()
    betas = as_beta(name, *beta, device)
    seed, chains, chain_offset = as_counters(name, *counters, device, given | {"beta": betas})
    return [*from_model, betas, seed, *optional.values(), chains, chain_offset, *numbers.values(), *options]
