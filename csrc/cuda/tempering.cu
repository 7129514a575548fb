// SPDX-License-Identifier: Apache-2.0
#include "cuda/tempering.h"

#include "cuda/tempering_kernel.cuh"

namespace gibbs {

namespace {

LaunchShape one_warp_each(const BatchView& batch) { return shape_for(num_rows(batch), kEnergyWarps, kEnergyWarps * kWarpSize); }

}  // namespace

void launch_bipartite_energies(const BipartiteEnergyParams& p, Stream stream) {
  launch(registered<bipartite_energies_kernel>, one_warp_each(p.model.sweep.batch), stream, p);
}

void launch_graph_positions(const GraphEnergyParams& p, Stream stream) {
  launch(registered<graph_positions_kernel>, shape_for(p.model.num_nodes, kFieldsThreads, kFieldsThreads), stream, p);
}

void launch_graph_energies(const GraphEnergyParams& p, Stream stream) {
  launch(registered<graph_energies_kernel>, one_warp_each(p.model.sweep.batch), stream, p);
}

void launch_graph_clusters(const GraphClusterParams& p, Stream stream) {
  launch(registered<graph_clusters_kernel>, {num_rows(p.model.sweep.batch), kClusterThreads}, stream, p);
}

void launch_swaps(const SwapParams& p, Stream stream) {
  const int64_t pairs = p.tempering.num_betas / 2 + 1;  // with those of which one half is missing
  launch(registered<swaps_kernel>, {pairs * p.tempering.columns, kSwapThreads}, stream, p);
}

}  // namespace gibbs
