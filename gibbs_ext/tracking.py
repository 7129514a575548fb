# SPDX-License-Identifier: Apache-2.0
"""log Z of a model while it is trained."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gibbs_ext.arguments import as_seed
from gibbs_ext.checks import check_all, check_integers, reported_as, shown
from gibbs_ext.log_partition.annealing import Base, Betas
from gibbs_ext.log_partition.machine import check_model, refuse_vmap
from gibbs_ext.log_partition.population import Population, effective_families, warn_of_collapse
from gibbs_ext.models.base import Boltzmann
from gibbs_ext.models.graph import GraphBoltzmann

# Tensors of a Population that its steps change, beside its model.
_OF_POPULATION = ("z", "log_partition", "family", "excess")


class LogPartitionTracker:
    """log Z of a model while it is trained, by a population of chains that follows the parameters.

    Between two changes of the parameters log Z changes by the logarithm of ``E[exp(old energy - new energy)]`` over the
    old model, which chains estimate (G. Desjardins, A. Courville and Y. Bengio, "On tracking the partition function",
    2011). Here each change is a step of population annealing: the chains are weighted, with right (on a graph, colour
    0) summed out, resampled and swept. So the estimate of Z is unbiased, however few the sweeps, and the families of
    chains give it an error bar, which grows with the way that the parameters have gone.

    The tracker has chains of its own. Those that supply the gradient are no use, though they are there already: each
    step of training makes the very states of these chains less likely, so that they show log Z too low, by 3.4 for the
    machine of 12 + 12 units below.

    :meth:`state_dict` and :meth:`load_state_dict` keep a tracker in a checkpoint.

    A tracker starts by annealing to the model, as :func:`gibbs_ext.population_annealing` does, and can start again::

        tracker = gx.LogPartitionTracker(model)
        for data in batches:
            optimizer.zero_grad()
            gx.negative_log_likelihood_surrogate(model, data, chains).backward()
            optimizer.step()
            tracker.update_(model)  # tracker.log_partition, tracker.standard_error
            if tracker.effective_families.min() < 50:
                tracker.anchor_(model)  # also after a change too large to follow

    A machine of 12 + 12 units that Adam trains at a rate of 0.01, with 1000 chains of 5 sweeps, has an error bar of
    0.1 after 400 updates.

    Args:
        model: A model of any batch shape; all models of the batch are done at once. It is not kept.
        num_chains: C, chains per model, at least 2.
        betas: Number of steps, schedule or ``"adaptive"``, of the annealing.
        num_sweeps: Sweeps at each beta and after each change of parameters, at least 1.
        base: The factorial model where annealing starts.
        generator: Supplies the seed.
        seed: A 64-bit integer, instead of a generator. Chains of another seed should train the model.

    Attributes:
        num_updates: Number of calls of :meth:`update_` since the chains were annealed.

    Raises:
        TypeError, ValueError: An argument has a wrong type or does not fit.
        NotImplementedError: Under torch.vmap, where a parameter is mapped.

        The messages begin with ``LogPartitionTracker:``.

    Warns:
        PopulationCollapseWarning: Most chains descend from few, here or after an update (the first one of those): log Z
            and its error bar cannot be believed until :meth:`anchor_` is called.
    """

    num_updates: int

    def __init__(
        self,
        model: Boltzmann,
        num_chains: int = 1000,
        betas: Betas | str = "adaptive",
        *,
        num_sweeps: int = 5,
        base: Base = "field",
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> None:
        name = type(self).__name__
        check_model(name, model)
        check_integers(name, 2, num_chains=num_chains)
        check_integers(name, 1, num_sweeps=num_sweeps)
        self._num_chains, self._betas, self._num_sweeps, self._base = num_chains, betas, num_sweeps, base
        self._seed = as_seed(name, generator, seed, model.device)
        self._num_anchors = 0
        self.anchor_(model)

    @torch.no_grad()
    def anchor_(self, model: Boltzmann) -> None:
        """Anneals new chains to the model, whose families and error bar start anew. Mutates the tracker.

        Args:
            model: A model, which need not be like those before.

        Raises:
            TypeError, ValueError, NotImplementedError: As above.

        Warns:
            PopulationCollapseWarning: As above.
        """
        name = type(self).__name__
        check_model(name, model)
        refuse_vmap(name, model)
        # New chains have new numbers, and so new random words.
        first = self._num_anchors * self._num_chains * model.batch_shape.numel()
        population = Population(name, _copied(model), self._num_chains, self._base, first, self._seed)
        for _ in population.anneal(self._betas, self._num_sweeps):
            pass
        self._population, self.num_updates, self._has_warned = population, 0, False
        self._num_anchors += 1
        self._warn("take more betas, more sweeps or more chains")

    @torch.no_grad()
    def update_(self, model: Boltzmann) -> None:
        """Follows a change of the parameters. Mutates the tracker.

        The smaller the change, the smaller its share in the error: the variance of log Z grows by about that of the
        change of energy, divided by C.

        Args:
            model: The model with its new parameters, of the same units and batch shape. It is not kept.

        Raises:
            TypeError: ``model`` is no model.
            ValueError: It has another graph, other units or another batch shape, or a parameter is not finite.

        Warns:
            PopulationCollapseWarning: As above.
        """
        name, population = type(self).__name__, self._population
        check_model(name, model)
        old = population.model
        graph = getattr(old, "graph", None)
        if type(model) is not type(old) or getattr(model, "graph", None) != graph:
            raise ValueError(f"{name}: model must be of the class and graph to which chains were annealed, got another")
        parts = [[bias.shape[-1] for bias in of._biases] for of in (model, old)]
        if parts[0] != parts[1] or model.batch_shape != old.batch_shape:
            wanted = f"model must have {parts[1]} units and the batch shape {list(old.batch_shape)}"
            raise ValueError(f"{name}: {wanted}, got {parts[0]} and {list(model.batch_shape)}")
        new, state = _copied(model), population.state
        log_weights = (old.free_energy(state) - new.free_energy(state)).double()
        check_all(log_weights.isfinite(), f"{name}: model must have finite parameters, got NaN or inf")
        population.resample(population.z, log_weights.reshape(population.family.shape))
        population.model = new
        with reported_as(name):
            z = new._sweep(
                population.state, self._num_sweeps, sweep_offset=population.num_sweeps_done, **population.options
            )
        population.keep(z, self._num_sweeps)
        self.num_updates += 1
        self._warn("call anchor_")

    def state_dict(self) -> dict[str, Tensor]:
        """The tracker's state, copies of tensors alone, for a checkpoint that is written with torch.save.

        It holds the chains and the parameters that they follow, the seed and the counts of what was drawn, so that a
        tracker that loads it goes on to the very bits that this one would find.
        """
        return {name: tensor.clone() for name, tensor in self._state().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the state of another tracker. Mutates the tracker, or leaves it as it was after an error.

        Args:
            state: What :meth:`state_dict` returned, of a tracker of as many chains of a model of the same units, graph,
                dtype and batch shape. Tensors may be on any device. ``num_sweeps``, ``betas`` and ``base`` are not in
                it: this tracker keeps its own.

        Raises:
            TypeError, ValueError: ``state`` is no mapping, has other names or a tensor of another dtype or shape, or is
                of another graph.
        """
        name, own = type(self).__name__, self._state()
        if not isinstance(state, Mapping):
            raise TypeError(f"{name}: state must be a mapping of names to tensors, got {shown(state)}")
        if state.keys() != own.keys():
            raise ValueError(f"{name}: state must have the names {', '.join(own)}, got {', '.join(map(str, state))}")
        for key, tensor in own.items():
            given = state[key]
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: state[{key!r}] must be a tensor, got {shown(given)}")
            wanted, got = (f"{of.dtype} {list(of.shape)}" for of in (tensor, given))
            if wanted != got:
                wanted = f"state[{key!r}] must be {wanted}"
                raise ValueError(f"{name}: {wanted}, got {got}; was it of another model or num_chains?")
            if key == "layout" and not torch.equal(given.to(tensor.device), tensor):
                raise ValueError(f"{name}: state['layout'] must be that of this tracker's graph, got another graph's")
        loaded = {key: state[key].to(tensor, copy=True) for key, tensor in own.items()}
        population = self._population
        for key in _OF_POPULATION:
            setattr(population, key, loaded[key])
        model = self._model()
        population.model = model._of([loaded[key] for key in model._dims])
        population.state = population.model._state_of(population.z)
        self._seed = loaded["seed"]
        first, population.num_sweeps_done, population.num_resamplings, *counts = loaded["counts"].tolist()
        self._num_anchors, self.num_updates, has_warned = counts
        self._has_warned = bool(has_warned)
        population.options = {"chain_offset": first, "seed": self._seed}

    def _model(self) -> Boltzmann:
        model = self._population.model
        assert isinstance(model, Boltzmann)
        return model

    def _state(self) -> dict[str, Tensor]:
        population = self._population
        counts = [
            population.options["chain_offset"], population.num_sweeps_done, population.num_resamplings,
            self._num_anchors, self.num_updates, int(self._has_warned),
        ]  # fmt: skip
        model = self._model()
        parameters = dict(zip(model._dims, model._parameters, strict=True))
        of_graph = {"layout": model.graph.layout} if isinstance(model, GraphBoltzmann) else {}
        of_population = {key: getattr(population, key) for key in _OF_POPULATION}
        rest = {"seed": self._seed, "counts": torch.tensor(counts, device="cpu")}
        return parameters | of_graph | of_population | rest

    def _warn(self, remedy: str) -> None:
        """Gives the warning once for all updates after an annealing."""
        if not self._has_warned:
            self._has_warned = warn_of_collapse(type(self).__name__, self._population.family_sizes(), remedy)

    @property
    def log_partition(self) -> Tensor:
        """The estimate of log Z, [*batch_shape] float64."""
        return self._population.log_partition

    @property
    def standard_error(self) -> Tensor:
        """That of ``log_partition``, [*batch_shape] float64, from the spread of families."""
        return self._population.standard_error()

    @property
    def samples(self) -> Tensor:
        """The chains z [C, *batch_shape, N], bits of the parameters' dtype and of equal weight."""
        return self._population.z.to(self._population.model.dtype)

    @property
    def effective_families(self) -> Tensor:
        """As of :class:`gibbs_ext.PopulationResult`, [*batch_shape] float64 from 1 to C."""
        return effective_families(self._population.family_sizes())


def _copied(model: Boltzmann) -> Boltzmann:
    """The model as it is now, whatever becomes of its parameters."""
    return model._mapped(lambda tensor, _: tensor.detach().clone())
