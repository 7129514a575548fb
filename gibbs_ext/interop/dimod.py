# SPDX-License-Identifier: Apache-2.0
"""Block Gibbs sampling as a sampler of dimod, a drop-in for ``dwave.samplers.SimulatedAnnealingSampler``; and dimod's
models as Boltzmann machines, and back.
"""

import functools
import math
import numbers
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from gibbs_ext import (
    BipartiteBoltzmann,
    ColoredGraph,
    CouplingResolutionWarning,
    GraphBoltzmann,
    boltzmann_to_ising,
    coupling_resolution,
    graph_gibbs,
    graph_metropolis,
    ising_to_boltzmann,
    ops,
)
from gibbs_ext.checks import check_flags, check_integers, reported_as, shown, warn
from gibbs_ext.log_partition.machine import check_model

try:
    import dimod
except ImportError as error:
    raise ImportError("gibbs_ext.interop.dimod: needs dimod; pip install dimod") from error

__all__ = ["BQMBoltzmann", "BlockGibbsSampler", "boltzmann_to_bqm", "bqm_to_boltzmann"]

_NAME = "BlockGibbsSampler"
_SCHEDULES = ("linear", "geometric", "custom")
_UPDATES = {"Gibbs": graph_gibbs, "Metropolis": graph_metropolis}
# With an interrupt_function, batches of reads grow to this: enough to fill the vector lanes, few enough to answer soon.
_MOST_READS_A_CALL = 256

# Rounding may change logits by the first of these; at zero temperature, terms by the second times themselves.
_LOGIT_TOLERANCE, _TERM_TOLERANCE = 0.1, 1e-2
_DECISIVE_LOGIT = 90.0  # far beyond it, probabilities are 0 and 1
_FLOAT32_ROUNDING = 2.0**-24
_LARGEST_BETA = float(np.finfo(np.float32).max)  # in the units of the sweeps
# The search for a common divisor is skipped if there are more sizes of interactions than this.
_FEW_SIZES = 1000

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class BlockGibbsSampler(dimod.Sampler, dimod.Initialized):  # type: ignore[misc, name-defined]
    """Simulated annealing by block Gibbs sweeps: ``P(s)`` tends to ``exp(-beta * E(s))`` at each beta of a schedule.

    The model's graph is coloured, and a sweep updates each colour at once, given the others. Parameters have the names
    and meaning of ``dwave.samplers.SimulatedAnnealingSampler``, and its defaults but for
    ``proposal_acceptance_criteria``, which is "Gibbs" here; only ``best_of_read`` is new. All reads run in one call, so
    that many reads cost little more than a few.

    Sweeps compute in fixed point and float32 (csrc/README.md). Where the interactions of a variable cancel, as they do
    in every frustrated model, a much smaller field decides. Its precision is kept: the part of a bias that interactions
    can cancel is stored as the coupling to a ghost spin, which never flips (Griffiths 1967). A
    ``CouplingResolutionWarning`` is given where rounding may nevertheless shift a logit by more than 0.1 at the largest
    beta (or, at zero temperature, a term by more than a hundredth of itself). A field of a BINARY model's form over
    spins below 1e-14 of the other terms counts as rounding of the conversion. The energies returned are dimod's own.

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
            "interrupt_function", "beta_schedule", "initial_states", "initial_states_generator", "randomize_order",
            "proposal_acceptance_criteria", "best_of_read",
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
        randomize_order: bool = False,
        proposal_acceptance_criteria: Literal["Gibbs", "Metropolis"] = "Gibbs",
        best_of_read: bool = False,
        **kwargs: Any,
    ) -> dimod.SampleSet:
        """Samples of a binary quadratic model, one per read.

        Args:
            bqm: A SPIN or BINARY model with finite biases. Interactions of 0 are left out.
            beta_range: First and last beta of a "linear" or "geometric" schedule. The default is computed from the
                biases, as by ``SimulatedAnnealingSampler``: each spin flips easily at the first beta, and hardly any
                spin flips at the last one.
            num_reads: Number of independent chains; by default that of ``initial_states``, or 1.
            num_sweeps: Number of sweeps, a multiple of ``num_sweeps_per_beta``; by default that of ``beta_schedule``,
                or 1000. If there is one beta only, it is the last of ``beta_range``.
            num_sweeps_per_beta: Number of sweeps at each beta.
            beta_schedule_type: Spacing of the betas; "custom" takes ``beta_schedule``.
            beta_schedule: The betas of the type "custom", each 0 or more. inf is zero temperature: the energy never
                rises; where a flip changes nothing, "Gibbs" tosses a fair coin and "Metropolis" flips. (Terms of equal
                size cancel, and so do interactions that are multiples of one number. Other sums that should cancel do
                so to within about 2^-28 of the largest sum at one variable, and the rest decides.)
            seed: An integer in 0 .. 2^32 - 1; by default drawn from PyTorch's default generator. Equal arguments give
                equal samples, and the reads are the first reads of any larger ``num_reads``.
            interrupt_function: Function that is called after the first read and after each further batch of up to 256
                reads. The reads done so far are returned once it returns True, and, with a RuntimeWarning, if it raises
                an ``Exception``.
            initial_states: Samples to start from, one per read, in the sense of ``dimod.as_samples``.
            initial_states_generator: Treatment of fewer initial states than ``num_reads``: "none" is an error, "tile"
                repeats them, "random" adds random ones.
            randomize_order: Whether a sweep updates N variables drawn at random one after the other, N being the number
                of variables, instead of each variable once. All reads share the order. It is much slower, because a
                sweep takes a call for each layer of variables that are not neighbours.
            proposal_acceptance_criteria: "Gibbs" draws a variable from its conditional distribution, "Metropolis" flips
                it with probability ``min(1, exp(-beta * change of energy))``. In equal time "Metropolis" reached lower
                energies with some 10 to 200 reads, "Gibbs" with fewer or more (bench/NOTES.md).
            best_of_read: Whether a read is not the last state of its chain but that of the lowest energy among those
                after the sweeps of each beta. Calls then take two to four times as long, with
                ``num_sweeps_per_beta=10`` 1.2 to 1.5 times. Not with ``randomize_order``.
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
        check_flags(_NAME, randomize_order=randomize_order, best_of_read=best_of_read)
        if best_of_read and randomize_order:
            raise ValueError(f"{_NAME}: best_of_read must be False with randomize_order, got True for both")
        if not isinstance(proposal_acceptance_criteria, str) or proposal_acceptance_criteria not in _UPDATES:
            wanted = f"proposal_acceptance_criteria must be one of {', '.join(_UPDATES)}"
            raise ValueError(f"{_NAME}: {wanted}, got {shown(proposal_acceptance_criteria)}")
        parsed = self.parse_initial_states(bqm, initial_states, initial_states_generator, num_reads, seed)
        given = _problem(bqm)
        problem, unit = _with_exact_interactions(given)

        # Fixed point has a smallest unit and float32 a largest number. Parameters are scaled so that the largest sum of
        # couplings is just above 1, and betas inversely.
        totals = problem.sums_at_variables(np.abs(problem.coupling))
        largest_bias = np.abs(problem.bias).max(initial=0)
        exponent = int(min(1 - np.frexp(totals.max(initial=0) or largest_bias)[1], 127 - np.frexp(largest_bias)[1]))
        with np.errstate(over="ignore"):
            highest = np.ldexp(_LARGEST_BETA, exponent) / unit

        if beta_range is None and beta_schedule_type != "custom":
            beta_range = hot, cold = _default_beta_range(given)
            if not 0 < hot <= cold <= min(highest, np.finfo(np.float64).max):
                raise ValueError(
                    f"{_NAME}: bqm must have biases that suggest a beta_range of 0 < beta <= {highest:g}, "
                    f"got {beta_range}; give another"
                )
        betas = _schedule(num_sweeps, num_sweeps_per_beta, beta_range, beta_schedule_type, beta_schedule)
        if beta_range is None:
            beta_range = [float(betas[0]), float(betas[-1])]
        if betas[np.isfinite(betas)].max(initial=0) > highest:
            raise ValueError(
                f"{_NAME}: beta_range or beta_schedule must be at most {highest:g} for this bqm, got {betas.max()}"
            )
        # At zero temperature, the largest beta lets any field but 0 decide, and 0 stays a fair coin.
        beta = torch.from_numpy(np.where(np.isinf(betas), _LARGEST_BETA, np.ldexp(unit * betas, -exponent)))

        labels = parsed.initial_states.variables
        order = [labels.index(v) for v in bqm.variables]
        values = parsed.initial_states.record.sample[:, order]
        if not np.isin(values, list(bqm.vartype.value)).all():
            raise ValueError(
                f"{_NAME}: initial_states must have the values of {bqm.vartype.name}, got {shown(initial_states)}"
            )
        state = torch.from_numpy((values > 0).view(np.uint8))
        sampling = time.perf_counter_ns()
        if len(state) and len(bqm.variables) and len(beta):
            with reported_as(_NAME, coupling="bqm"):
                machine = _machine(problem, exponent, beta)
            update = _UPDATES[proposal_acceptance_criteria]
            if best_of_read:
                update = functools.partial(
                    _best_state, num_sweeps_per_beta, proposal_acceptance_criteria == "Metropolis"
                )
            done, step = 0, 1 if interrupt_function else len(state)
            while done < len(state):
                reads = state[done : done + step]
                with reported_as(_NAME, bias="bqm", coupling="bqm"):
                    reads[:] = machine.anneal(reads, update, beta, randomize_order, chain_offset=done, seed=seed)
                done, step = done + len(reads), min(2 * step, _MOST_READS_A_CALL)
                if interrupt_function and _interrupts(interrupt_function):
                    state = state[:done]
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


def _interrupts(interrupt_function: Callable[[], bool]) -> bool:
    try:
        return bool(interrupt_function())
    except Exception as error:
        text = f"interrupt_function raised {type(error).__name__}({error}); the reads done so far are returned"
        warn(f"{_NAME}: {text}", RuntimeWarning)
        return True


class _Problem(NamedTuple):
    """N variables and E interactions, in two forms: over spins, and over bits."""

    edges: Integers  # [E, 2]
    h: Floats  # [N]
    J: Floats  # [E]
    bias: Floats  # [N]
    coupling: Floats  # [E]
    is_spin: bool  # which form was given; the other one is rounded

    def sums_at_variables(self, values: Floats) -> Floats:
        """[N] of values [E]."""
        sums: Floats = np.bincount(self.edges.reshape(-1), values.repeat(2), len(self.bias)).astype(np.float64)
        return sums  # bincount of nothing is of integers

    def smallest_terms(self) -> Floats:
        """The smallest of |h| and |J| at each variable, but 0, [N]; inf if there is none."""
        negligible: Floats | float = 0.0
        if not self.is_spin:
            # A tiny h may be a rounding error of the conversion from bits, whose reciprocal makes no sense as a beta.
            negligible = 1e-14 * (np.abs(self.h) + self.sums_at_variables(np.abs(self.J)))
        smallest = np.where(np.abs(self.h) > negligible, np.abs(self.h), np.inf)
        np.minimum.at(smallest, self.edges.reshape(-1), np.abs(self.J).repeat(2))
        return smallest


def _vectors(name: str, bqm: dimod.BinaryQuadraticModel) -> tuple[Floats, Integers, Floats]:
    """Linear biases [N], interactions as pairs of variables' numbers [E, 2], and their biases [E]."""
    vectors = bqm.to_numpy_vectors(variable_order=bqm.variables)
    try:
        linear, quadratic = (
            np.asarray(x).astype(np.float64, casting="same_kind" if np.iscomplexobj(x) else "unsafe")
            for x in (vectors.linear_biases, vectors.quadratic.biases)
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name}: bqm must have biases that float64 can hold, got others ({error})") from error
    if not (np.isfinite(linear).all() and np.isfinite(quadratic).all()):
        raise ValueError(f"{name}: bqm must have finite biases, got NaN or inf")
    edges = np.stack([vectors.quadratic.row_indices, vectors.quadratic.col_indices], 1).astype(np.int64)
    return linear, edges, quadratic


def _over_bits(
    bqm: dimod.BinaryQuadraticModel, linear: torch.Tensor, quadratic: torch.Tensor, edges: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """bias, coupling, and the offset that gives bqm's energies."""
    if bqm.vartype is not dimod.SPIN:
        return -linear, -quadratic, float(bqm.offset)
    bias, coupling, offset = ising_to_boltzmann(linear, quadratic, edges)
    return bias, coupling, float(bqm.offset) + float(offset)


def _problem(bqm: dimod.BinaryQuadraticModel) -> _Problem:
    """The problem of a model, without interactions of 0."""
    linear, edges, quadratic = _vectors(_NAME, bqm)
    kept = quadratic != 0
    edges, is_spin = edges[kept], bqm.vartype is dimod.SPIN
    first, second, ends = torch.from_numpy(linear), torch.from_numpy(quadratic[kept]), torch.from_numpy(edges)
    bias, coupling, _ = _over_bits(bqm, first, second, ends)
    h, J = (first, second) if is_spin else boltzmann_to_ising(bias, coupling, ends)[:2]
    return _Problem(edges, h.numpy(), J.numpy(), bias.numpy(), coupling.numpy(), is_spin)


def _with_exact_interactions(problem: _Problem) -> tuple[_Problem, float]:
    """The problem divided by a number in [1, 2), so that few bits hold the interactions; and that number.

    So 0.1, 0.2 and 0.3, which float64 itself rounds, become 1, 2 and 3 times a power of 2, and cancel as they should.
    The problem itself, and 1, are returned if the interactions are not multiples of one number.
    """
    sizes = np.unique(np.abs(problem.J))
    if not 0 < len(sizes) <= _FEW_SIZES or not np.isfinite(sizes).all():
        return problem, 1.0
    negligible = float(np.ldexp(sizes[-1], -40))

    def common_divisor(a: float, b: float) -> float:
        while b > negligible:
            a, b = b, abs(math.remainder(a, b))
        return a

    number = np.rint(sizes / functools.reduce(common_divisor, sizes.tolist()))
    divisor = sizes[-1] / number[-1]
    if number[-1] >= 2**28 or (np.abs(sizes - number * divisor) > np.ldexp(sizes, -50)).any():
        return problem, 1.0
    mantissa, exponent = np.frexp(divisor)
    J = np.copysign(np.ldexp(np.rint(np.abs(problem.J) / divisor), exponent - 1), problem.J)
    unit = 2 * float(mantissa)
    with np.errstate(over="ignore"):
        coupling = -4 * J  # if that is inf, so was the problem's
    return problem._replace(h=problem.h / unit, J=J, bias=problem.bias / unit, coupling=coupling), unit


class _Machine(NamedTuple):
    """The model that is swept: N variables, then G ghosts, each a spin fixed at 1 and coupled to one variable."""

    graph: ColoredGraph
    bias: torch.Tensor  # [N + G]
    coupling: torch.Tensor  # [E + G]
    num_ghosts: int

    def anneal(
        self,
        reads: torch.Tensor,
        update: Callable[..., torch.Tensor],
        beta: torch.Tensor,
        randomize_order: bool,
        *,
        chain_offset: int,
        seed: int,
    ) -> torch.Tensor:
        """Reads [R, N] after sweeps, one for each of ``beta``."""
        num_variables = reads.shape[1]
        state = torch.nn.functional.pad(reads, (0, self.num_ghosts), value=1)
        is_ghost = torch.arange(self.graph.num_nodes) >= num_variables
        model = self.bias, self.coupling, self.graph
        options: dict[str, Any] = {"chain_offset": chain_offset, "seed": seed}
        with warnings.catch_warnings():
            # The sweep's own warning has no meaning here: beta is very large at the end of an annealing.
            warnings.simplefilter("ignore", CouplingResolutionWarning)
            if not randomize_order:
                clamp = is_ghost if self.num_ghosts else None
                state = update(state, *model, len(beta), beta=beta, clamp=clamp, **options)
                return state[:, :num_variables]
            edges = self.graph.edges.numpy()[: self.graph.num_edges - self.num_ghosts]
            random = np.random.default_rng(seed)
            layers = ((b, layer) for b in beta for layer in _random_layers(random, num_variables, edges))
            for number, (b, layer) in enumerate(layers):
                clamp = torch.ones_like(is_ghost)
                clamp[torch.from_numpy(layer)] = False
                state = update(state, *model, 1, beta=b, clamp=clamp, sweep_offset=number, **options)
        return state[:, :num_variables]


def _best_state(
    sweeps_per_read: int,
    metropolis: bool,
    state: torch.Tensor,
    bias: torch.Tensor,
    coupling: torch.Tensor,
    graph: ColoredGraph,
    num_sweeps: int,
    *,
    beta: torch.Tensor,
    clamp: torch.Tensor | None,
    chain_offset: int,
    seed: int,
) -> torch.Tensor:
    """The state [R, N] of the lowest energy of each chain among those after every so many sweeps."""
    outputs: tuple[torch.Tensor, ...] = ops.call_without_gradient(
        "graph_moments", state, bias, coupling, graph.layout, beta, torch.tensor(seed, device="cpu"), clamp, None,
        chain_offset, 0, num_sweeps, sweeps_per_read, 0, True, metropolis,
    )  # fmt: skip
    return outputs[-2]


def _random_layers(random: np.random.Generator, num_variables: int, edges: Integers) -> Iterator[Integers]:
    """N variables drawn one after the other, with repetition, in layers that hold no neighbours and nothing twice.

    An update of layer after layer, each at once, equals an update of the variables in the order in which they were
    drawn: a variable waits until itself and its neighbours have been updated, if they were drawn before it.
    """
    drawn = random.integers(num_variables, size=num_variables)
    place = np.arange(num_variables)
    u, v = edges.T
    while len(drawn):
        first = np.full(num_variables, num_variables)
        first[drawn[::-1]] = place[::-1]
        around = first.copy()
        np.minimum.at(around, u, first[v])
        np.minimum.at(around, v, first[u])
        is_ready = place == around[drawn]
        yield drawn[is_ready]
        drawn, place = drawn[~is_ready], place[~is_ready]


def _machine(problem: _Problem, exponent: int, beta: torch.Tensor) -> _Machine:
    """The problem times 2^exponent, with a ghost for each variable whose field float32 would round too coarsely.

    Without a ghost the bias is float32. Where it and the couplings cancel but for a small rest, the rest has the error
    of the bias. With a ghost, the part of the bias that can cancel is a coupling, which like all couplings is an
    integer: the integers' sum is exact, and the bias is the rest alone. In a model over spins, that part is computed
    from the rounded interactions, so that interactions of the same size still cancel.

    Args:
        problem: The problem, of N variables.
        exponent: Exponent with which the largest sum of couplings is about 1.
        beta: Schedule of the scaled problem.

    Warns:
        CouplingResolutionWarning: Rounding may still shift some field too far.
    """
    num_variables = len(problem.bias)
    if not (np.isfinite(problem.bias).all() and np.isfinite(problem.coupling).all()):
        raise ValueError(f"{_NAME}: bqm must be finite, got NaN or inf when written for bits")
    bias, coupling = np.ldexp(problem.bias, exponent), np.ldexp(problem.coupling, exponent)
    reach = problem.sums_at_variables(np.abs(coupling))
    field = np.abs(bias) + reach
    can_cancel = np.abs(problem.h) <= 1.001 * problem.sums_at_variables(np.abs(problem.J))  # or all but cancel
    is_coarse = can_cancel & (float(beta.max()) * _FLOAT32_ROUNDING * field > _LOGIT_TOLERANCE)
    # A field is `exact`, what the interactions between spins add to biases of bits, plus `rest`, plus couplings.
    exact, rest = np.zeros(num_variables), bias
    if problem.is_spin:
        exact, rest = -problem.sums_at_variables(coupling) / 2, -2 * np.ldexp(problem.h, exponent)
    if is_coarse.any():
        # If all terms are multiples of one grain and the largest field is below 2^24 grains, float32 is exact.
        grain = np.ldexp(1.0, np.frexp(field[can_cancel].max())[1] - 24)
        is_coarse &= any((x % grain).any() for x in (exact[can_cancel], rest[can_cancel], coupling))
    coarse = np.flatnonzero(is_coarse)
    edges = np.concatenate([problem.edges, np.stack([coarse, num_variables + np.arange(len(coarse))], 1)])
    graph = ColoredGraph(num_variables, torch.from_numpy(problem.edges))
    if len(coarse):
        of_ghosts = (graph.colors[torch.from_numpy(coarse)] + 1) % graph.num_colors
        graph = ColoredGraph(num_variables + len(coarse), torch.from_numpy(edges), torch.cat((graph.colors, of_ghosts)))

    def model(of_variables: Floats, of_edges: Floats, of_ghosts: Floats) -> GraphBoltzmann:
        biases, couplings = np.pad(of_variables, (0, len(coarse))), np.concatenate([of_edges, of_ghosts])
        return GraphBoltzmann(graph, torch.from_numpy(biases), torch.from_numpy(couplings), validate_args=False)

    # A ghost's coupling is at most the sum of the others, which rounding may raise: hence the margin. It is a multiple
    # of half a step: hence the factor 2.
    margin = 1 + np.ldexp(graph.max_degree, -28)
    step = 2 * float(coupling_resolution(model(bias, margin * coupling, margin * reach[coarse])))
    rounded = step * np.rint(coupling / step)
    unit = step
    if problem.is_spin:
        exact, unit = -problem.sums_at_variables(rounded) / 2, step / 2
    # Errors are as good as independent; three standard deviations of their sum.
    error = 3 * np.sqrt(problem.sums_at_variables((rounded - coupling) ** 2)) * (unit / step)
    # Biases of the size of interactions are rounded as these are, so that both cancel where they are equal.
    snapped = np.where((error > 0) & (np.abs(rest) >= 1024 * unit), unit * np.rint(rest / unit), rest)
    error += np.abs(snapped - rest)
    limit = problem.sums_at_variables(np.abs(rounded))
    ghost = np.clip(exact + step * np.rint(snapped / step), -limit, limit)
    ghost[~is_coarse] = 0
    rest = (exact - ghost) + snapped
    error += np.where(is_coarse, np.abs(rest - rest.astype(np.float32)), 0)
    _warn_of_rounding(error, np.ldexp(problem.smallest_terms(), exponent), beta)

    scaled = model(rest, rounded, ghost[coarse])
    return _Machine(graph, scaled.bias, scaled.coupling, len(coarse))


def _warn_of_rounding(error: Floats, smallest: Floats, beta: torch.Tensor) -> None:
    """Warns if errors of the fields [N] matter beside the ``smallest`` term of each variable [N]."""
    is_finite = beta < _LARGEST_BETA
    largest = float(beta[is_finite].max()) if is_finite.any() else 0.0
    is_off = largest * error > _LOGIT_TOLERANCE
    if not is_finite.all():
        is_off |= (error > 2 * _TERM_TOLERANCE * smallest) | (smallest * _LARGEST_BETA < _DECISIVE_LOGIT)
    if is_off.any():
        worst = float((error[is_off] / smallest[is_off]).max()) / 2
        warn(
            f"{_NAME}: bqm has terms too small beside others for so large a beta: at {np.count_nonzero(is_off)} of the "
            f"variables rounding may shift logits by more than {_LOGIT_TOLERANCE:g}, and terms by up to {worst:.2g} of "
            "themselves",
            CouplingResolutionWarning,
        )


def _default_beta_range(problem: _Problem) -> list[float]:
    """The range that ``SimulatedAnnealingSampler`` takes by default, by the Metropolis rule's chance to flip a spin.

    At the first beta, the spin that is hardest to flip flips with probability 1/2 if all its terms are satisfied. At
    the last beta, one of the spins whose smallest term is the smallest of all flips against it with probability 1/100.
    """
    smallest = problem.smallest_terms()
    gap = smallest.min(initial=np.inf)
    if gap == np.inf:
        return [0.1, 1.0]  # all states are equal, whatever beta is
    with np.errstate(over="ignore"):  # the caller refuses 0 and inf
        total = np.abs(problem.h) + problem.sums_at_variables(np.abs(problem.J))
        hot = np.log(2) / (2 * total.max())
        cold = np.log(100 * np.count_nonzero(smallest == gap)) / (2 * gap)
    return [float(hot), float(cold)]


def _as_betas(argument: str, values: object, limit: float) -> Floats:
    try:
        betas = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{_NAME}: {argument} must hold numbers, got {shown(values)}") from error
    if betas.ndim != 1 or not len(betas) or not ((betas >= 0) & (betas <= limit)).all():
        kind = "numbers" if limit == math.inf else "finite numbers"
        raise ValueError(f"{_NAME}: {argument} must be a sequence of {kind} of at least 0, got {shown(values)}")
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
    is_custom = beta_schedule_type == "custom"
    if (beta_schedule is None) == is_custom:
        raise ValueError(
            f"{_NAME}: beta_schedule must be given with beta_schedule_type 'custom' and with no other, "
            f"got {shown(beta_schedule)} with {beta_schedule_type!r}"
        )
    limit = math.inf if is_custom else np.finfo(np.float64).max
    ends = None if beta_range is None else _as_betas("beta_range", beta_range, limit)
    if ends is not None and len(ends) != 2:
        raise ValueError(f"{_NAME}: beta_range must hold two betas, first and last, got {shown(beta_range)}")
    if is_custom:
        betas = _as_betas("beta_schedule", beta_schedule, limit)
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


class BQMBoltzmann(NamedTuple):
    """The result of :func:`bqm_to_boltzmann`."""

    model: GraphBoltzmann  # one node per variable, one edge per interaction
    variables: list[Any]  # the label of each node
    offset: float  # bqm.energy(sample) = model.energy(z) + offset


def bqm_to_boltzmann(bqm: dimod.BinaryQuadraticModel, dtype: torch.dtype = torch.float64) -> BQMBoltzmann:
    """A binary quadratic model as a Boltzmann machine over bits, whose probabilities are ``exp(-bqm.energy) / Z``.

    Args:
        bqm: A SPIN or BINARY model of one variable or more, with finite biases. Interactions of 0 are edges, too.
        dtype: Floating-point dtype of the parameters.

    Returns:
        :class:`BQMBoltzmann`. Bit i of a state z is 1 where variable ``variables[i]`` is 1, and 0 where it is 0 or -1.

    Raises:
        TypeError, ValueError: An argument does not fit; the message begins with ``bqm_to_boltzmann:``.

    Example:
        >>> import dimod
        >>> bqm = dimod.BinaryQuadraticModel({"a": 0.5}, {("a", "b"): -1.0}, 3.0, "SPIN")
        >>> model, variables, offset = bqm_to_boltzmann(bqm)
        >>> variables, (model.energy(torch.tensor([1.0, 0.0])) + offset).item(), bqm.energy({"a": 1, "b": -1})
        (['a', 'b'], 4.5, 4.5)
    """
    name = "bqm_to_boltzmann"
    if not isinstance(bqm, dimod.BinaryQuadraticModel):
        raise TypeError(f"{name}: bqm must be a dimod.BinaryQuadraticModel, got {type(bqm).__name__}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name}: dtype must be a floating-point torch.dtype, got {shown(dtype)}")
    if not len(bqm.variables):
        raise ValueError(f"{name}: bqm must have one variable or more, got none")
    linear, edges, quadratic = _vectors(name, bqm)
    ends = torch.from_numpy(edges)
    bias, coupling, offset = _over_bits(bqm, torch.from_numpy(linear), torch.from_numpy(quadratic), ends)
    bias, coupling = bias.to(dtype), coupling.to(dtype)
    if not (bias.isfinite().all() and coupling.isfinite().all()):
        raise ValueError(f"{name}: bqm must be finite in {dtype} when written for bits, got a number beyond it")
    return BQMBoltzmann(GraphBoltzmann(ColoredGraph(len(bias), ends), bias, coupling), list(bqm.variables), offset)


def boltzmann_to_bqm(
    model: BipartiteBoltzmann | GraphBoltzmann,
    variables: Sequence[Any] | None = None,
    *,
    offset: float = 0.0,
    vartype: Any = "BINARY",
) -> dimod.BinaryQuadraticModel:
    """A Boltzmann machine as a binary quadratic model of the same energies: ``bqm.energy = model.energy + offset``.

    Args:
        model: A model of batch shape []. The result carries no gradient.
        variables: A label for each unit, in the order of z (left, then right); 0, 1, ... by default.
        offset: Added to all energies.
        vartype: "BINARY", whose values are the bits, or "SPIN", whose values are ``2 z - 1``.

    Returns:
        A model with an interaction for each edge, or for each pair of a left and a right unit.

    Raises:
        TypeError, ValueError: An argument does not fit; the message begins with ``boltzmann_to_bqm:``.
    """
    name = "boltzmann_to_bqm"
    check_model(name, model)
    if model.batch_shape:
        raise ValueError(f"{name}: model must be one model, of batch shape [], got {list(model.batch_shape)}")
    try:
        labels = list(range(model.num_units)) if variables is None else list(variables)
        num_different = len(set(labels))
    except TypeError as error:
        raise TypeError(f"{name}: variables must be a sequence of hashable labels, got {shown(variables)}") from error
    if len(labels) != model.num_units or num_different != len(labels):
        wanted = f"variables must be {model.num_units} different labels, one for each unit"
        raise ValueError(f"{name}: {wanted}, got {len(labels)}, {num_different} of them different")
    if isinstance(offset, bool) or not isinstance(offset, numbers.Real):
        raise TypeError(f"{name}: offset must be a number, got {shown(offset)}")
    try:
        kind = dimod.as_vartype(vartype)
    except TypeError as error:
        raise TypeError(f"{name}: vartype must be 'BINARY' or 'SPIN', got {shown(vartype)}") from error
    parameters = torch.cat(model._biases), model._couplings.flatten()
    linear, quadratic = (-x.detach().cpu().double().numpy() for x in parameters)
    u, v = model._edges().T
    bqm = dimod.BinaryQuadraticModel.from_numpy_vectors(
        linear, (u.numpy(), v.numpy(), quadratic), offset, dimod.BINARY, variable_order=labels
    )
    return bqm.change_vartype(kind, inplace=False)
