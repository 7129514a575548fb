# SPDX-License-Identifier: Apache-2.0
"""Means and correlations of a model, counted while chains sweep, and the best states that they pass through."""

from typing import NamedTuple

import torch
from torch import Tensor

from gibbs_ext.arguments import Beta, as_beta, as_chains, as_seed
from gibbs_ext.checks import check_flags, check_integers, expand_to, reported_as
from gibbs_ext.log_partition.machine import check_model, refuse_vmap
from gibbs_ext.models.base import Boltzmann, outside_autocast
from gibbs_ext.progress import parts

# Codes of csrc/ops/arguments.h.
_UNITS, _UNITS_AND_PAIRS = 1, 2
# Bound of csrc/core/philox.h.
_MAX_SWEEPS = 2**44


class Moments(NamedTuple):
    """The result of :func:`sample_moments`. C chains, M the model's batch shape, N units, R reads."""

    samples: Tensor  # [C, *M, N] bits after the last sweep
    means: Tensor  # [*M, N] float64: share of the states read in which each unit is 1
    pair_means: Tensor | None  # float64, of the couplings' shape [*M, n1, n2] or [*M, E]: the same of pairs, if wanted
    energy: (
        Tensor | None
    )  # [*M] float64: mean energy of the states read, by the couplings as given, if pairs are wanted
    num_states: int  # C R, the states read of each model; each count is a mean times this
    best_samples: (
        Tensor | None
    )  # [C, *M, N] bits: each chain's first state of the lowest energy among those read, if wanted
    best_energies: Tensor | None  # [C, *M] float64: its energy, by the rounded couplings (csrc/README.md, 2.7)
    next_sweep: int  # number of the sweep with which a run that goes on begins


def sample_moments(
    model: Boltzmann,
    num_chains: int,
    num_sweeps: int,
    *,
    burn_in: int = 0,
    sweeps_per_read: int = 1,
    pairs: bool = True,
    best: bool = False,
    beta: Beta = 1.0,
    initial: Tensor | Moments | None = None,
    chain_offset: int | Tensor = 0,
    progress: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Moments:
    """Runs block Gibbs chains, and counts on the way how often each unit and each coupled pair is 1.

    No state but the last is kept, so that memory does not grow with the number of sweeps, and the counts are exact
    integers: they depend on neither threads nor devices. Reading costs little beside the sweeps (bench/NOTES.md),
    except for ``best``, which needs the energy of each state that is read (and counts models one after the other, which
    is slow for many models of few chains); then a larger ``sweeps_per_read`` helps.

    The states of a chain are correlated, and ``num_states`` says nothing about how many independent ones there are.
    :mod:`gibbs_ext.diagnostics` and runs of other seeds do.

    Args:
        model: A :class:`gibbs_ext.BipartiteBoltzmann` or a :class:`gibbs_ext.GraphBoltzmann` of any batch shape M.
        num_chains: C, the number of chains of each model, at least 1.
        num_sweeps: Number of sweeps after the burn-in, at least 1, a multiple of ``sweeps_per_read``.
        burn_in: Number of sweeps before the first that counts.
        sweeps_per_read: A state is read after every so many sweeps, at least 1.
        pairs: Whether to count pairs of coupled units.
        best: Whether to find the best state of each chain.
        beta: Inverse temperature of the sweeps, finite: a number, or [*M, 1], or what broadcasts to it. Energies are
            those of the model, without beta.
        initial: z [C, *M, N] of values 0 and 1 to start from, or what broadcasts to it (of a bipartite model only left
            is read). Or the result of an earlier call with this model and C, which goes on: two calls with one seed
            read the states that one call of all sweeps reads. Uniform bits if it is None.
        chain_offset: Number of the first of the C * M chains in the random counter, or their numbers [C, *M].
        progress: Whether to show a progress bar (tqdm).
        generator: Supplies the seed. The default generator does if neither is given.
        seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

    Returns:
        :class:`Moments`, without gradients. States have the parameters' dtype.

    Raises:
        TypeError, ValueError, RuntimeError: An argument does not fit. The message begins with ``sample_moments:``.
        KeyboardInterrupt: Ctrl-C during the call.
        NotImplementedError: Under torch.vmap.

    Example:
        >>> model = BipartiteBoltzmann(torch.zeros(4), torch.zeros(3), torch.full((4, 3), 0.5))
        >>> moments = sample_moments(model, 100, 50, burn_in=10, seed=1)
        >>> moments.means.shape, moments.pair_means.shape, moments.num_states
        (torch.Size([7]), torch.Size([4, 3]), 5000)
    """
    name = "sample_moments"
    check_model(name, model)
    refuse_vmap(name, model)
    check_integers(name, 1, num_chains=num_chains, num_sweeps=num_sweeps, sweeps_per_read=sweeps_per_read)
    check_integers(name, 0, burn_in=burn_in)
    check_flags(name, pairs=pairs, best=best, progress=progress)
    if num_sweeps + burn_in >= _MAX_SWEEPS:
        raise ValueError(f"{name}: num_sweeps and burn_in must be below 2^44, got {num_sweeps} and {burn_in}")
    if num_sweeps % sweeps_per_read:
        raise ValueError(
            f"{name}: num_sweeps must be a multiple of sweeps_per_read, {sweeps_per_read}, got {num_sweeps}"
        )
    model, betas = model.detach(), as_beta(name, beta, device=model.device)
    if betas.shape[-1] != 1:
        raise ValueError(f"{name}: beta must be a number or have shape [..., 1], got {list(betas.shape)}")
    shape = (num_chains, *model.batch_shape)
    call_seed = as_seed(name, generator, seed, model.device)
    refuse_vmap(name, model, call_seed, initial, chain_offset)
    given_chains, first_chain = as_chains(name, chain_offset)
    if given_chains is not None:
        given_chains = expand_to(name, "chain_offset", given_chains, shape)
    if betas.dim() > 1:
        betas = expand_to(name, "beta", betas, (*model.batch_shape, 1))
    options = {"chain_offset": first_chain if given_chains is None else given_chains, "seed": call_seed}
    counted = _UNITS_AND_PAIRS if pairs else _UNITS
    sweep = 1  # Uniform bits have the words of sweep 0.
    if isinstance(initial, Moments):
        if initial.samples.shape != (*shape, model.num_units):
            raise ValueError(
                f"{name}: initial must be a result of the same chains and model, {[*shape, model.num_units]} bits, got "
                f"{list(initial.samples.shape)}"
            )
        sweep = initial.next_sweep
        initial = initial.samples
    with reported_as(name, left="initial", state="initial", chains="chain_offset"):
        if initial is not None:
            state = model._state_of(expand_to(name, "initial", initial, (*shape, model.num_units)).to(model.dtype))
        else:
            state = model._draw_uniform((*shape, model._num_state_units), **options)
        if burn_in:
            state = model._state_of(model._sweep(state, burn_in, beta=betas, sweep_offset=sweep, **options))
            sweep += burn_in
        done: tuple[Tensor, ...] = ()
        for reads in parts(name, num_sweeps // sweeps_per_read, progress):
            count = reads * sweeps_per_read
            z, units, pair_counts, best_z, best_energy = model._count(
                state, betas, call_seed, given_chains, first_chain, sweep, count, sweeps_per_read, counted, bool(best)
            )
            if done:
                units, pair_counts = units + done[0], pair_counts + done[1]
                if best:
                    best_z = torch.where((best_energy < done[3]).unsqueeze(-1), best_z, done[2])
                    best_energy = best_energy.minimum(done[3])
            done = units, pair_counts, best_z, best_energy
            state, sweep = model._state_of(z), sweep + count
    num_states = num_chains * (num_sweeps // sweeps_per_read)
    means = units.double() / num_states
    pair_means = pair_counts.double() / num_states if pairs else None
    energy = None
    if pair_means is not None:
        with outside_autocast(model.device):
            biases = torch.cat([bias.double().expand(*model.batch_shape, -1) for bias in model._biases], -1)
            own_dims = pair_means.dim() - len(model.batch_shape)
            products = (model._couplings.double() * pair_means).flatten(-own_dims).sum(-1)
            energy = -(biases * means).sum(-1) - products
    found = (best_z, best_energy) if best else (None, None)
    return Moments(z, means, pair_means, energy, num_states, found[0], found[1], sweep)
