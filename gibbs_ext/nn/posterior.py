# SPDX-License-Identifier: Apache-2.0
"""A Boltzmann machine whose parameters a network computes: one model per data point."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gibbs_ext.arguments import as_relaxation
from gibbs_ext.chains import PersistentChains
from gibbs_ext.checks import check_integers, check_tensors, reported_as, shown
from gibbs_ext.distributions import BipartiteBoltzmann, GraphBoltzmann
from gibbs_ext.functional import bipartite_gibbs_relaxed, graph_fields, graph_gibbs_relaxed
from gibbs_ext.graphs import ColoredGraph
from gibbs_ext.nn.structure import MachineModule, boltzmann, coupling_shape


class BoltzmannSample(NamedTuple):
    """A relaxed sample of B bipartite posteriors; with chains_per_point > 1 the tensors have that dim in front."""

    left: Tensor  # [B, n1] in [0, 1]
    right: Tensor  # [B, n2] in [0, 1]
    left_mean: Tensor  # [B, n1]: the conditional mean of left given right, for what is linear in left
    model: BipartiteBoltzmann  # batch shape [B]

    @property
    def z(self) -> Tensor:
        """Both sides, [B, n1 + n2]."""
        return torch.cat((self.left, self.right), -1)

    @property
    def z_mean(self) -> Tensor:
        """:attr:`z` with left replaced by its conditional mean."""
        return torch.cat((self.left_mean, self.right), -1)


class GraphSample(NamedTuple):
    """A relaxed sample of B posteriors on a graph; with chains_per_point > 1 the tensors have that dim in front."""

    z: Tensor  # [B, N] in [0, 1]
    z_mean: Tensor  # [B, N]: z, units of the last colour replaced by their conditional mean, for what is linear in them
    model: GraphBoltzmann  # batch shape [B]


class BoltzmannPosterior(MachineModule):
    """``q(z | x)``, an undirected approximate posterior (Vahdat, Andriyash, Macready, ICML 2020).

    It is bipartite, z = (left, right), with ``num_left`` and ``num_right``; or on a coloured graph, with ``graph``.

    A linear layer maps features of x to raw biases b and raw couplings. The latter are batch-normalised, scaled by
    ``1.5 / sqrt(d)`` and read as spin couplings J at inverse temperature ``t = spin_beta``; in bits that is
    ``coupling = 2 t J`` and ``bias_i = t (b_i - sum of J over unit i's couplings)``, so that b = 0 gives fair bits.
    d = n1, or the graph's largest degree: of how many couplings a unit's field is the sum. So its size does not depend
    on the model's, and both are the same on a complete bipartite graph with n1 >= n2.

    Args:
        in_features: F.
        num_left: n1.
        num_right: n2.
        graph: A :class:`gibbs_ext.ColoredGraph` of N nodes and E edges, in place of the two sides.
        coupling: ``"per_sample"``, every coupling from the features (the paper's; n1 * n2 or E outputs); ``"shared"``,
            couplings learnt for all data points together; ``"low_rank"``, ``J ~ U diag(s(x)) V^T`` with s from the
            features (on a graph U = V, [N, rank], of which the entries at the edges count).
        rank: Length of s, for ``"low_rank"``.
        spin_beta: t.
        num_sweeps: Binary sweeps a sample makes from where its chain stands, without gradient.
        num_relaxed_sweeps: Relaxed sweeps that follow, with gradient.
        relaxation: See :func:`gibbs_ext.bipartite_gibbs_relaxed`, :func:`gibbs_ext.graph_gibbs_relaxed`.
        sharpness: Of the relaxation.
        slope_gradient: Of the relaxation.
        dataset_size: Keep persistent chains for that many data points.
        chains_per_point: Samples per data point.

    Attributes:
        chains: :class:`gibbs_ext.PersistentChains` of the data points, or None without ``dataset_size``.

    ``state_dict`` also holds the edges of a graph: a state of the same ones in another order loads, that of other edges
    is an error.
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
        shape = coupling_shape(name, num_left, num_right, graph)
        super().__init__(graph)
        check_integers(name, 0, num_sweeps=num_sweeps)
        check_integers(name, 1, num_relaxed_sweeps=num_relaxed_sweeps, chains_per_point=chains_per_point)
        if dataset_size is not None:
            check_integers(name, 1, dataset_size=dataset_size)
        _, sharpness = as_relaxation(name, relaxation, sharpness)
        if not 0 < sharpness <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name}: sharpness must be positive and finite, got {sharpness}")
        outputs = {"per_sample": math.prod(shape), "shared": 0, "low_rank": rank}
        if coupling not in outputs:
            raise ValueError(f"{name}: coupling must be one of {', '.join(outputs)}, got {shown(coupling)}")
        self.coupling_shape = shape
        self.num_left, self.num_right = num_left, num_right
        self.coupling = coupling
        self.spin_beta = spin_beta
        self.num_sweeps, self.num_relaxed_sweeps = num_sweeps, num_relaxed_sweeps
        self.relaxation, self.sharpness, self.slope_gradient = relaxation, sharpness, slope_gradient
        self.chains_per_point = chains_per_point
        # Low rank: the head has no output for each edge.
        if coupling != "low_rank":
            of_norm = (f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var"))
            self._along_edges = ("raw_coupling", "head.weight", *of_norm)
        # Of the units: those of each side, or all.
        sizes = shape if graph is None else (graph.num_nodes,)
        self.bias = nn.Linear(in_features, sum(sizes))
        self.raw_coupling: nn.Parameter | None = None
        if outputs[coupling]:
            # Batch normalisation subtracts the mean, and with it any bias.
            self.head = nn.Linear(in_features, outputs[coupling], bias=False)
            self.norm = nn.BatchNorm1d(outputs[coupling], eps=1e-2, momentum=0.01)
        else:  # also per_sample on a graph without edges
            self.raw_coupling = nn.Parameter(0.01 * torch.randn(shape))
        if coupling == "low_rank":
            # Unit variance of U diag(s) V^T for s of unit variance, as per_sample has it.
            if graph is None:
                self.left_factor = nn.Parameter(torch.randn(shape[0], rank) / math.sqrt(rank))
                self.right_factor = nn.Parameter(torch.randn(shape[1], rank))
            else:
                self.factor = nn.Parameter(torch.randn(graph.num_nodes, rank) / rank**0.25)
        self.chains: PersistentChains | None = None
        if dataset_size is not None:
            shape_only = [*(torch.zeros(size) for size in sizes), torch.zeros(()).expand(shape)]
            self.chains = PersistentChains(chains_per_point, boltzmann(graph, shape_only), dataset_size)

    def parameters_of(self, features: Tensor) -> tuple[Tensor, ...]:
        """The posterior's parameters.

        Args:
            features: [B, F].

        Returns:
            left_bias [B, n1], right_bias [B, n2] and weight [B, n1, n2] ([n1, n2] for a shared coupling); or, on a
            graph, bias [B, N] and coupling [B, E] ([E]). All with gradient. In training mode, updates the moving
            averages of the batch normalisation.
        """
        t, graph = self.spin_beta, self.graph
        bias = t * self.bias(features)
        scale = 2 * t * 1.5 / math.sqrt(self.coupling_shape[0] if graph is None else max(1, graph.max_degree))
        if self.raw_coupling is not None:
            coupling = scale * self.raw_coupling
        else:
            strength = scale * self.norm(self.head(features))
            if self.coupling == "per_sample":
                coupling = strength.unflatten(-1, self.coupling_shape)
            elif graph is None:
                coupling = (self.left_factor * strength.unsqueeze(-2)) @ self.right_factor.mT
            else:
                u, v = graph.edges_on(strength.device).unbind(-1)
                coupling = strength @ (self.factor[u] * self.factor[v]).mT
        # t sum_j J_ij is half of the sum of a unit's couplings.
        if graph is not None:
            # Under autocast their dtypes may differ.
            dtype = torch.promote_types(bias.dtype, coupling.dtype)
            coupling = coupling.to(dtype)
            # Fields of units that are all 1: sums whose order is fixed on a GPU, too.
            ones, zeros = (coupling.new_full((), value).expand(graph.num_nodes) for value in (1, 0))
            sums = graph_fields(ones, zeros, coupling, graph).to(dtype)
            return bias.to(dtype) - sums / 2, coupling
        left, right = bias.split(self.coupling_shape, dim=-1)
        return left - coupling.sum(-1) / 2, right - coupling.sum(-2) / 2, coupling

    def distribution(self, features: Tensor) -> BipartiteBoltzmann | GraphBoltzmann:
        """The posteriors of features [B, F] as a distribution of batch shape [B]."""
        return boltzmann(self.graph, self.parameters_of(features))

    def forward(
        self,
        features: Tensor,
        index: Tensor | None = None,
        *,
        chain_offset: int | Tensor = 0,
        generator: torch.Generator | None = None,
        seed: int | Tensor | None = None,
    ) -> BoltzmannSample | GraphSample:
        """A relaxed sample of each posterior, differentiable in the features and in this module's parameters.

        Args:
            features: [B, F].
            index: [B] int64, which data points these are: their persistent chains start the sweeps and, in training
                mode, are replaced by the binary state before the relaxed sweeps (mutates ``chains``). Without index
                the chains start from uniform bits.
            chain_offset: Number of the first chain, or numbers [chains_per_point, B], as in
                :func:`gibbs_ext.bipartite_gibbs`. Processes that each have a part of a batch and one ``seed`` draw what
                one process draws for the whole batch if these are the chains' places in it: chain c of its point b
                has the number ``c * batch_size + b``. (With one chain per point that is the number of the first point.)
            generator: Supplies the seed.
            seed: A 64-bit integer or a 0-dim int64 tensor, instead of a generator.

        Returns:
            :class:`BoltzmannSample`, or :class:`GraphSample` on a graph. Both have ``z``, ``z_mean`` and ``model``, so
            that ``model.energy(z_mean)`` is the energy with the units updated last integrated out.
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
        options: dict[str, Any] = {
            "relaxation": self.relaxation, "sharpness": self.sharpness, "slope_gradient": self.slope_gradient,
            "beta": beta, "chain_offset": chain_offset, "generator": generator, "seed": seed, "return_state": True,
        }  # fmt: skip
        if isinstance(model, BipartiteBoltzmann):
            with reported_as("BoltzmannPosterior", left="index"):
                left, right, left_mean, state = bipartite_gibbs_relaxed(
                    start, model.left_bias, model.right_bias, model.weight, num_sweeps, num_relaxed_sweeps, **options
                )
        else:
            with reported_as("BoltzmannPosterior", state="index"):
                z, mean, state = graph_gibbs_relaxed(
                    start, model.bias, model.coupling, model.graph, num_sweeps, num_relaxed_sweeps, **options
                )
            last = model.graph.units_of_color(-1, z.device)
            z_mean = z.index_copy(-1, last, mean.index_select(-1, last))
        if self.chains is not None and index is not None and self.training:
            self.chains._store(state, index)
        chains = 0 if self.chains_per_point == 1 else slice(None)
        if isinstance(model, BipartiteBoltzmann):
            return BoltzmannSample(left[chains], right[chains], left_mean[chains], model)
        return GraphSample(z[chains], z_mean[chains], model)
