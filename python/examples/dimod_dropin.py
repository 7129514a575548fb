# SPDX-License-Identifier: Apache-2.0
"""A program written for dwave-samplers, with one line changed: the import. Needs dimod."""

import dimod

# from dwave.samplers import SimulatedAnnealingSampler
from gibbs_ext.interop.dimod import BlockGibbsSampler as SimulatedAnnealingSampler

# A frustrated ring: each spin would rather differ from its neighbours and, half as much, from theirs.
n = 30
bqm = dimod.BinaryQuadraticModel({}, {(f"x{i}", f"x{(i + d) % n}"): 1 / d for i in range(n) for d in (1, 2)}, "SPIN")

sampler = SimulatedAnnealingSampler()
sampleset = sampler.sample(bqm, num_reads=100, num_sweeps=500, beta_range=(0.1, 5.0), seed=1)
lowest = sampleset.lowest()
print(f"lowest energy {lowest.first.energy:g}, {len(lowest)} reads of {len(sampleset)}")
