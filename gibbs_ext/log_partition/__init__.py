# SPDX-License-Identifier: Apache-2.0
"""log Z of Boltzmann machines: estimated by annealing, or exact by enumeration or elimination."""
