# SPDX-License-Identifier: Apache-2.0
"""How well chains mix, by ArviZ: traces of energies, magnetisations and units, their effective sample sizes and R-hat.

Needs arviz (``pip install 'arviz<1'``). Its reference is R. Kumar et al., "ArviZ a unified library for
exploratory analysis of Bayesian models in Python", JOSS 4(33), 2019; the statistics are those of A. Vehtari et al.,
"Rank-normalization, folding, and localization: an improved R-hat", Bayesian Analysis 16(2), 2021.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gibbs_ext.arguments import as_seed
from gibbs_ext.checks import check_bits, check_integers, check_units, reported_as, shown, warn
from gibbs_ext.log_partition.machine import check_model, refuse_vmap
from gibbs_ext.models.base import Boltzmann
from gibbs_ext.progress import shown_progress

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

# What Vehtari et al. recommend: R-hat below the first, a bulk effective sample size of the second for each chain.
_LARGEST_R_HAT = 1.01
_LEAST_ESS = 100
_MOST_SWEEPS = 2**40


class MixingWarning(UserWarning):
    """Chains may not have mixed: R-hat exceeds 1.01, an effective sample size is below 100 for each chain, or both are
    unknown."""


def record(
    model: Boltzmann,
    num_chains: int = 4,
    num_draws: int = 1000,
    *,
    thin: int = 1,
    warmup: int = 0,
    units: Sequence[int] = (),
    initial: Tensor | None = None,
    chain_offset: int | Tensor = 0,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    progress: bool = False,
) -> Any:
    """Runs chains, and keeps of their states what :func:`to_inference_data` does.

    Args:
        model: A model of this package, one or a batch.
        num_chains: C, chains of each model, at least 1.
        num_draws: D, draws of each chain, at least 1.
        thin: Sweeps from one draw to the next, at least 1.
        warmup: Sweeps before the first draw's own, which are not recorded.
        units: Numbers of the units whose values are kept.
        initial: States to start from, as in the model's ``sample``; uniform bits when not given, which are spread more
            widely than the model's law, as R-hat wants them.
        chain_offset: Number of the first chain, or numbers of all chains, as in :func:`gibbs_ext.bipartite_gibbs`.
        generator: Supplies the seed; the default generator when neither is given.
        seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.
        progress: Whether to show a bar of the draws, by tqdm.

    Returns:
        An :class:`arviz.InferenceData`, as of :func:`to_inference_data`. The last draw is that of
        ``model.sample((C,), warmup + D * thin, seed=seed)``.

    Raises:
        ImportError: arviz, or for ``progress`` tqdm, is not installed.
        TypeError, ValueError: An argument has a wrong type, is too small or too large, or does not fit.
        NotImplementedError: Under torch.vmap, where a parameter is mapped.

        The messages begin with ``diagnostics.record:``.
    """
    name = "diagnostics.record"
    check_model(name, model)
    check_integers(name, 1, num_chains=num_chains, num_draws=num_draws, thin=thin)
    check_integers(name, 0, warmup=warmup)
    if warmup + num_draws * thin > _MOST_SWEEPS:
        raise ValueError(f"{name}: warmup + num_draws * thin must be at most 2^40, got {warmup + num_draws * thin}")
    refuse_vmap(name, model)
    kept = _units(name, model, units)
    arviz = _arviz(name)
    number = as_seed(name, generator, seed, model.device)
    model = model.detach()

    def draws() -> Iterator[Tensor]:
        state, betas = model._start(name, (num_chains,), initial, 0)
        options = {"chain_offset": chain_offset, "seed": number}
        done = len(betas)  # a sweep at beta = 0, which makes uniform bits, or none
        if done:
            state = model._state_of(model._sweep(state, done, beta=betas, **options))
        for draw in range(num_draws):
            count = thin + (warmup if draw == 0 else 0)
            z = model._sweep(state, count, sweep_offset=done, **options)
            done += count
            state = model._state_of(z)
            yield z

    states = shown_progress(name, draws(), progress, num_draws)
    with reported_as(name, left="initial", state="initial"):
        rows = [_statistics(model, z, kept) for z in states]
    columns = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return _as_data(arviz, model, columns, kept, thin)


def to_inference_data(model: Boltzmann, draws: Tensor, *, units: Sequence[int] = (), thin: int = 1) -> Any:
    """Energies, magnetisations and chosen units of chains, for all of ArviZ.

    Args:
        model: A model of this package, one or a batch.
        draws: States [D, C, *batch_shape, N] of bits: D draws of C chains.
        units: Numbers of the units whose values are kept.
        thin: Sweeps from one draw to the next, for :func:`summary`, at least 1.

    Returns:
        An :class:`arviz.InferenceData` whose group ``posterior`` has the dims (chain, draw, batch_0, batch_1, ..., one
        for each of ``batch_shape``) and the variables

        - ``energy``, float64;
        - ``magnetization``, the mean of ``2 z - 1`` over all units, float64;
        - ``unit``, if there are any, with a last dim ``unit_number``, uint8.

    Raises:
        ImportError: arviz is not installed.
        TypeError, ValueError: An argument has a wrong type, or does not fit. The messages begin with
            ``diagnostics.to_inference_data:``.
    """
    name = "diagnostics.to_inference_data"
    check_model(name, model)
    check_units(name, "draws", draws, model.num_units)
    check_integers(name, 1, thin=thin)
    shape = ("D", "C", *map(str, model.batch_shape), str(model.num_units))
    if draws.dim() != len(shape) or draws.shape[2:-1] != model.batch_shape:
        raise ValueError(f"{name}: draws must have shape [{', '.join(shape)}], got {list(draws.shape)}")
    if not draws.shape[0] or not draws.shape[1]:
        raise ValueError(f"{name}: draws must hold a draw of a chain, got shape {list(draws.shape)}")
    if draws.device != model.device:
        raise ValueError(f"{name}: draws must be on the model's device, {model.device}, got {draws.device}")
    check_bits(name, "draws", draws)
    kept = _units(name, model, units)
    return _as_data(_arviz(name), model, _statistics(model.detach(), draws.detach(), kept), kept, thin)


def summary(data: Any, variables: Sequence[str] | None = None) -> "pandas.DataFrame":
    """Effective sample sizes, R-hat and autocorrelation times of all variables, by ArviZ.

    Args:
        data: The result of :func:`record` or :func:`to_inference_data`.
        variables: Names of variables; all when not given.

    Returns:
        A row for each variable, model and unit, with the columns of :func:`arviz.summary` (kind ``"diagnostics"``):
        ``ess_bulk``, ``ess_tail``, ``r_hat``, ``mcse_mean`` and ``mcse_sd``; and ``autocorrelation_time``, in sweeps:
        the number of draws over the effective sample size of their mean, times the sweeps from one draw to the next.
        What does not change has neither of the last two: nan.

    Raises:
        ImportError: arviz is not installed.
        TypeError, ValueError: ``data`` is no InferenceData, or a variable is unknown. The messages begin with
            ``diagnostics.summary:``.

    Warns:
        MixingWarning: R-hat exceeds 1.01, an effective sample size is below 100 for each chain, there are too few draws
            for either, nothing changes, or there is only one chain, whose R-hat says little.
    """
    name = "diagnostics.summary"
    arviz = _arviz(name)
    chosen = _variables(name, data, variables)
    num_chains, num_draws = data.posterior.sizes["chain"], data.posterior.sizes["draw"]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of constants, whose answers are nan here
        table = arviz.summary(data, var_names=chosen, kind="diagnostics", round_to="none")
        functions = {
            "ess": lambda x: arviz.ess(x.reshape(num_chains, num_draws), method="mean"),
            "span": lambda x: x.max() - x.min(),
        }
        stats = arviz.summary(data, var_names=chosen, kind="stats", extend=False, round_to="none", stat_funcs=functions)
    table["autocorrelation_time"] = num_chains * num_draws / stats["ess"] * data.posterior.attrs.get("thin", 1)
    is_constant = stats["span"] == 0
    table.loc[is_constant, ["r_hat", "autocorrelation_time"]] = np.nan
    moving = table[~is_constant]
    doubts = []
    if num_chains == 1:
        doubts.append("there is one chain, whose R-hat says little: take several from different starts")
    if not len(moving):
        doubts.append("nothing changes, so that nothing can be told of mixing")
    elif num_chains > 1 and moving["r_hat"].isna().any():
        doubts.append(f"{num_draws} draws are too few")
    worst, least = moving["r_hat"].max(), moving["ess_bulk"].min()
    if worst > _LARGEST_R_HAT:
        doubts.append(f"R-hat is up to {worst:.5g} ({moving['r_hat'].idxmax()}), above {_LARGEST_R_HAT}")
    if least < _LEAST_ESS * num_chains:
        wanted = f"{_LEAST_ESS} for each of {num_chains} chains"
        doubts.append(
            f"the effective sample size is down to {least:.0f} ({moving['ess_bulk'].idxmin()}), below {wanted}"
        )
    if doubts:
        warn(f"{name}: the chains may not have mixed: {'; '.join(doubts)}", MixingWarning)
    return table


def plot(data: Any, variables: Sequence[str] | None = None, *, axes: Any = None) -> Any:
    """A histogram of all draws and a trace of each chain, for each variable.

    Models and units have a colour each.

    Args:
        data: The result of :func:`record` or :func:`to_inference_data`.
        variables: Names of variables; all when not given.
        axes: Matplotlib axes [rows, 2] to draw on, a row for each variable; by default those of a new figure.

    Returns:
        The axes: histograms on the left, traces on the right.

    Raises:
        ImportError: matplotlib is not installed, which arviz needs.
        ValueError: A variable is unknown, or ``axes`` has another shape. The messages begin with ``diagnostics.plot:``.
    """
    name = "diagnostics.plot"
    import matplotlib.pyplot as plt

    chosen = _variables(name, data, variables)
    if axes is None:
        size = (9, 0.5 + 2 * len(chosen))
        _, axes = plt.subplots(len(chosen), 2, figsize=size, squeeze=False, layout="constrained", width_ratios=(1, 2))
    if np.shape(axes) != (len(chosen), 2):
        raise ValueError(f"{name}: axes must have shape [{len(chosen)}, 2], got {list(np.shape(axes))}")
    for variable, (histogram, trace) in zip(chosen, axes, strict=True):
        values = data.posterior[variable].transpose("chain", "draw", ...)
        names = list(itertools.product(*(values[dim].values for dim in values.dims[2:])))
        series = values.values.reshape(*values.shape[:2], -1).astype(float)
        edges = np.histogram_bin_edges(series, 40)
        for i, name_of in enumerate(names):
            style = {"color": f"C{i % 10}", "alpha": 0.5}
            label = ", ".join(map(str, name_of))
            histogram.hist(series[..., i].ravel(), edges, density=True, label=label, **style)
            trace.plot(series[..., i].T, linewidth=0.7, **style)
        if 1 < len(names) <= 10:
            histogram.legend(title=", ".join(values.dims[2:]), fontsize="small", title_fontsize="small")
        histogram.set(xlabel=variable, yticks=[])
        trace.set(xlabel="draw", ylabel=variable)
    return axes


def _variables(name: str, data: Any, variables: Sequence[str] | None) -> list[str]:
    if not hasattr(data, "posterior"):
        raise TypeError(f"{name}: data must be an arviz.InferenceData with a posterior, got {type(data).__name__}")
    known = list(data.posterior.data_vars)
    chosen = known if variables is None else [variables] if isinstance(variables, str) else list(variables)
    for variable in chosen:
        if variable not in known:
            raise ValueError(f"{name}: variables must be among {', '.join(known)}, got {shown(variable)}")
    if not chosen:
        raise ValueError(f"{name}: variables must name at least one of {', '.join(known)}, got none")
    return chosen


def _arviz(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its next version, which is not asked for
            import arviz
    except ImportError as error:
        raise ImportError(f"{name}: needs arviz; pip install 'arviz<1'") from error
    return arviz


def _units(name: str, model: Boltzmann, units: Sequence[int]) -> list[int]:
    if isinstance(units, str) or not isinstance(units, Sequence):
        raise TypeError(f"{name}: units must be a sequence of integers, got {shown(units)}")
    for unit in units:
        check_integers(name, 0, units=unit)
        if unit >= model.num_units:
            raise ValueError(f"{name}: units must be below {model.num_units}, the model's number of units, got {unit}")
    if len(set(units)) < len(units):
        raise ValueError(f"{name}: units must be distinct, got {shown(units)}")
    return list(units)


def _statistics(model: Boltzmann, z: Tensor, units: Sequence[int]) -> dict[str, Tensor]:
    values = {"energy": model.energy(z).double(), "magnetization": 2 * z.double().mean(-1) - 1}
    if units:
        values["unit"] = z[..., units].to(torch.uint8)
    return values


def _as_data(arviz: Any, model: Boltzmann, columns: dict[str, Tensor], units: Sequence[int], thin: int) -> Any:
    batch = [f"batch_{i}" for i in range(len(model.batch_shape))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="More chains")  # than draws: arviz suspects a mistake
        return arviz.from_dict(
            posterior={key: values.movedim(1, 0).cpu().numpy() for key, values in columns.items()},
            dims={key: [*batch, *(["unit_number"] if key == "unit" else [])] for key in columns},
            coords={"unit_number": list(units)} if units else {},
            posterior_attrs={"thin": thin, "inference_library": "gibbs_ext"},
        )
