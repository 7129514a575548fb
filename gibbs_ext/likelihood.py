# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood: a loss whose gradient is data moments minus model moments, with hidden units, and centred."""

import torch
from torch import Tensor, nn

from gibbs_ext.chains import PersistentChains
from gibbs_ext.checks import check_integers, check_tensors, check_units, check_values, reported_as, shown
from gibbs_ext.log_partition.machine import check_model
from gibbs_ext.models import Boltzmann

# The share of the model's mean in the mean of both.
_SHARES = {"data": 0.0, "model": 1.0, "average": 0.5}


class Centering(nn.Module):
    """Offsets of centred gradients: moving averages of the means of all units, of data and of the model.

    By centred gradients a model learns flipped bits as it learns the bits, and it often learns them better than by
    plain gradients (Montavon and Mueller, "Deep Boltzmann machines and the centering trick", 2012; Melchior, Fischer
    and Wiskott, "How to center deep Boltzmann machines", JMLR 17, 2016). :meth:`gibbs_ext.GraphBoltzmann.centered` says
    what they are. :func:`negative_log_likelihood_surrogate` updates the offsets with the means of each call, and then
    uses them.

    Args:
        model: Gives N, the batch shape, the dtype and the device. It is not kept.
        means: The means that are averaged: those of ``"data"``, of the ``"model"``, or of both, ``"average"``, which
            with a decay of 0 is the enhanced gradient. Those that depend on the model may diverge if decay is small.
        decay: What an update keeps of the offsets, from 0 (the last means alone) to 1 (the offsets stay).
        initial: The offsets at the start, a number from 0 to 1.

    Attributes:
        offsets: Buffer [*batch_shape, N], in ``state_dict``.

    Raises:
        TypeError, ValueError: An argument does not fit; the message begins with ``Centering:``.
    """

    offsets: Tensor

    def __init__(self, model: Boltzmann, means: str = "data", *, decay: float = 0.99, initial: float = 0.5) -> None:
        super().__init__()
        check_model("Centering", model)
        if not isinstance(means, str) or means not in _SHARES:
            raise ValueError(f"Centering: means must be one of {', '.join(_SHARES)}, got {shown(means)}")
        for argument, value in (("decay", decay), ("initial", initial)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"Centering: {argument} must be a number, got {shown(value)}")
            if not 0 <= value <= 1:
                raise ValueError(f"Centering: {argument} must lie in [0, 1], got {value}")
        self.means, self.decay = means, decay
        shape = (*model.batch_shape, model.num_units)
        self.register_buffer("offsets", torch.full(shape, initial, dtype=model.dtype, device=model.device))

    @torch.no_grad()
    def update_(self, data_means: Tensor, model_means: Tensor) -> None:
        """Moves the offsets towards new means. Mutates ``offsets``.

        Args:
            data_means: [*batch_shape, N], means of all units given the data.
            model_means: [*batch_shape, N], means of all units under the model.

        Raises:
            TypeError, ValueError: An argument is no tensor or has another shape; the message begins with
                ``Centering:``.
        """
        check_tensors("Centering", data_means=data_means, model_means=model_means)
        for argument, means in (("data_means", data_means), ("model_means", model_means)):
            if means.shape != self.offsets.shape:
                wanted = f"{argument} must have shape {list(self.offsets.shape)}"
                raise ValueError(f"Centering: {wanted}, got {list(means.shape)}")
        of_data, of_model = (means.to(self.offsets.dtype) for means in (data_means, model_means))
        self.offsets.lerp_(of_data.lerp(of_model, _SHARES[self.means]), 1 - self.decay)

    def extra_repr(self) -> str:
        return f"means={self.means!r}, decay={self.decay}, offsets={list(self.offsets.shape)}"


def negative_log_likelihood_surrogate(
    model: Boltzmann,
    data: Tensor,
    chains: PersistentChains | None,
    num_sweeps: int = 1,
    *,
    where: Tensor | None = None,
    positive_chains: PersistentChains | None = None,
    index: Tensor | None = None,
    num_positive_sweeps: int = 20,
    centering: Centering | None = None,
) -> Tensor:
    """A loss whose gradient estimates that of the mean negative log-likelihood: data moments minus model moments.

    It is ``mean_data energy - mean_chains free_energy``. The value itself means nothing, because log Z is missing from
    it.

    **Model moments.** With ``chains`` they are those of persistent contrastive divergence (PCD; Tieleman, "Training
    restricted Boltzmann machines using approximations to the likelihood gradient", 2008): the chains go on from where
    they were, by ``num_sweeps`` sweeps. Without, they are those of contrastive divergence (CD-k; Hinton, "Training
    products of experts by minimizing contrastive divergence", 2002): a chain starts at each data point in every call,
    and makes k = ``num_sweeps`` sweeps. The gradient of CD-k is biased, less so for a larger k.

    **Data moments.** Units that the data do not give are hidden. If no two of them are coupled, as in restricted and
    semi-restricted machines, they are summed out exactly. Otherwise, as in deep Boltzmann machines, they are sampled
    given the data, and those of the colour that has most of them are then summed out given the rest. (Salakhutdinov and
    Hinton, "Deep Boltzmann machines", 2009, take a mean-field approximation instead.) Samples are the ends of
    ``num_positive_sweeps`` sweeps from uniform bits or, with ``positive_chains``, from where these were.

    Args:
        model: A model of batch shape [*batch_shape].
        data: [B, *batch_shape, V] bits of the V units of ``where``, in ascending order, of the parameters' dtype.
            Without ``where`` they are of all N units, or of the n1 left units of a bipartite model. Where no hidden
            unit is sampled and there are ``chains``, values in between are accepted, too.
        chains: Persistent chains; mutated. Or ``None`` for contrastive divergence.
        num_sweeps: k, the number of sweeps before the model's moments are taken.
        where: Mask [N] of the units that ``data`` gives, bool, the same for all models. The call waits for a mask that
            is on a GPU.
        positive_chains: Persistent chains of the hidden units given the data; mutated. They are chains with a
            ``dataset_size``, of which ``index`` names those of this data, for a model without batch dims. Or they are B
            chains of each model, one for each row of data. They stay as they are if no hidden unit is sampled.
        index: [B] int64, the numbers of the data points, for ``positive_chains`` with a ``dataset_size``.
        num_positive_sweeps: Number of sweeps of the hidden units given the data, at least 1.
        centering: Offsets of the units, for the centred gradient; mutated. Or ``None`` for the gradient itself.

    Returns:
        [*batch_shape]. Differentiable in the parameters, the chains held fixed: second derivatives are those of this
        function, not of the likelihood. Seeds come from torch's default generator.

    Raises:
        TypeError, ValueError: An argument does not fit, or data lie outside of [0, 1]; the message begins with
            ``negative_log_likelihood_surrogate:``.
    """
    name = "negative_log_likelihood_surrogate"
    check_model(name, model)
    check_integers(name, 1, num_positive_sweeps=num_positive_sweeps)
    visible = _visible_mask(name, model, data, where)
    if data.dim() != len(model.batch_shape) + 2:
        shape = ", ".join(map(str, ["B", *model.batch_shape, data.shape[-1]]))
        raise ValueError(f"{name}: data must have shape [{shape}], got {list(data.shape)}")
    if index is not None and positive_chains is None:
        raise ValueError(f"{name}: index must be None without positive_chains, got {type(index).__name__}")
    if centering is not None and not isinstance(centering, Centering):
        raise TypeError(f"{name}: centering must be a Centering, got {type(centering).__name__}")
    for argument, given in (("chains", chains), ("positive_chains", positive_chains)):
        if given is not None and not isinstance(given, PersistentChains):
            raise TypeError(f"{name}: {argument} must be PersistentChains or None, got {type(given).__name__}")
    if chains is not None:  # without chains, the first sweep checks that data are bits
        check_values(name, "data", "lie in [0, 1]", data, (data >= 0) & (data <= 1))
    summed, is_sampled = _summed_units(model, ~visible)
    start = z = _completed(model, data, visible)
    if is_sampled and positive_chains is not None:
        with reported_as(name):  # beforehand, because below the word "given" in an error is replaced by "data"
            positive_chains._check_index(index)
    with reported_as(name, given="data"):
        if is_sampled and positive_chains is not None:
            start = z = positive_chains.advance_(
                model, num_positive_sweeps, index, given=z, where=visible.to(model.device)
            )
        elif is_sampled:
            start = z = _sample(model, z, visible, num_positive_sweeps)
        elif chains is None and not visible[: model._num_state_units].all():
            start = _sample(model, z, visible, 1)  # of units that are independent of one another
    with reported_as(name, left="data", state="data"):
        if chains is None:
            fantasy = model._sweep(model._state_of(start), num_sweeps)
        else:
            fantasy = chains.advance_(model, num_sweeps)
    if centering is not None:
        centering.update_(_mean(model, model._with_means(z, summed), 1), _mean(model, fantasy, 1))
        model = model.centered(centering.offsets)
    positive = model._free_energy_over(summed, z)
    return _mean(model, positive) - _mean(model, model.free_energy(model._state_of(fantasy)))


def _visible_mask(name: str, model: Boltzmann, data: Tensor, where: Tensor | None) -> Tensor:
    """The mask [N] of the units that the data give, on the CPU."""
    if where is None:
        check_units(name, "data", data, *dict.fromkeys((model._num_state_units, model.num_units)))
        return torch.arange(model.num_units, device="cpu") < data.shape[-1]
    check_tensors(name, where=where)
    if where.dtype != torch.bool or where.shape != (model.num_units,):
        got = f"{where.dtype} {list(where.shape)}"
        raise ValueError(f"{name}: where must be a bool tensor of shape [{model.num_units}], got {got}")
    visible = where.cpu()
    if not visible.any():
        raise ValueError(f"{name}: where must name one or more units, got none")
    check_units(name, "data", data, int(visible.sum()))
    return visible


def _summed_units(model: Boltzmann, hidden: Tensor) -> tuple[Tensor, bool]:
    """The numbers of hidden units, on the CPU, no two of which are coupled, and whether there are other hidden ones."""
    colors = model._colors()
    counts = colors[hidden].bincount()
    if (counts > 0).sum() > 1:
        first, second = model._ends(hidden)
        if (first & second).any():
            return (hidden & (colors == counts.argmax())).nonzero()[:, 0], True
    return hidden.nonzero()[:, 0], False


def _completed(model: Boltzmann, data: Tensor, visible: Tensor) -> Tensor:
    """The data as z [..., N], with 0 at hidden units."""
    num_hidden = model.num_units - data.shape[-1]
    if visible[: data.shape[-1]].all():
        return nn.functional.pad(data, (0, num_hidden)) if num_hidden else data
    z = data.new_zeros(*data.shape[:-1], model.num_units)
    return z.index_copy(-1, visible.nonzero()[:, 0].to(data.device), data)


def _sample(model: Boltzmann, given: Tensor, visible: Tensor, num_sweeps: int) -> Tensor:
    return model.sample(given.shape[:1], num_sweeps, given=given, where=visible.to(model.device))


def _mean(model: Boltzmann, values: Tensor, dims: int = 0) -> Tensor:
    """The mean over all dims before the batch dims, which stand before the values' own ``dims``."""
    return values.mean(tuple(range(values.dim() - len(model.batch_shape) - dims)))
