# SPDX-License-Identifier: Apache-2.0
"""Perfect samples: coupling from the past, for models whose units all pull in the same direction."""

import torch
from torch import Tensor

from gibbs_ext.arguments import as_seed
from gibbs_ext.checks import check_integers, reported_as
from gibbs_ext.log_partition.machine import check_model, refuse_vmap
from gibbs_ext.models.base import Boltzmann

_FIRST_SWEEPS = 8
# The number of the sweep that would follow the last one: as far back as any pair of chains may start.
_PRESENT = 2**43


def perfect_samples(
    model: Boltzmann,
    num_samples: int,
    *,
    max_sweeps: int = 2**16,
    chain_offset: int = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Independent samples from the model itself, by monotone coupling from the past.

    Two chains start from all ones and from all zeros, far enough in the past, and are driven by the same random words.
    If all couplings are at least 0, every other chain stays between them. So where they meet, a chain that began
    infinitely long ago would be there, too, and it has the model's own law (Propp and Wilson, "Exact sampling with
    coupled Markov chains and applications to statistical mechanics", 1996, section 3). Pairs of chains that have not
    met yet start again from twice as far back; a sweep has the same random words whenever it is repeated.

    Couplings below 0 are no obstacle if exchanging the values 0 and 1 of some units makes all of them positive, which
    is found out for each model. This is so if every loop of edges has an even number of couplings below 0: on any tree,
    for one, but not in a spin glass.

    The sweeps are those of :func:`gibbs_ext.bipartite_gibbs` or :func:`gibbs_ext.graph_gibbs`, with their arithmetic
    and its warnings; that arithmetic is all that separates the samples from the model's law. The number of sweeps is
    random. It grows without bound where the model has two well-separated modes.

    Args:
        model: A :class:`gibbs_ext.BipartiteBoltzmann` or a :class:`gibbs_ext.GraphBoltzmann`.
        num_samples: S, samples per model, at least 0.
        max_sweeps: The largest number of sweeps from which a pair of chains starts, from 1 to 2^43.
        chain_offset: Number of the first chain, at least 0. Samples are numbered row by row over [S, *batch_shape], and
            a sample depends on its number, the seed and its model alone.
        generator: Supplies the seed; the default generator when neither is given.
        seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

    Returns:
        [S, *batch_shape, N] bits of the parameters' dtype, without gradient; of a bipartite model left before right.

    Raises:
        TypeError: ``model`` is no model, or another argument has a wrong type.
        ValueError: A model has a loop of edges with an odd number of couplings below 0; a number is too small or too
            large; both ``generator`` and ``seed`` are given; or a parameter is not finite.
        RuntimeError: Some pairs have not met after ``max_sweeps`` sweeps. The samples of the others alone would be
            biased, so none are returned.
        NotImplementedError: Under torch.vmap, where a parameter is mapped.

        The messages begin with ``perfect_samples:``.

    Example:
        >>> lattice = ColoredGraph(3, [(0, 1), (1, 2)])
        >>> model = GraphBoltzmann(lattice, torch.zeros(3), torch.tensor([1.0, -2.0]))
        >>> perfect_samples(model, 5, seed=1).shape
        torch.Size([5, 3])
    """
    name = "perfect_samples"
    check_model(name, model)
    check_integers(name, 0, num_samples=num_samples, chain_offset=chain_offset)
    check_integers(name, 1, max_sweeps=max_sweeps)
    if max_sweeps > _PRESENT:
        raise ValueError(f"{name}: max_sweeps must be at most 2^43, got {max_sweeps}")
    refuse_vmap(name, model)
    number = as_seed(name, generator, seed, model.device)
    flat = _flattened(model)
    monotone, flipped = _without_negative_couplings(name, flat)
    num_models = flat.batch_shape[0]
    chains = chain_offset + torch.arange(num_samples * num_models, device=model.device).reshape(num_samples, num_models)
    samples = torch.empty(*chains.shape, model.num_units, dtype=model.dtype, device=model.device)
    is_open = torch.ones_like(chains, dtype=torch.bool)
    num_sweeps = min(_FIRST_SWEEPS, max_sweeps)
    while is_open.any():
        rows, columns = is_open.any(1).nonzero()[:, 0], is_open.any(0).nonzero()[:, 0]
        pairs = chains[rows][:, columns]
        state = samples.new_zeros(2, *pairs.shape, model._num_state_units)
        state[1] = 1
        with reported_as(name):
            bottom, top = _selected(monotone, columns)._sweep(
                state.to(monotone.dtype), num_sweeps, sweep_offset=_PRESENT - num_sweeps,
                chain_offset=pairs.expand(2, *pairs.shape), seed=number,
            )  # fmt: skip
        samples[rows[:, None], columns] = bottom.to(model.dtype)
        is_open[rows[:, None], columns] = (bottom != top).any(-1)
        if num_sweeps == max_sweeps and is_open.any():
            raise RuntimeError(
                f"{name}: max_sweeps must be large enough for all pairs of chains to meet, got {max_sweeps}, after "
                f"which {int(is_open.sum())} of {is_open.numel()} have not met; with strong couplings they may never"
            )
        num_sweeps = min(2 * num_sweeps, max_sweeps)
    if flipped is not None:
        samples = torch.where(flipped, 1 - samples, samples)
    return samples.reshape(num_samples, *model.batch_shape, model.num_units)


def _flattened(model: Boltzmann) -> Boltzmann:
    """The same models, without gradient, under one batch dim."""
    expanded = model.detach().expand(model.batch_shape)
    return expanded._mapped(lambda tensor, dim: tensor.reshape(model.batch_shape.numel(), *tensor.shape[-dim:]))


def _selected(model: Boltzmann, numbers: Tensor) -> Boltzmann:
    if len(numbers) == model.batch_shape[0]:
        return model
    return model._mapped(lambda tensor, _: tensor[numbers])


def _without_negative_couplings(name: str, model: Boltzmann) -> tuple[Boltzmann, Tensor | None]:
    """Models [M] of the same law once the units of a mask [M, N] are flipped; None: none are.

    Flipping units i, where z_i = f_i + s_i z'_i with s_i = 1 - 2 f_i, multiplies couplings by s_i s_j, and the bias of
    i becomes s_i times its field at z = f.
    """
    couplings = model._couplings.flatten(1)
    if (couplings >= 0).all():
        return model, None
    edges = model._edges().to(model.device)
    flipped, is_frustrated = _gauge(edges, couplings, model.num_units)
    if is_frustrated.any():
        which = f" (model {int(is_frustrated.nonzero()[0])} of the batch)" if len(couplings) > 1 else ""
        raise ValueError(
            f"{name}: model must have couplings of at least 0 once some units are flipped, got a loop of edges with an "
            f"odd number of couplings below 0{which}"
        )
    exact = model._mapped(lambda tensor, _: tensor.double())
    fields = exact._fields_of(flipped.double())
    sign = 1 - 2 * flipped.double()
    of_edges = sign[:, edges[:, 0]] * sign[:, edges[:, 1]]
    return exact._with(sign * fields, exact._couplings * of_edges.reshape(exact._couplings.shape)), flipped


def _gauge(edges: Tensor, couplings: Tensor, num_units: int) -> tuple[Tensor, Tensor]:
    """Which units [M, N] to flip so that the couplings [M, E] are not negative, and the models [M] where none can be.

    Each unit has a label, twice the smallest number of a unit that a path of couplings leads to, plus the parity of the
    couplings below 0 on a path. Labels spread along edges, and to the units that point to a unit whose label has
    fallen, until they stay.
    """
    u, v = edges.unbind(1)
    is_negative, is_zero = (couplings < 0).long(), couplings == 0
    labels = 2 * torch.arange(num_units, device=edges.device).expand(len(couplings), num_units)
    while True:
        spread = labels
        for source, target in ((u, v), (v, u)):
            along = (spread[:, source] ^ is_negative).masked_fill(is_zero, 2 * num_units)
            spread = spread.scatter_reduce(1, target.expand_as(along), along, "amin")
        spread = spread.minimum(spread.gather(1, spread >> 1) ^ (spread & 1))
        if spread.equal(labels):
            break
        labels = spread
    is_wrong = ((labels[:, u] ^ labels[:, v] ^ is_negative) & 1).bool() & ~is_zero
    return (labels & 1).bool(), is_wrong.any(1)
