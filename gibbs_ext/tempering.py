# SPDX-License-Identifier: Apache-2.0
"""Parallel tempering: chains at several inverse temperatures that exchange them, so that all can cross barriers."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gibbs_ext.arguments import as_beta, as_chains, as_seed
from gibbs_ext.checks import (
    check_all,
    check_flags,
    check_integers,
    check_values,
    expand_to,
    is_readable,
    reported_as,
    shown,
    warn,
)
from gibbs_ext.log_partition.machine import check_model, refuse_vmap
from gibbs_ext.models.base import Boltzmann
from gibbs_ext.progress import parts

# Fewer swaps than this say nothing about a ladder.
_FEWEST_ATTEMPTS = 100
_LEAST_RATE = 0.01
# Bounds of csrc/core/philox.h.
_MAX_CHAINS, _MAX_SWEEPS = 2**48, 2**44


class TemperingWarning(UserWarning):
    """Two neighbouring betas of a ladder exchange replicas in less than one round of a hundred.

    The ladder falls apart there: samples beyond the gap come from chains that were never hot. More betas between the
    two help; :func:`gibbs_ext.tune_ladder` places them. It is not checked on a GPU, because reading the rates would
    synchronise: see :attr:`TemperingResult.swap_rates`.
    """


class TemperingResult(NamedTuple):
    """The result of :func:`parallel_tempering`. B betas, C chains, M the model's batch shape, R rounds, N units."""

    samples: Tensor  # [C, *M, N] bits at the last beta
    all_samples: Tensor  # [B, C, *M, N] bits at each beta
    swap_rates: Tensor  # [B - 1, *M] float64: mean probability of a swap between neighbouring betas (nan if R is 0)
    round_trips: Tensor  # [*M] int64: how often replicas came back to the first beta from the last one
    energies: Tensor  # [R, B, C, *M] float64: energies at each beta after the sweeps of each round
    replicas: Tensor  # [R, B, C, *M] int64: the replica, 0 to B - 1, that is at each beta after the swaps of each round
    current_replicas: Tensor  # [B, C, *M] int64: those after the last round
    betas: Tensor  # [B] float64
    next_sweep: int  # number of the sweep with which a run that goes on begins
    cluster_moves: bool  # whether the chains 2c and 2c + 1 have exchanged clusters, so that they are not independent


def parallel_tempering(
    model: Boltzmann,
    num_chains: int,
    betas: Sequence[float] | Tensor,
    num_sweeps: int,
    *,
    sweeps_per_swap: int = 1,
    cluster_moves: bool = False,
    initial: Tensor | TemperingResult | None = None,
    chain_offset: int | Tensor = 0,
    progress: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> TemperingResult:
    """Samples a model at all inverse temperatures of a ladder, between which chains move up and down.

    Each of C chains has a replica at every beta. A round makes ``sweeps_per_swap`` block Gibbs sweeps at each beta and
    then exchanges the betas of neighbouring replicas, with probability
    ``min(1, exp((beta - beta') * (energy - energy')))``, between the betas 0 and 1, 2 and 3, ... in one round and 1 and
    2, 3 and 4, ... in the next (Hukushima and Nemoto 1996; Geyer 1991; the alternation is that of Okabe et al. 2001,
    which Syed et al. 2022 prove to be better than a random choice). A chain that is stuck in one mode at a large beta
    thus comes back by way of small ones, where it is free. All sweeps and swaps are one compiled call, in which
    energies are exact sums of the rounded couplings (csrc/README.md, 2.7), so that the bits depend on the seed and the
    numbers of chains and sweeps alone.

    Args:
        model: A :class:`gibbs_ext.BipartiteBoltzmann` or a :class:`gibbs_ext.GraphBoltzmann` of any batch shape M.
        num_chains: C, at least 1.
        betas: The ladder [B], strictly rising or falling; finite. ``samples`` are those of the last one, usually 1.
        num_sweeps: Number of sweeps of each replica, a multiple of ``sweeps_per_swap``, at least 0.
        sweeps_per_swap: Sweeps of a round, at least 1.
        cluster_moves: Whether the chains 2c and 2c + 1 also exchange a cluster at each beta, between the sweeps and the
            swaps of a round (Houdayer, "A cluster Monte Carlo algorithm for 2-dimensional spin glasses", 2001; Zhu,
            Ochoa and Katzgraber, "Efficient cluster algorithm for spin glasses in any space dimension", 2015). Of the
            units that differ between the two, one is drawn, and all that are connected with it by units that differ,
            through edges whose rounded coupling is not 0, change places. That leaves the sum of both energies as it is
            and is always accepted, so that all laws stay right. It helps where such clusters are small against the
            graph, as on square lattices at large betas; on graphs of many neighbours, and at small betas, they hold
            nearly all units that differ, and a move does little. The last chain of an odd number makes none. Only for
            graphs. Chains of a pair are not independent of each other, but pairs are.
        initial: Where replicas start: z [B, C, *M, N] of values 0 and 1, or what broadcasts to it (of a bipartite model
            only left is read). Or the result of an earlier call with this model, C and betas, which goes on: two calls
            with one seed make the bits of one. Uniform bits if it is None. Calls of one round each have to go on from
            results, because the turns of the pairs begin anew from z.
        chain_offset: Number of the first of the C * M chains, or their numbers [C, *M], below 2^48 / B. Replica r of
            chain c has the number c * B + r in the random counter, and cluster moves take that of a pair's first chain.
        progress: Whether to show a progress bar (tqdm).
        generator: Supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

    Returns:
        :class:`TemperingResult`, without gradients. The samples have the parameters' dtype.

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit: no chains, a ladder that is not strictly
            monotone, a number of sweeps that is no multiple of ``sweeps_per_swap``, cluster moves of a bipartite model.
            The message begins with ``parallel_tempering:``.
        KeyboardInterrupt: Ctrl-C during the call.
        NotImplementedError: Under torch.vmap, where a tensor is mapped or each row has a seed of its own.

    Warns:
        TemperingWarning: Two neighbours exchange replicas in less than one round of a hundred.

    Example:
        >>> model = BipartiteBoltzmann(torch.zeros(4), torch.zeros(4), torch.full((4, 4), 2.0))
        >>> result = parallel_tempering(model, 100, torch.linspace(0, 1, 8), 50, seed=1)
        >>> result.samples.shape, result.swap_rates.shape
        (torch.Size([100, 8]), torch.Size([7]))
    """
    name = "parallel_tempering"
    check_model(name, model)
    refuse_vmap(name, model)
    check_integers(name, 1, num_chains=num_chains, sweeps_per_swap=sweeps_per_swap)
    check_integers(name, 0, num_sweeps=num_sweeps)
    check_flags(name, cluster_moves=cluster_moves, progress=progress)
    if num_sweeps >= _MAX_SWEEPS:
        raise ValueError(f"{name}: num_sweeps must be below 2^44, got {num_sweeps}")
    if num_sweeps % sweeps_per_swap:
        raise ValueError(
            f"{name}: num_sweeps must be a multiple of sweeps_per_swap, {sweeps_per_swap}, got {num_sweeps}"
        )
    ladder = read_ladder(name, betas, model.device)
    columns = (num_chains, *model.batch_shape)
    shape = (len(ladder), *columns)
    call_seed = as_seed(name, generator, seed, model.device)
    refuse_vmap(name, model, call_seed, initial, chain_offset)
    numbers = _column_numbers(name, chain_offset, columns, len(ladder), model.device) * len(ladder)
    replicas = torch.arange(len(ladder), device=model.device).reshape(-1, *[1] * len(columns)).expand(shape)
    sweep = 1  # Uniform bits have the words of sweep 0.
    have_moved = bool(cluster_moves)
    if isinstance(initial, TemperingResult):
        if initial.all_samples.shape[:-1] != shape or not initial.betas.equal(ladder.to(initial.betas.device)):
            raise ValueError(
                f"{name}: initial must be a result of the same chains and betas, {list(shape)} states, got "
                f"{list(initial.all_samples.shape[:-1])} or other betas"
            )
        sweep, replicas = initial.next_sweep, initial.current_replicas
        have_moved = have_moved or initial.cluster_moves
        initial = initial.all_samples
    if initial is None:
        state_shape = (*shape, model._num_state_units)
        with reported_as(name):
            state = model._draw_uniform(state_shape, chain_offset=numbers + replicas, seed=call_seed)
    else:
        z = expand_to(name, "initial", initial, (*shape, model.num_units)).to(model.dtype)
        state = model._state_of(z)

    beta = ladder.reshape(-1, *[1] * len(columns), 1)
    chains = (numbers + replicas).contiguous()
    num_swaps = num_sweeps // sweeps_per_swap
    traces: list[tuple[Tensor, Tensor]] = []
    with reported_as(name, left="initial", state="initial", chains="chain_offset"):
        for swaps in parts(name, num_swaps, progress):
            z, energies, chains_at = model._temper(
                state, beta, call_seed, chains, sweep, sweeps_per_swap, swaps, cluster_moves=bool(cluster_moves)
            )
            traces.append((energies, chains_at - numbers))
            state, sweep = model._state_of(z), sweep + swaps * sweeps_per_swap
            chains = chains_at[-1] if swaps else chains
    energies, replicas_at = (torch.cat(trace) for trace in zip(*traces, strict=True))
    rates = _swap_rates(energies, ladder)
    _check_rates(name, rates, num_swaps * num_chains, ladder)
    current = chains - numbers
    return TemperingResult(
        z[-1], z, rates, _round_trips(replicas_at), energies, replicas_at, current, ladder, sweep, have_moved
    )


def tune_ladder(
    model: Boltzmann,
    betas: Sequence[float] | Tensor,
    *,
    num_betas: int | None = None,
    num_chains: int = 64,
    num_sweeps: int = 200,
    num_rounds: int = 4,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Places the betas of a ladder so that all neighbours exchange replicas equally often.

    Short runs of :func:`parallel_tempering` measure how often swaps are refused between neighbours. The sum of these
    rates up to a beta, the communication barrier, hardly depends on where the betas lie, so new ones are put where it
    has risen by equal amounts (Syed, Bouchard-Côté, Deligiannidis, Doucet, "Non-reversible parallel tempering: a
    scalable highly parallel MCMC scheme", 2022, section 5).

    Args:
        model: A :class:`gibbs_ext.BipartiteBoltzmann` or a :class:`gibbs_ext.GraphBoltzmann`. Models of a batch get one
            ladder, for the mean of their rates.
        betas: A ladder to start from [B], strictly rising or falling, B at least 2. Its ends are kept.
        num_betas: The number of betas that is wanted, at least 2; B if it is None. About twice the barrier, that is,
            twice the sum of the refused rates, is best (the same source, section 4).
        num_chains: Chains of each run, at least 1.
        num_sweeps: Sweeps of each run, at least 2. The first half is not counted.
        num_rounds: Number of runs, at least 1. Each starts where the last one ended.
        generator: Supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

    Returns:
        The ladder, [num_betas] float64 on the model's device.

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit. The message begins with ``tune_ladder:``.
        NotImplementedError: Under torch.vmap.

    Example:
        >>> model = BipartiteBoltzmann(torch.zeros(4), torch.zeros(4), torch.full((4, 4), 2.0))
        >>> ladder = tune_ladder(model, [0.0, 1.0], num_betas=5, seed=1)
        >>> ladder.shape, float(ladder[0]), float(ladder[-1])
        (torch.Size([5]), 0.0, 1.0)
    """
    name = "tune_ladder"
    check_model(name, model)
    check_integers(name, 1, num_chains=num_chains, num_rounds=num_rounds)
    check_integers(name, 2, num_sweeps=num_sweeps)
    if 0 in model.batch_shape:
        raise ValueError(f"{name}: model must hold at least one model, got batch shape {list(model.batch_shape)}")
    ladder = read_ladder(name, betas, model.device)
    if len(ladder) < 2:
        raise ValueError(f"{name}: betas must be at least 2, got {len(ladder)}")
    if num_betas is not None:
        check_integers(name, 2, num_betas=num_betas)
    wanted = len(ladder) if num_betas is None else num_betas
    if wanted != len(ladder):
        ladder = _interpolate(torch.linspace(0, 1, len(ladder)).to(ladder), ladder, wanted)
    call_seed = as_seed(name, generator, seed, model.device)
    states: Tensor | None = None
    with reported_as(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", TemperingWarning)  # a ladder that is to be tuned may well have gaps
        for round_ in range(num_rounds):
            result = parallel_tempering(model, num_chains, ladder, num_sweeps, initial=states, seed=call_seed + round_)
            rates = _swap_rates(result.energies[num_sweeps // 2 :], ladder)
            refused = 1 - rates.reshape(len(ladder) - 1, -1).mean(1)
            # Neighbours that always swap have no barrier between them; a little keeps the map from betas one to one.
            barrier = torch.cat([refused.new_zeros(1), (refused + 1e-3).cumsum(0)])
            ladder, states = _interpolate(barrier, ladder, wanted), result.all_samples
    return ladder


def _interpolate(height: Tensor, ladder: Tensor, count: int) -> Tensor:
    """``count`` betas at equal steps of a height that rises along the ladder, with the ladder's ends."""
    at = torch.linspace(0, 1, count).to(ladder) * height[-1]
    above = torch.searchsorted(height, at).clamp(1, len(height) - 1)
    share = (at - height[above - 1]) / (height[above] - height[above - 1])
    betas = torch.lerp(ladder[above - 1], ladder[above], share)
    betas[0], betas[-1] = ladder[0], ladder[-1]
    return betas


def read_ladder(name: str, betas: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """A copy of a strictly monotone ladder, [B] float64 on the device."""
    ladder = as_beta(name, betas, "betas", device).clone()
    if not len(ladder):
        raise ValueError(f"{name}: betas must hold at least 1 value, got none")
    seen = ladder.float()  # by sweeps
    good = seen.isfinite().all() & ((seen.diff() > 0).all() | (seen.diff() < 0).all())
    message = f"{name}: betas must be finite and rise or fall strictly"
    if is_readable(ladder) and not good:
        raise ValueError(f"{message}, got {shown(ladder.tolist())}")
    check_all(good, message)
    return ladder.to(device)


def _column_numbers(
    name: str, chain_offset: int | Tensor, columns: tuple[int, ...], num_betas: int, device: torch.device
) -> Tensor:
    """The numbers [C, *M] of chains."""
    given, first = as_chains(name, chain_offset)
    limit, count = _MAX_CHAINS // num_betas, math.prod(columns)
    if given is not None:
        in_range = (given >= 0) & (given < limit)
        check_values(name, "chain_offset", f"lie in 0 .. 2^48 / {num_betas} - 1", given, in_range)
        return expand_to(name, "chain_offset", given, columns)
    if not 0 <= first <= limit - count:
        raise ValueError(f"{name}: chain_offset must lie in 0 .. 2^48 / {num_betas} - {count}, got {first}")
    return first + torch.arange(count, device=device).reshape(columns)


def _swap_rates(energies: Tensor, ladder: Tensor) -> Tensor:
    """Mean probabilities [B - 1, *M] that neighbours would swap, over all rounds and chains."""
    beta = ladder.reshape(-1, *[1] * (energies.dim() - 2))
    return (beta.diff(dim=0) * energies.diff(dim=1)).clamp(max=0).exp().mean((0, 2))


def _check_rates(name: str, rates: Tensor, attempts: int, ladder: Tensor) -> None:
    if attempts < _FEWEST_ATTEMPTS or not is_readable(rates) or not bool((rates < _LEAST_RATE).any()):
        return
    worst = rates.reshape(len(rates), -1).amin(1)
    at = int(worst.argmin())
    warn(
        f"{name}: the betas {ladder[at]:.3g} and {ladder[at + 1]:.3g} exchange replicas in {worst[at]:.2g} of the "
        "rounds; samples beyond are not those of tempered chains (place more betas there, see tune_ladder)",
        TemperingWarning,
    )


def _round_trips(replicas: Tensor) -> Tensor:
    """How often replicas [R, B, C, *M] came back to the first beta from the last one, [*M]."""
    if replicas.shape[1] < 2:
        return replicas.new_zeros(replicas.shape[3:])
    none, first, last = 0, 1, 2
    # What each replica [R + 1, B, C, *M] visits: nothing before the first round.
    visits = torch.full_like(replicas, none).scatter(1, replicas[:, :1], first).scatter(1, replicas[:, -1:], last)
    visits = torch.cat([visits.new_zeros(1, *visits.shape[1:]), visits])
    time = torch.arange(len(visits), device=replicas.device).reshape(-1, *[1] * (replicas.dim() - 1))
    latest = torch.where(visits != none, time, 0).cummax(0).values  # when each was at an end, up to each round
    before = visits.gather(0, latest[:-1])
    return ((visits[1:] == first) & (before == last)).sum((0, 1, 2))
