// SPDX-License-Identifier: Apache-2.0
// Launches of the kernels that pack, unpack and sum.
#include "cuda/stages_kernel.cuh"

namespace gibbs {

void launch_pack(const PackParams& p, Stream stream) {
  const BatchView& batch = p.sweep.batch;
  int64_t warps = divide_up(num_rows(batch), kWarpSize);
  for (int i = 0; i < p.num_bits; ++i) warps += num_rows(batch) * parts_of_row(p.bits[i].offset + p.bits[i].n);
  for (int i = 0; i < p.num_biases; ++i) warps += rows_of(p.biases[i], batch) * parts_of_row(p.biases[i].n);
  launch(registered<pack_kernel>, shape_for(warps, kStageWarps, kStageThreads), stream, p);
}

void launch_unpack(const UnpackParams& p, Stream stream) {
  int64_t warps = 0;
  for (int i = 0; i < p.num_bits; ++i) warps += num_rows(p.batch) * parts_of_row(p.bits[i].offset + p.bits[i].n);
  launch(registered<unpack_kernel>, shape_for(warps, kStageWarps, kStageThreads), stream, p);
}

void launch_partial_sums(const PartialSums& p, bool is_double, Stream stream) {
  const LaunchShape shape = {p.num_models * divide_up(p.count, kWarpSize), kStageThreads,
                             is_double ? shared_bytes<double>(kStageThreads) : shared_bytes<float>(kStageThreads)};
  launch(is_double ? registered<partial_sum_kernel<double>> : registered<partial_sum_kernel<float>>, shape, stream, p);
}

}  // namespace gibbs
