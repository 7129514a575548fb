# SPDX-License-Identifier: Apache-2.0
"""A Boltzmann machine with parameters of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from gibbs_ext.chains import PersistentChains
from gibbs_ext.checks import check_integers, reported_as, shown
from gibbs_ext.graphs import ColoredGraph
from gibbs_ext.log_partition.annealing import Betas, as_schedule
from gibbs_ext.log_partition.population import population_annealing
from gibbs_ext.models import BipartiteBoltzmann, Boltzmann, GraphBoltzmann
from gibbs_ext.nn.structure import MachineModule, structure_of
from gibbs_ext.tempering import parallel_tempering, read_ladder

_SAMPLERS = ("persistent", "population_annealing", "parallel_tempering")


class BoltzmannPrior(MachineModule):
    """``p(z)``: a Boltzmann machine, trained by persistent contrastive divergence or with samples of annealing.

    It is bipartite, z = (left, right), with ``num_left`` and ``num_right``; or on a coloured graph, with ``graph``.

    Args:
        num_left: n1, number of left units.
        num_right: n2, number of right units.
        graph: A :class:`gibbs_ext.ColoredGraph` of N nodes and E edges, in place of the two sides.
        num_chains: Number of chains, which supply the gradient of log Z.
        num_sweeps: Number of sweeps that they make in each :meth:`log_partition_surrogate`, at each beta if they are
            annealed or tempered (at least 2 if tempered).
        sampler: How they are advanced. ``"persistent"`` chains go on from where they were; a mode of the model that
            they do not find stays unknown to the gradient. ``"population_annealing"`` draws them anew each time by
            :func:`gibbs_ext.population_annealing`, whose samples have modes in the right proportion, at as many times
            the cost as there are betas. ``"parallel_tempering"`` (:func:`gibbs_ext.parallel_tempering`) gives each
            chain replicas at smaller betas, which go on from one call to the next as persistent chains do, and by way
            of which it goes from mode to mode; at as many times the cost as there are betas, too.
        betas: The schedule of annealing, as there: number, schedule or ``"adaptive"``. Or the ladder of tempering, [B]
            numbers that rise to 1. Only and always with the two.

    Attributes:
        left_bias: Parameter [n1], initially 0.
        right_bias: Parameter [n2], initially 0.
        weight: Parameter [n1, n2], initially N(0, 0.01^2), which breaks the symmetry between units.
        bias: Parameter [N], initially 0; on a graph, in place of the above.
        coupling: Parameter [E], initially N(0, 0.01^2); on a graph.
        chains: :class:`gibbs_ext.PersistentChains`, part of ``state_dict``: the latest samples of any sampler.
        replicas: The same of ``num_chains * B`` chains, those at all betas of a chain after each other; with parallel
            tempering only.

    ``state_dict`` also holds the edges of a graph: a state of the same edges in another order loads, a state of other
    edges is an error.
    """

    left_bias: nn.Parameter
    right_bias: nn.Parameter
    weight: nn.Parameter
    bias: nn.Parameter
    coupling: nn.Parameter

    def __init__(
        self,
        num_left: int | None = None,
        num_right: int | None = None,
        *,
        graph: ColoredGraph | None = None,
        num_chains: int = 1000,
        num_sweeps: int = 20,
        sampler: str = "persistent",
        betas: Betas | str | None = None,
    ) -> None:
        structure = structure_of("BoltzmannPrior", num_left, num_right, graph)
        super().__init__(structure)
        check_integers("BoltzmannPrior", 1, num_chains=num_chains, num_sweeps=num_sweeps)
        if sampler not in _SAMPLERS:
            raise ValueError(f"BoltzmannPrior: sampler must be one of {', '.join(_SAMPLERS)}, got {shown(sampler)}")
        if (betas is None) != (sampler == "persistent"):
            wanted = "None with persistent chains" if sampler == "persistent" else f"given with sampler={sampler!r}"
            raise ValueError(f"BoltzmannPrior: betas must be {wanted}, got {shown(betas)}")
        self.num_sweeps = num_sweeps
        self.sampler, self.betas = sampler, betas
        self._along_edges = ("coupling",)
        couplings = 0.01 * torch.randn(structure.coupling_shape)
        values = [*(torch.zeros(n) for n in structure.sizes), couplings]
        for name, value in zip(structure.parameter_names, values, strict=True):
            self.register_parameter(name, nn.Parameter(value))
        self.chains = PersistentChains(num_chains, self.distribution())
        if sampler == "population_annealing" and not (isinstance(betas, str) and betas == "adaptive"):
            as_schedule("BoltzmannPrior", betas, torch.device("cpu"))  # type: ignore[arg-type]
        if sampler == "parallel_tempering":
            check_integers("BoltzmannPrior", 2, num_sweeps=num_sweeps)  # so that all pairs have their turns
            ladder = read_ladder("BoltzmannPrior", betas, torch.device("cpu"))  # type: ignore[arg-type]
            if ladder[-1] != 1 or ladder[0] > 1:
                raise ValueError(f"BoltzmannPrior: betas must rise to 1, got {shown(betas)}")
            self.betas = ladder.tolist()
            self.replicas = PersistentChains(num_chains * len(ladder), self.distribution())

    def distribution(self) -> BipartiteBoltzmann | GraphBoltzmann:
        """The model of the current parameters, which does not check values.

        Returns:
            A model of batch shape []. Its parameters are this module's own tensors, so that gradient flows into them.
        """
        return self.structure.model(getattr(self, name) for name in self.structure.parameter_names)

    def energy(self, z: Tensor, right: Tensor | None = None) -> Tensor:
        """Energies of bits or relaxed values.

        Args:
            z: [..., N], of any dtype; of a bipartite prior left and right joined, [..., n1 + n2].
            right: [..., n2], of a bipartite prior only: z is then left alone, [..., n1].

        Returns:
            [...], differentiable in z, right and this module's parameters.

        Raises:
            TypeError: z or right is no tensor.
            ValueError: The last dim of z or right does not fit, or right is given on a graph. The message begins with
                ``BoltzmannPrior:`` if right is given on a graph, otherwise with the name of the model's class.
            RuntimeError: Batch dims of z and right do not broadcast. The message is PyTorch's.
        """
        model = self.distribution()
        if right is None:
            return model.energy(z)
        if not isinstance(model, BipartiteBoltzmann):
            raise ValueError("BoltzmannPrior: right must be None when a graph is given")
        return model.energy_of(z, right)

    def log_partition_surrogate(
        self,
        *,
        part: slice | None = None,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """A scalar whose gradient estimates that of log Z; its value means nothing.

        It is ``mean_chains(-free_energy)``, where right (on a graph, colour 0) is integrated out. Mutates ``chains``,
        which ``sampler`` advances first.

        Args:
            part: Selects the chains to advance and to average over; all by default. With population annealing each
                part is a population of its own. With parallel tempering the replicas of these chains are advanced.
            generator: Supplies the seed.
            seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

        Returns:
            [], differentiable in this module's parameters, the chains held fixed.

        Raises:
            TypeError, ValueError, NotImplementedError: As in :meth:`gibbs_ext.PersistentChains.advance_` or
                :func:`gibbs_ext.population_annealing`; the messages begin with ``PersistentChains:`` or
                ``BoltzmannPrior:``.

        Warns:
            PopulationCollapseWarning: As in :func:`gibbs_ext.population_annealing`.
            TemperingWarning: As in :func:`gibbs_ext.parallel_tempering`.
        """
        model = self.distribution()
        if self.sampler == "persistent":
            z = self.chains.advance_(model, self.num_sweeps, part=part, generator=generator, seed=seed)
        elif self.sampler == "population_annealing":
            z = self._annealed(model, part, generator=generator, seed=seed)
        else:
            z = self._tempered(model, part, generator=generator, seed=seed)
        return -model.free_energy(model._state_of(z)).mean()

    def _annealed(
        self, model: Boltzmann, part: slice | None, generator: torch.Generator | None, seed: int | Tensor | None
    ) -> Tensor:
        """z of ``part``, drawn anew, and kept as chains."""
        part = self.chains._check_part(part)
        assert self.betas is not None
        with reported_as("BoltzmannPrior"):
            z = population_annealing(
                model, part.stop - part.start, self.betas, num_sweeps=self.num_sweeps, chain_offset=part.start,
                generator=generator, seed=seed,
            ).samples  # fmt: skip
        self.chains._store(model._state_of(z), None, part)
        return z

    def _tempered(
        self, model: Boltzmann, part: slice | None, generator: torch.Generator | None, seed: int | Tensor | None
    ) -> Tensor:
        """z of ``part`` at beta = 1, after their replicas have gone on."""
        part = self.chains._check_part(part)
        ladder: Any = self.betas
        num_chains, num_betas = part.stop - part.start, len(ladder)
        of_part = slice(part.start * num_betas, part.stop * num_betas)
        state = self.replicas.state(part=of_part).unflatten(0, (num_chains, num_betas)).transpose(0, 1)
        z = torch.nn.functional.pad(state, (0, model.num_units - state.shape[-1]))
        with reported_as("BoltzmannPrior"):
            result = parallel_tempering(
                model, num_chains, ladder, self.num_sweeps, initial=z, chain_offset=part.start,
                generator=generator, seed=seed,
            )  # fmt: skip
        self.replicas._store(model._state_of(result.all_samples).transpose(0, 1).flatten(0, 1), None, of_part)
        self.chains._store(model._state_of(result.samples), None, part)
        return result.samples
