# SPDX-License-Identifier: Apache-2.0
"""A Boltzmann machine whose parameters a network computes: one model per data point."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gibbs_ext.arguments import as_relaxation
from gibbs_ext.chains import PersistentChains
from gibbs_ext.checks import check_integers, check_tensors, reported_as, shown
from gibbs_ext.graphs import ColoredGraph
from gibbs_ext.models import BipartiteBoltzmann, GraphBoltzmann
from gibbs_ext.nn.structure import MachineModule, structure_of


class BoltzmannSample(NamedTuple):
    """A relaxed sample of B posteriors; with chains_per_point > 1 the tensors have that dim in front."""

    z: Tensor  # [B, N] in [0, 1]; of a bipartite posterior left before right
    z_mean: Tensor  # [B, N]: z, the units updated last replaced by their conditional mean, for what is linear in them
    model: BipartiteBoltzmann | GraphBoltzmann  # batch shape [B]

    @property
    def left(self) -> Tensor:
        """[B, n1], a view of ``z``; as ``right`` and ``left_mean``, of a bipartite posterior only."""
        return self._sides(self.z)[0]

    @property
    def right(self) -> Tensor:
        """[B, n2], a view of ``z``."""
        return self._sides(self.z)[1]

    @property
    def left_mean(self) -> Tensor:
        """[B, n1], a view of ``z_mean``: the conditional mean of left given right."""
        return self._sides(self.z_mean)[0]

    def _sides(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(self.model, BipartiteBoltzmann):
            raise AttributeError("BoltzmannSample: a sample on a graph has no sides")
        return self.model.split(z)


GraphSample = BoltzmannSample  # the name that samples on a graph had


class BoltzmannPosterior(MachineModule):
    """``q(z | x)``, an undirected approximate posterior (Vahdat, Andriyash, Macready, ICML 2020).

    It is bipartite, z = (left, right), with ``num_left`` and ``num_right``; or on a coloured graph, with ``graph``.

    A linear layer maps features of x to raw biases b and raw couplings. The raw couplings are batch-normalised, scaled
    by ``1.5 / sqrt(d)`` and read as spin couplings J at inverse temperature ``t = spin_beta``. For bits this means
    ``coupling = 2 t J`` and ``bias_i = t (b_i - sum of J over unit i's couplings)``, so that b = 0 gives fair bits.
    d is n1 or the graph's largest degree, the number of couplings of which a unit's field is the sum: so the size of
    fields does not depend on the size of the model. On a complete bipartite graph with n1 >= n2 both are the same.

    Args:
        in_features: F, number of features.
        num_left: n1, number of left units.
        num_right: n2, number of right units.
        graph: A :class:`gibbs_ext.ColoredGraph` of N nodes and E edges, in place of the two sides.
        coupling: ``"per_sample"`` computes every coupling from the features, as the paper does (n1 * n2 or E outputs);
            ``"shared"`` learns couplings for all data points together; ``"low_rank"`` has ``J ~ U diag(s(x)) V^T`` with
            s from the features (on a graph U = V, [N, rank], and only the entries at the edges count); ``"none"`` has
            no couplings, so that q is factorial: the control that shows what couplings are worth.
        rank: Length of s, for ``"low_rank"``.
        coupling_init: Start value, at least 0, of the batch normalisation's scale, the standard deviation of the raw
            couplings of ``"per_sample"`` (of s, of ``"low_rank"``); a shared coupling starts at N(0, 0.01^2) in any
            case. The paper starts at 1: with 100 + 100 units that is a spin glass, in which chains do not mix.
        spin_beta: t, the inverse temperature of the spin couplings.
        num_sweeps: Number of binary sweeps from the chain's state, without gradient.
        num_relaxed_sweeps: Number r of relaxed sweeps that follow, with gradient. It is the gradient of ``E_q[f] -
            E_q[K^r f]`` with the sweep's kernel K held fixed: close to that of E_q[f] for weak couplings, far from it
            for strong ones, where more sweeps add noise; see :func:`gibbs_ext.bipartite_gibbs_relaxed`.
        relaxation: Name of the relaxation; see :func:`gibbs_ext.bipartite_gibbs_relaxed`.
        sharpness: Sharpness of the relaxation, positive and finite.
        slope_gradient: Whether the relaxation ``"pwl"`` lets gradient through its slope.
        dataset_size: Number of data points for which persistent chains are kept; None for none.
        chains_per_point: Number of samples per data point.

    Attributes:
        chains: :class:`gibbs_ext.PersistentChains` of the data points, or None without ``dataset_size``.

    ``state_dict`` also holds the edges of a graph: a state of the same edges in another order loads, a state of other
    edges is an error.
    """

    def __init__(
        self,
        in_features: int,
        num_left: int | None = None,
        num_right: int | None = None,
        *,
        graph: ColoredGraph | None = None,
        coupling: str = "per_sample",
        rank: int = 16,
        coupling_init: float = 0.1,
        spin_beta: float = 2.0,
        num_sweeps: int = 10,
        num_relaxed_sweeps: int = 1,
        relaxation: str = "pwl",
        sharpness: float = 4.0,
        slope_gradient: bool = True,
        dataset_size: int | None = None,
        chains_per_point: int = 1,
    ) -> None:
        name = "BoltzmannPosterior"
        check_integers(name, 1, in_features=in_features, rank=rank)
        structure = structure_of(name, num_left, num_right, graph)
        self.coupling_shape = shape = structure.coupling_shape
        super().__init__(structure)
        check_integers(name, 0, num_sweeps=num_sweeps)
        check_integers(name, 1, num_relaxed_sweeps=num_relaxed_sweeps, chains_per_point=chains_per_point)
        if dataset_size is not None:
            check_integers(name, 1, dataset_size=dataset_size)
        _, sharpness = as_relaxation(name, relaxation, sharpness)
        if not 0 < sharpness <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name}: sharpness must be positive and finite, got {sharpness}")
        outputs = {"per_sample": math.prod(shape), "shared": 0, "low_rank": rank, "none": 0}
        if coupling not in outputs:
            raise ValueError(f"{name}: coupling must be one of {', '.join(outputs)}, got {shown(coupling)}")
        if not 0 <= coupling_init <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name}: coupling_init must be finite and at least 0, got {coupling_init}")
        self.num_left, self.num_right = num_left, num_right
        self.coupling = coupling
        self.spin_beta = spin_beta
        self.num_sweeps, self.num_relaxed_sweeps = num_sweeps, num_relaxed_sweeps
        self.relaxation, self.sharpness, self.slope_gradient = relaxation, sharpness, slope_gradient
        self.chains_per_point = chains_per_point
        # With low rank the head has no output for each edge.
        if coupling != "low_rank":
            of_norm = (f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
            self._along_edges = ("raw_coupling", "head.weight", *of_norm)
        self.bias = nn.Linear(in_features, sum(structure.sizes))
        self.raw_coupling: Tensor | None = None
        if outputs[coupling]:
            # Batch normalisation subtracts the mean, and with it any bias.
            self.head = nn.Linear(in_features, outputs[coupling], bias=False)
            self.norm = nn.BatchNorm1d(outputs[coupling], eps=1e-2, momentum=0.01)
            nn.init.constant_(self.norm.weight, coupling_init)
        elif coupling == "none":
            del self.raw_coupling
            self.register_buffer("raw_coupling", torch.zeros(shape), persistent=False)
        else:  # also per_sample on a graph without edges
            self.raw_coupling = nn.Parameter(0.01 * torch.randn(shape))
        self._factors: tuple[str, ...] = ()
        if coupling == "low_rank":
            factors = structure.new_factors(rank)
            for factor, value in factors.items():
                self.register_parameter(factor, nn.Parameter(value))
            self._factors = tuple(factors)
        self.chains: PersistentChains | None = None
        if dataset_size is not None:
            shape_only = [*(torch.zeros(size) for size in structure.sizes), torch.zeros(()).expand(shape)]
            self.chains = PersistentChains(chains_per_point, structure.model(shape_only), dataset_size)

    def parameters_of(self, features: Tensor) -> tuple[Tensor, ...]:
        """The posterior's parameters.

        Args:
            features: [B, F], of the dtype of this module's parameters. In training mode, B = 1 is an error where
                couplings are computed from the features, because they are normalised over the batch.

        Returns:
            left_bias [B, n1], right_bias [B, n2] and weight [B, n1, n2] ([n1, n2] for a shared or no coupling); or, on
            a graph, bias [B, N] and coupling [B, E] ([E]). All carry gradient. In training mode, the moving averages of
            the batch normalisation are updated.

        Raises:
            TypeError, ValueError, RuntimeError: The features are no tensor, or their shape or dtype does not fit. The
                message is PyTorch's.
        """
        t, structure = self.spin_beta, self.structure
        bias = t * self.bias(features)
        scale = 2 * t * 1.5 / math.sqrt(structure.num_summed)
        if self.raw_coupling is not None:
            coupling = scale * self.raw_coupling
        else:
            # As the weight and the bias of the normalisation are scaled, no pass over the couplings scales them.
            scaled = {"weight": scale * self.norm.weight, "bias": scale * self.norm.bias}
            strength = torch.func.functional_call(self.norm, scaled, self.head(features))
            if self.coupling == "per_sample":
                coupling = strength.unflatten(-1, self.coupling_shape)
            else:
                coupling = structure.low_rank({name: getattr(self, name) for name in self._factors}, strength)
        # t sum_j J_ij is half of the sum of a unit's couplings.
        return structure.centered(bias, coupling)

    def distribution(self, features: Tensor) -> BipartiteBoltzmann | GraphBoltzmann:
        """The posteriors of the data points as a distribution.

        Args:
            features: [B, F], as in :meth:`parameters_of`.

        Returns:
            A model of batch shape [B], which does not check values. Gradient flows into the features and this module's
            parameters. In training mode, the moving averages of the batch normalisation are updated.

        Raises:
            TypeError, ValueError, RuntimeError: As in :meth:`parameters_of`.
        """
        return self.structure.model(self.parameters_of(features))

    def forward(
        self,
        features: Tensor,
        index: Tensor | None = None,
        *,
        chain_offset: int | Tensor = 0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> BoltzmannSample:
        """A relaxed sample of each posterior, differentiable in the features and in this module's parameters.

        Args:
            features: [B, F], as in :meth:`parameters_of`.
            index: [B] int64 numbers of these data points. Sweeps start from their persistent chains, which in training
                mode are replaced by the binary state before the relaxed sweeps (mutates ``chains``). If None, sweeps
                start from uniform bits.
            chain_offset: Number of the first chain, or numbers [chains_per_point, B], as in
                :func:`gibbs_ext.bipartite_gibbs`. Processes that share a ``seed`` and each have a part of a batch draw
                the samples that one process draws for the whole batch if the numbers are the chains' places in it:
                chain c of the batch's point b has the number ``c * batch_size + b``. (With one chain per point the
                offset is the place of the first point.)
            generator: Supplies the seed.
            seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

        Returns:
            :class:`BoltzmannSample`; ``model.energy(z_mean)`` is the energy with the units updated last integrated out.

        Raises:
            TypeError: ``index`` is no tensor, or ``chain_offset``, ``generator`` or ``seed`` has a wrong type.
            ValueError: ``index`` is given without ``dataset_size`` or is not [B]; ``chain_offset`` does not fit; both
                ``generator`` and ``seed`` are given; or features have made a parameter that is not finite. The messages
                begin with ``BoltzmannPosterior:``; those on the dtype and the range of ``index`` begin with
                ``PersistentChains:``.

            Features that do not fit raise the errors of :meth:`parameters_of`.
        """
        model = self.distribution(features)
        num_sweeps, num_relaxed_sweeps = self.num_sweeps, self.num_relaxed_sweeps
        beta: float | Tensor = 1.0
        if index is None:
            # A first sweep at beta = 0 makes uniform bits.
            num_sweeps += 1
            beta = (torch.arange(num_sweeps + num_relaxed_sweeps, device=features.device) > 0).double()
            start = features.new_zeros(()).expand(self.chains_per_point, len(features), model._num_state_units)
        elif self.chains is None:
            raise ValueError("BoltzmannPosterior: index needs a posterior built with dataset_size")
        else:
            check_tensors("BoltzmannPosterior", index=index)
            if index.shape != features.shape[:1]:
                wanted = f"index must have shape {list(features.shape[:1])}, one for each row of features"
                raise ValueError(f"BoltzmannPosterior: {wanted}, got {list(index.shape)}")
            start = self.chains.state(index)
        with reported_as("BoltzmannPosterior", left="index", state="index"):
            z, mean, state = model._sweep_relaxed(
                start, num_sweeps, num_relaxed_sweeps, relaxation=self.relaxation, sharpness=self.sharpness,
                slope_gradient=self.slope_gradient, beta=beta, chain_offset=chain_offset, generator=generator,
                seed=seed,
            )  # fmt: skip
        if self.chains is not None and index is not None and self.training:
            self.chains._store(state, index)
        chains = 0 if self.chains_per_point == 1 else slice(None)
        return BoltzmannSample(z[chains], model._with_mean(z, mean)[chains], model)
