# SPDX-License-Identifier: Apache-2.0
"""A Boltzmann machine with parameters of its own."""

import torch
from torch import Tensor, nn

from gibbs_ext.chains import PersistentChains
from gibbs_ext.checks import check_integers
from gibbs_ext.distributions import BipartiteBoltzmann


class BoltzmannPrior(nn.Module):
    """``p(left, right)``: a bipartite Boltzmann machine trained by persistent contrastive divergence.

    Args:
        num_left: n1.
        num_right: n2.
        num_chains: Persistent chains that supply the gradient of log Z.
        num_sweeps: Sweeps they make per :meth:`log_partition_surrogate`.

    Attributes:
        left_bias: Parameter [n1], initially 0.
        right_bias: Parameter [n2], initially 0.
        weight: Parameter [n1, n2], initially N(0, 0.01^2), which breaks the symmetry between units.
        chains: :class:`gibbs_ext.PersistentChains`, part of ``state_dict``.
    """

    def __init__(self, num_left: int, num_right: int, *, num_chains: int = 1000, num_sweeps: int = 20) -> None:
        super().__init__()
        check_integers(
            "BoltzmannPrior", 1, num_left=num_left, num_right=num_right, num_chains=num_chains, num_sweeps=num_sweeps
        )
        self.num_sweeps = num_sweeps
        self.left_bias = nn.Parameter(torch.zeros(num_left))
        self.right_bias = nn.Parameter(torch.zeros(num_right))
        self.weight = nn.Parameter(0.01 * torch.randn(num_left, num_right))
        self.chains = PersistentChains(num_chains, self.distribution())

    def distribution(self) -> BipartiteBoltzmann:
        """The model of the current parameters; gradient flows into them."""
        return BipartiteBoltzmann(self.left_bias, self.right_bias, self.weight, validate_args=False)

    def energy(self, left: Tensor, right: Tensor) -> Tensor:
        """Energies [...] of left [..., n1] and right [..., n2], bits or relaxed. Differentiable in all."""
        return self.distribution().energy_of(left, right)

    def log_partition_surrogate(self) -> Tensor:
        """A scalar whose gradient estimates that of log Z; its value means nothing.

        ``mean_chains(-free_energy(left))``: minus the mean of d energy, right integrated out. Mutates ``chains``, which
        make ``num_sweeps`` sweeps first. The seed comes from torch's default generator.
        """
        model = self.distribution()
        left, _ = self.chains.advance_(model, self.num_sweeps)
        return -model.free_energy(left).mean()
