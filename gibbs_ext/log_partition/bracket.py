# SPDX-License-Identifier: Apache-2.0
"""log Z between two estimates, by annealing in both directions, and Bennett's estimate from the work of both."""

import logging
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gibbs_ext.arguments import as_seed
from gibbs_ext.checks import check_bits, check_integers, reported_as, warn
from gibbs_ext.log_partition.annealing import AISResult, Base, Betas, ais_result, annealed_chains
from gibbs_ext.log_partition.machine import Machine, check_model, refuse_vmap

Floats = NDArray[np.float64]
# How far apart forward and reverse estimates may lie, in standard errors of their difference.
_MOST_DEVIATIONS = 4.0
_LARGEST_WORK = 1e12


class BracketWarning(UserWarning):
    """The forward and the reverse estimate of log Z contradict each other, so that no error bar can be believed."""


class BracketResult(NamedTuple):
    """The result of :func:`bracket_log_partition`; M stands for the model's batch shape."""

    log_partition: Tensor  # [M] float64: Bennett's estimate of log Z
    standard_error: Tensor  # [M] float64: that of log_partition
    lower: Tensor  # [M] float64: the forward estimate, too low in expectation
    upper: Tensor  # [M] float64: the reverse estimate, too high in expectation if draws are the model's
    forward: AISResult
    reverse: AISResult


def bracket_log_partition(
    model: Machine,
    draws: Tensor,
    betas: Betas,
    *,
    base: Base = "field",
    chain_offset: int = 0,
    progress: bool = False,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> BracketResult:
    """``log Z`` by annealing chains from a factorial model to this one, and from draws of this one back.

    The mean weight of either direction estimates log Z, with an error of known sign (Grosse, Ghahramani and Adams,
    "Sandwiching the marginal likelihood using bidirectional Monte Carlo", 2015). Together the works of both directions
    give the estimate of least variance (C. H. Bennett, "Efficient estimation of free energy differences from Monte
    Carlo data", J. Comput. Phys. 22, 1976), which pymbar computes. Needs pymbar (``pip install pymbar``).

    Args:
        model: A model of any batch shape; all models of the batch are done at once.
        draws: z [C, *batch_shape, N], independent draws from the model, C at least 2: :func:`gibbs_ext.exact_samples`,
            :func:`gibbs_ext.perfect_samples`, or the ends of long chains. As many chains are annealed forward.
        betas: The number of steps (evenly spaced), or the schedule itself, [K + 1] from 0 to 1.
        base: The factorial model at beta = 0, as in :func:`gibbs_ext.annealed_importance_sampling`.
        chain_offset: Number of the first of the 2 * C * M chains, the forward ones first, at least 0.
        progress: Whether to show progress bars (tqdm), as :func:`gibbs_ext.annealed_importance_sampling` does.
        generator: Supplies the seed.
        seed: A 64-bit integer, instead of a generator.

    Returns:
        :class:`BracketResult`. Upper is below lower where both are precise and noise decides.

    Raises:
        ImportError: pymbar is not installed.
        TypeError, ValueError: An argument has a wrong type or does not fit.
        NotImplementedError: Under torch.vmap, where a parameter is mapped.

        The messages begin with ``bracket_log_partition:``.

    Warns:
        EffectiveSampleSizeWarning: In one direction the weights of few chains dominate.
        BracketWarning: The two estimates are more than four standard errors apart, so that one of them is wrong by more
            than its error bar says; ``standard_error`` is then at least half of their distance. Take more betas, or
            better draws. (Where both directions miss the same states, they agree on a wrong answer.)

    Not differentiable.
    """
    name = "bracket_log_partition"
    check_model(name, model)
    check_integers(name, 0, chain_offset=chain_offset)
    refuse_vmap(name, model)
    bennett = bennett_estimator(name)
    shape = ("C", *map(str, model.batch_shape), str(model.num_units))
    if not isinstance(draws, Tensor):
        raise TypeError(f"{name}: draws must be a tensor, got {type(draws).__name__}")
    if draws.dim() != len(shape) or draws.shape[1:] != (*model.batch_shape, model.num_units) or len(draws) < 2:
        raise ValueError(
            f"{name}: draws must have shape [{', '.join(shape)}] with C at least 2, got {list(draws.shape)}"
        )
    check_bits(name, "draws", draws)
    num_chains, num_models = len(draws), model.batch_shape.numel()
    if chain_offset + 2 * num_chains * num_models > 2**48:
        raise ValueError(f"{name}: chain_offset must leave room for all chains below 2^48, got {chain_offset}")
    number = as_seed(name, generator, seed, model.device)
    results, works = [], []
    with reported_as(name, initial="draws"):
        for reverse in (False, True):
            base_log_partition, log_weights, samples = annealed_chains(
                model, num_chains, betas, base=base, reverse=reverse,
                initial=draws[..., : model._num_state_units] if reverse else None,
                chain_offset=chain_offset + num_chains * num_models * reverse, generator=None, seed=number,
                progress=progress,
            )  # fmt: skip
            results.append(ais_result(base_log_partition, log_weights, samples, reverse))
            works.append(-log_weights.reshape(num_chains, num_models).cpu().numpy())
    forward, reverse_result = results
    lower, upper = forward.log_partition, reverse_result.log_partition
    found = [bennett(*of_model) for of_model in zip(works[0].T, works[1].T, strict=True)]
    table = torch.tensor(found, dtype=torch.float64, device=model.device).reshape(*model.batch_shape, 2)
    differences, errors = table.unbind(-1)
    log_partition = torch.where(differences.isnan(), (lower + upper) / 2, base_log_partition - differences)
    deviations = (upper - lower).abs() / torch.hypot(forward.standard_error, reverse_result.standard_error)
    is_wrong = (deviations > _MOST_DEVIATIONS) | differences.isnan()
    errors = torch.where(is_wrong, errors.maximum((upper - lower).abs() / 2), errors)
    if bool(is_wrong.any()):
        at = int(deviations.masked_fill(~is_wrong, -1).argmax())
        warn(
            f"{name}: the forward estimate {float(lower.flatten()[at]):.6g} and the reverse one "
            f"{float(upper.flatten()[at]):.6g} are {float(deviations.flatten()[at]):.1f} standard errors apart; "
            "one of them is wrong by more than its error bar says (take more betas, or better draws)",
            BracketWarning,
        )
    return BracketResult(log_partition, errors, lower, upper, forward, reverse_result)


def bennett_estimator(name: str) -> Callable[[Floats, Floats], tuple[float, float]]:
    """Bennett's estimate of ``- log(Z / Z_base)`` and its error, of both works; nan and 0 if it is not found."""
    logger = logging.getLogger("pymbar")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs that it does without JAX
    try:
        from pymbar.other_estimators import bar  # type: ignore[import-untyped]
        from pymbar.utils import BoundsError, ConvergenceError  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(f"{name}: needs pymbar; pip install pymbar") from error
    finally:
        logger.setLevel(level)

    def bennett(forward: Floats, reverse: Floats) -> tuple[float, float]:
        # pymbar's search does not end where its steps are lost in rounding, and takes nan for an estimate of 0.
        if not all((np.abs(works) < _LARGEST_WORK).all() for works in (forward, reverse)):
            return math.nan, 0.0
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of works that do not overlap, which are told by the caller
            try:
                found = bar(forward, reverse, relative_tolerance=1e-10)
            except (BoundsError, ConvergenceError):
                return math.nan, 0.0
        return float(found["Delta_f"]), float(np.nan_to_num(found["dDelta_f"]))

    return bennett
