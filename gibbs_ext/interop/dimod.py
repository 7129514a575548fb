# SPDX-License-Identifier: Apache-2.0
"""Block Gibbs sampling as a sampler of dimod: a drop-in for ``dwave.samplers.SimulatedAnnealingSampler``."""

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gibbs_ext import (
    ColoredGraph,
    CouplingResolutionWarning,
    GraphBoltzmann,
    boltzmann_to_ising,
    coupling_resolution,
    graph_gibbs,
    ising_to_boltzmann,
)
from gibbs_ext.checks import check_integers, reported_as, shown

try:
    import dimod
except ImportError as error:
    raise ImportError("gibbs_ext.interop.dimod: needs dimod; pip install dimod") from error

__all__ = ["BlockGibbsSampler"]

_NAME = "BlockGibbsSampler"
_SCHEDULES = ("linear", "geometric", "custom")
_READS_A_CALL = 256  # with an interrupt_function: enough to fill the vector lanes, few enough to answer soon

# Steps of fixed point to the smallest interaction, below which its rounding is felt.
_FEW_STEPS = 1000

Floats = NDArray[np.float64]


class BlockGibbsSampler(dimod.Sampler, dimod.Initialized):  # type: ignore[misc, name-defined]
    """Simulated annealing by block Gibbs sweeps: ``P(s)`` tends to ``exp(-beta * E(s))`` at each beta of a schedule.

    The model's graph is coloured, and a sweep updates each colour at once, given the others. Parameters have the names,
    defaults and meaning of ``dwave.samplers.SimulatedAnnealingSampler``; only its ``randomize_order`` and
    ``proposal_acceptance_criteria``, which speak of single-spin updates, are unknown here and ignored with a warning.
    All reads run in one call, so many reads cost little more than a few.

    Interactions are rounded to about 2^-30 of the largest sum of interactions at one variable (csrc/README.md), with a
    ``CouplingResolutionWarning`` where one is so small that this is felt. The energies returned are dimod's own.

    Example:
        >>> import dimod
        >>> bqm = dimod.BinaryQuadraticModel({}, {("a", "b"): 1.0, ("b", "c"): 1.0, ("a", "c"): 1.0}, "SPIN")
        >>> print(BlockGibbsSampler().sample(bqm, num_reads=10, seed=1).first.energy)
        -1.0
    """

    @property
    def parameters(self) -> dict[str, list[str]]:
        """Keyword arguments of :meth:`sample`, each with the properties that concern it."""
        names = (
            "beta_range", "num_reads", "num_sweeps", "num_sweeps_per_beta", "beta_schedule_type", "seed",
            "interrupt_function", "beta_schedule", "initial_states", "initial_states_generator",
        )  # fmt: skip
        return {name: ["beta_schedule_options"] if name == "beta_schedule_type" else [] for name in names}

    @property
    def properties(self) -> dict[str, Any]:
        return {"beta_schedule_options": _SCHEDULES}

    def sample(
        self,
        bqm: dimod.BinaryQuadraticModel,
        beta_range: Sequence[float] | None = None,
        num_reads: int | None = None,
        num_sweeps: int | None = None,
        num_sweeps_per_beta: int = 1,
        beta_schedule_type: Literal["linear", "geometric", "custom"] = "geometric",
        seed: int | None = None,
        interrupt_function: Callable[[], bool] | None = None,
        beta_schedule: Sequence[float] | Floats | None = None,
        initial_states: Any = None,
        initial_states_generator: Literal["none", "tile", "random"] = "random",
        **kwargs: Any,
    ) -> dimod.SampleSet:
        """Samples of a binary quadratic model, one per read.

        Args:
            bqm: Any: SPIN or BINARY, with finite biases. Interactions of 0 are left out.
            beta_range: First and last beta of a "linear" or "geometric" schedule. By default from the biases, as
                ``SimulatedAnnealingSampler`` does: from where each spin flips easily to where hardly any does.
            num_reads: Independent chains; by default as many as ``initial_states``, or 1.
            num_sweeps: 1000 by default, or what ``beta_schedule`` says. A multiple of ``num_sweeps_per_beta``. With one
                beta only, it is the last of ``beta_range``.
            num_sweeps_per_beta: Sweeps at each beta.
            beta_schedule_type: How betas are spaced; "custom" takes ``beta_schedule``.
            beta_schedule: The betas, 0 or more each, of the type "custom" alone.
            seed: In 0 .. 2^32 - 1; by default drawn from PyTorch's default generator. With equal arguments it gives
                equal samples, and the reads are the first ones of any larger number of reads.
            interrupt_function: Called now and then, between batches of reads. Once it returns True, the reads done
                so far are returned.
            initial_states: Samples to start from, one per read, in the sense of ``dimod.as_samples``.
            initial_states_generator: What to do if they are fewer than ``num_reads``: "none" is an error, "tile"
                repeats them, "random" adds random ones.
            **kwargs: Ignored with a ``dimod.exceptions.SamplerUnknownArgWarning``.

        Returns:
            A ``SampleSet`` of the model's vartype, reads in order, with energies by ``bqm.energies``. Its info holds
            ``beta_range``, ``beta_schedule_type`` and ``timing`` (nanoseconds).

        Raises:
            TypeError, ValueError, RuntimeError: An argument does not fit.
            KeyboardInterrupt: Ctrl-C during the call.
        """
        start = time.perf_counter_ns()
        if not isinstance(bqm, dimod.BinaryQuadraticModel):
            raise TypeError(f"{_NAME}: bqm must be a dimod.BinaryQuadraticModel, got {type(bqm).__name__}")
        self.remove_unknown_kwargs(**kwargs)
        if seed is None:
            seed = int(torch.randint(2**32, (), device="cpu"))
        check_integers(_NAME, 0, seed=seed)
        if seed >= 2**32:
            raise ValueError(f"{_NAME}: seed must be below 2^32, got {seed}")
        if interrupt_function is not None and not callable(interrupt_function):
            raise TypeError(f"{_NAME}: interrupt_function must be callable, got {shown(interrupt_function)}")
        parsed = self.parse_initial_states(bqm, initial_states, initial_states_generator, num_reads, seed)
        h, J, edges, bias, coupling = _parameters(bqm)

        # Fixed point has a smallest unit and float32 a largest number. Parameters are scaled so that the largest sum of
        # couplings is just above 1, and betas inversely.
        totals = np.bincount(edges.reshape(-1), np.abs(coupling).repeat(2))
        largest_bias = np.abs(bias).max(initial=0)
        exponent = int(min(1 - np.frexp(totals.max(initial=0) or largest_bias)[1], 127 - np.frexp(largest_bias)[1]))
        scaled_bias, scaled_coupling = (torch.from_numpy(np.ldexp(x, exponent)) for x in (bias, coupling))
        with np.errstate(over="ignore"):
            highest = np.ldexp(np.float64(np.finfo(np.float32).max), exponent)

        if beta_range is None and beta_schedule_type != "custom":
            beta_range = hot, cold = _default_beta_range(h, J, edges)
            if not 0 < hot <= cold <= min(highest, np.finfo(np.float64).max):
                raise ValueError(
                    f"{_NAME}: bqm must have biases that suggest a beta_range of 0 < beta <= {highest:g}, "
                    f"got {beta_range}; give another"
                )
        betas = _schedule(num_sweeps, num_sweeps_per_beta, beta_range, beta_schedule_type, beta_schedule)
        if beta_range is None:
            beta_range = [float(betas[0]), float(betas[-1])]
        if betas.max(initial=0) > highest:
            raise ValueError(
                f"{_NAME}: beta_range or beta_schedule must be at most {highest:g} for this bqm, got {betas.max()}"
            )
        beta = torch.from_numpy(np.ldexp(betas, -exponent))

        order = [parsed.initial_states.variables.index(v) for v in bqm.variables]
        values = parsed.initial_states.record.sample[:, order]
        if not np.isin(values, list(bqm.vartype.value)).all():
            raise ValueError(
                f"{_NAME}: initial_states must have the values of {bqm.vartype.name}, got {shown(initial_states)}"
            )
        state = torch.from_numpy((values > 0).view(np.uint8))
        sampling = time.perf_counter_ns()
        if len(bqm.variables):
            graph = ColoredGraph(len(bias), torch.from_numpy(edges))
            with reported_as(_NAME, coupling="bqm"):
                resolution = coupling_resolution(
                    GraphBoltzmann(graph, scaled_bias, scaled_coupling, validate_args=False)
                )
            _warn_of_resolution(scaled_coupling, float(resolution))
            step = _READS_A_CALL if interrupt_function else len(state)
            for done in range(0, len(state), step):
                with reported_as(_NAME, bias="bqm", coupling="bqm"), warnings.catch_warnings():
                    # At the end of an annealing, beta is so large that it says nothing of the interactions.
                    warnings.simplefilter("ignore", CouplingResolutionWarning)
                    reads = state[done : done + step]
                    reads[:] = graph_gibbs(
                        reads, scaled_bias, scaled_coupling, graph, len(beta), beta=beta, chain_offset=done, seed=seed
                    )
                if interrupt_function and interrupt_function():
                    state = state[: done + step]
                    break
        postprocessing = time.perf_counter_ns()

        samples = state.numpy().view(np.int8)
        if bqm.vartype is dimod.SPIN:
            samples = 2 * samples - 1
        info = {"beta_range": beta_range, "beta_schedule_type": beta_schedule_type}
        sampleset: dimod.SampleSet = dimod.SampleSet.from_samples_bqm((samples, list(bqm.variables)), bqm, info=info)
        sampleset.info["timing"] = {
            "preprocessing_ns": sampling - start,
            "sampling_ns": postprocessing - sampling,
            "postprocessing_ns": time.perf_counter_ns() - postprocessing,
        }
        return sampleset


def _warn_of_resolution(coupling: torch.Tensor, resolution: float) -> None:
    if not len(coupling):
        return
    smallest, largest = (float(x) for x in coupling.abs().aminmax())
    if smallest < _FEW_STEPS * resolution:
        text = f"the smallest is {smallest / largest:.2g} of the largest"
        warnings.warn(
            f"{_NAME}: bqm has interactions so small that rounding them to fixed point is felt: {text}",
            CouplingResolutionWarning,
            stacklevel=3,
        )


def _parameters(bqm: dimod.BinaryQuadraticModel) -> tuple[Floats, Floats, NDArray[np.int64], Floats, Floats]:
    """h [N], J [E] of the Ising form, edges [E, 2], bias [N], coupling [E] of the form over bits; without J = 0."""
    vectors = bqm.to_numpy_vectors(variable_order=bqm.variables)
    linear, quadratic = (np.asarray(x, np.float64) for x in (vectors.linear_biases, vectors.quadratic.biases))
    if not (np.isfinite(linear).all() and np.isfinite(quadratic).all()):
        raise ValueError(f"{_NAME}: bqm must have finite biases, got NaN or inf")
    kept = quadratic != 0
    edges = np.stack([vectors.quadratic.row_indices[kept], vectors.quadratic.col_indices[kept]], 1).astype(np.int64)
    first, second, ends = torch.from_numpy(linear), torch.from_numpy(quadratic[kept]), torch.from_numpy(edges)
    if bqm.vartype is dimod.SPIN:
        h, J = first, second
        bias, coupling, _ = ising_to_boltzmann(h, J, ends)
    else:
        bias, coupling = -first, -second
        h, J, _ = boltzmann_to_ising(bias, coupling, ends)
    return h.numpy(), J.numpy(), edges, bias.numpy(), coupling.numpy()


def _default_beta_range(h: Floats, J: Floats, edges: NDArray[np.int64]) -> list[float]:
    """The range that ``SimulatedAnnealingSampler`` takes by default, by the Metropolis rule's chance to flip a spin.

    Hot: the spin hardest to flip does with probability 1/2, were all its terms satisfied. Cold: of the spins whose
    smallest term is the smallest of all, one flips against that term with probability 1/100.
    """
    with np.errstate(over="ignore"):
        total = np.abs(h) + np.bincount(edges.reshape(-1), np.abs(J).repeat(2), len(h))
    # A tiny h may be what the conversion from bits rounded away: its reciprocal would be no beta.
    smallest = np.where(np.abs(h) > 1e-12 * total, np.abs(h), np.inf)
    np.minimum.at(smallest, edges.reshape(-1), np.abs(J).repeat(2))
    gap = smallest.min(initial=np.inf)
    if gap == np.inf:
        return [0.1, 1.0]  # all states are equal, whatever beta is
    with np.errstate(over="ignore"):  # the caller refuses 0 and inf
        hot = np.log(2) / (2 * total.max())
        cold = np.log(100 * np.count_nonzero(smallest == gap)) / (2 * gap)
    return [float(hot), float(cold)]


def _as_betas(argument: str, values: object) -> Floats:
    try:
        betas = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_NAME}: {argument} must hold numbers, got {shown(values)}") from error
    if betas.ndim != 1 or not len(betas) or not (np.isfinite(betas) & (betas >= 0)).all():
        raise ValueError(f"{_NAME}: {argument} must be a sequence of finite numbers of at least 0, got {shown(values)}")
    return betas


def _schedule(
    num_sweeps: int | None, num_sweeps_per_beta: int, beta_range: object, beta_schedule_type: str, beta_schedule: object
) -> Floats:
    """Beta of each sweep, [num_sweeps]."""
    check_integers(_NAME, 1, num_sweeps_per_beta=num_sweeps_per_beta)
    if num_sweeps is not None:
        check_integers(_NAME, 0, num_sweeps=num_sweeps)
    if beta_schedule_type not in _SCHEDULES:
        options = ", ".join(_SCHEDULES)
        raise ValueError(f"{_NAME}: beta_schedule_type must be one of {options}, got {shown(beta_schedule_type)}")
    if (beta_schedule is None) == (beta_schedule_type == "custom"):
        raise ValueError(
            f"{_NAME}: beta_schedule must be given with beta_schedule_type 'custom' and with no other, "
            f"got {shown(beta_schedule)} with {beta_schedule_type!r}"
        )
    ends = None if beta_range is None else _as_betas("beta_range", beta_range)
    if ends is not None and len(ends) != 2:
        raise ValueError(f"{_NAME}: beta_range must hold two betas, first and last, got {shown(beta_range)}")
    if beta_schedule_type == "custom":
        betas = _as_betas("beta_schedule", beta_schedule)
        if num_sweeps not in (None, len(betas) * num_sweeps_per_beta):
            sweeps = f"{len(betas)} betas x {num_sweeps_per_beta}"
            raise ValueError(f"{_NAME}: num_sweeps must be None or that of beta_schedule, {sweeps}, got {num_sweeps}")
        if ends is not None and not np.array_equal(ends, betas[[0, -1]]):
            raise ValueError(f"{_NAME}: beta_range must be None or that of beta_schedule, got {shown(beta_range)}")
        return betas.repeat(num_sweeps_per_beta)
    num_betas, rest = divmod(1000 if num_sweeps is None else num_sweeps, num_sweeps_per_beta)
    if rest:
        raise ValueError(
            f"{_NAME}: num_sweeps must be a multiple of num_sweeps_per_beta, {num_sweeps_per_beta}, got {num_sweeps}"
        )
    assert ends is not None
    if beta_schedule_type == "geometric" and not ends.all():
        raise ValueError(f"{_NAME}: beta_range must be above 0 for a geometric schedule, got {shown(beta_range)}")
    if num_betas == 1:
        ends = ends[[1, 1]]
    space = np.linspace if beta_schedule_type == "linear" else np.geomspace
    return space(ends[0], ends[1], num_betas).repeat(num_sweeps_per_beta)
