// SPDX-License-Identifier: Apache-2.0
#include "cuda/graph_fields.h"

#include "cuda/graph_fields_kernel.cuh"

namespace gibbs {

namespace {

LaunchShape one_thread_each(int64_t count) { return shape_for(count, kFieldsThreads, kFieldsThreads); }

}  // namespace

void launch_graph_fields(const GraphFieldsParams& p, Stream stream) {
  const LaunchShape shape = one_thread_each(num_rows(p.sweep.batch) * p.num_nodes);
  launch(p.is_double ? registered<graph_fields_kernel<double>> : registered<graph_fields_kernel<float>>, shape, stream, p);
}

void launch_graph_edge_sums(const GraphEdgeSumsParams& p, Stream stream) {
  launch(p.is_double ? registered<graph_edge_sums_kernel<double>> : registered<graph_edge_sums_kernel<float>>,
         one_thread_each(p.sweep.batch.num_models * p.num_nodes), stream, p);
}

}  // namespace gibbs
