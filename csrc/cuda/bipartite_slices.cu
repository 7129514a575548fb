// SPDX-License-Identifier: Apache-2.0
// Launches that come before and after binary sweeps of bipartite models.
#include <algorithm>

#include "cuda/bipartite_slices_kernel.cuh"

namespace gibbs {

namespace {

bool has_shared_biases(const BipartiteParams& p) {
  const BatchView& batch = p.sweep.batch;
  return is_shared_row(p.left_bias, batch) && is_shared_row(p.right_bias, batch) &&
         (!p.log_weights || (is_shared_row(p.base_left_bias, batch) && is_shared_row(p.base_right_bias, batch)));
}

template <int kSlices>
const Kernel<BipartiteSliceParams>& slice_kernel(bool is_double) {
  return is_double ? registered<bipartite_slice_kernel<double, kSlices>> : registered<bipartite_slice_kernel<float, kSlices>>;
}

// Of the workspace that launch_scale() needs.
int64_t scale_numbers(const BipartiteParams& p, const ScalePlan& plan) {
  return plan.parts == 1 && plan.columns_in_shared ? 0 : p.sweep.batch.num_models * plan.parts * (kScaleHead + scale_columns(p));
}

// Finds the models' scales, reports their faults, and writes them to params.scales or, as resolutions, to params.out, if these are not null.
template <class T>
void launch_scale(BipartiteScaleParams params, Stream stream) {
  const ScalePlan& plan = params.plan;
  const int64_t columns = plan.columns_in_shared ? shared_bytes<uint32_t>(scale_columns(params.call)) : 0;
  const LaunchShape shape = {params.call.sweep.batch.num_models, kScaleThreads, shared_bytes<uint32_t>(kScaleHead) + columns};
  if (plan.parts > 1) {
    LaunchShape of_parts = shape;
    of_parts.num_ctas *= plan.parts;
    for (const ScaleStep step : {ScaleStep::kLargest, ScaleStep::kSums}) {
      params.step = step;
      launch(registered<bipartite_part_kernel<T>>, of_parts, stream, params);
    }
    params.step = ScaleStep::kConclusion;
  }
  launch(registered<bipartite_scale_kernel<T>>, shape, stream, params);
}
void launch_scale(const BipartiteScaleParams& params, Stream stream) {
  params.call.is_double ? launch_scale<double>(params, stream) : launch_scale<float>(params, stream);
}

}  // namespace

// A model with many couplings has several CTAs if models alone leave most of the device idle.
ScalePlan plan_bipartite_scale(const BipartiteParams& p, const DeviceLimits& limits) {
  constexpr int64_t kCouplingsOfPart = 1 << 13;
  const int64_t models = p.sweep.batch.num_models, rows = p.n1 * p.n2 / std::max<int64_t>(scale_columns(p), 1),
                parts = std::min({p.n1 * p.n2 / kCouplingsOfPart, limits.num_sms / std::max<int64_t>(models, 1), rows});
  const bool fits = shared_bytes<uint32_t>(kScaleHead) + shared_bytes<uint32_t>(scale_columns(p)) <= limits.shared_memory_per_cta;
  return {parts > 2 ? int(parts) : 1, fits};  // three launches must be worth it
}

BipartitePacked::BipartitePacked(const BipartiteParams& p, const ScalePlan& plan, Workspace& workspace) {
  const BatchView& batch = p.sweep.batch;
  bias_per_chain = !has_shared_biases(p);
  num_slices = p.log_weights ? kMaxSlices : 2;
  const auto offset = int32_t(p.n1 % 4);
  BipartiteSide &left = sides[0] = {}, &right = sides[1] = {};
  left.n = int32_t(p.n1), left.words = int32_t(state_words(p.n1));
  right.n = int32_t(p.n2), right.words = int32_t(state_words(p.n2 + offset));
  right.offset = offset, right.first_number = uint32_t(p.n1 - offset);
  const int64_t blocks = int64_t{left.words} * right.words;
  left.blocks_at = blocks;  // right is updated first
  num_blocks = 2 * blocks;
  scales = workspace.take<ModelScale>(batch.num_models);
  slices = workspace.take<LeftFragment>(batch.num_models * num_blocks * block_fragments(num_slices));
  numbers = workspace.take<uint64_t>(num_rows(batch));
  scale_parts = workspace.take<uint32_t>(scale_numbers(p, plan));
  for (BipartiteSide& side : sides) {
    const bool is_left = &side == sides;
    const int64_t rows = num_rows(batch), biases = (bias_per_chain ? rows : batch.num_models) * side.words * kWarpSize;
    side.bits = workspace.take<uint32_t>(rows * side.words);
    side.clamps = (is_left ? p.clamp_left : p.clamp_right).data ? workspace.take<uint32_t>(rows * side.words) : nullptr;
    side.bias = workspace.take<float>(biases);
    side.base_bias = p.log_weights ? workspace.take<float>(biases) : nullptr;
    side.field_errors = workspace.take<FieldError>(batch.num_models * side.words * kWarpSize);
  }
}

void launch_bipartite_pack(const BipartiteParams& p, const ScalePlan& scale, const BipartitePacked& packed, Stream stream) {
  const BatchView& batch = p.sweep.batch;
  const BipartiteSide &left = packed.sides[0], &right = packed.sides[1];
  launch_scale({p, scale, ScaleStep::kAll, packed.scales, packed.scale_parts, nullptr}, stream);

  const LaunchShape slices = {batch.num_models * (left.words + right.words), kSliceThreads, shared_bytes<uint32_t>(2 * kWarpSize)};
  launch(packed.num_slices == kMaxSlices ? slice_kernel<kMaxSlices>(p.is_double) : slice_kernel<2>(p.is_double), slices, stream,
         BipartiteSliceParams{p.weight, batch, packed});

  PackParams pack = {};
  pack.sweep = p.sweep;
  pack.is_double = p.is_double;
  pack.scales = packed.scales;
  pack.degree = std::max(p.n1, p.n2);
  pack.numbers = packed.numbers;
  const auto add_bits = [&](const StateView& from, const BipartiteSide& side, uint32_t* to, Outcome fault) {
    if (to) pack.bits[pack.num_bits++] = {from, side.n, side.offset, to, fault};
  };
  add_bits(p.left, left, left.bits, Outcome::kLeftNotBits);
  add_bits(p.right, right, right.bits, Outcome::kRightNotBits);
  add_bits(p.clamp_left, left, left.clamps, Outcome::kLeftNotBits);
  add_bits(p.clamp_right, right, right.clamps, Outcome::kRightNotBits);
  const auto add_biases = [&](const ParameterView& bias, const ParameterView& base, const BipartiteSide& side, Outcome fault,
                              Outcome base_fault) {
    pack.biases[pack.num_biases++] = {
        bias,      base,           side.n, side.offset, side.words * kWarpSize, !packed.bias_per_chain, nullptr,
        side.bias, side.base_bias, fault,  base_fault};
  };
  add_biases(p.left_bias, p.base_left_bias, left, Outcome::kNonFiniteLeftBias, Outcome::kNonFiniteBaseLeftBias);
  add_biases(p.right_bias, p.base_right_bias, right, Outcome::kNonFiniteRightBias, Outcome::kNonFiniteBaseRightBias);
  launch_pack(pack, stream);
}

void launch_bipartite_unpack(const BipartiteParams& p, const BipartitePacked& packed, Stream stream) {
  const BipartiteSide &left = packed.sides[0], &right = packed.sides[1];
  UnpackParams unpack = {};
  unpack.batch = p.sweep.batch;
  unpack.bits[unpack.num_bits++] = {left.bits, left.n, left.offset, p.left_out};
  if (p.right_out.data) unpack.bits[unpack.num_bits++] = {right.bits, right.n, right.offset, p.right_out};
  launch_unpack(unpack, stream);
}

ResolutionPlan plan_coupling_resolution(const BipartiteParams& p, const DeviceLimits& limits) {
  const ScalePlan scale = plan_bipartite_scale(p, limits);
  return {scale, scale_numbers(p, scale) * int64_t(sizeof(uint32_t))};
}
void launch_coupling_resolution(const BipartiteParams& p, const ResolutionPlan& plan, double* out, Stream stream) {
  launch_scale({p, plan.scale, ScaleStep::kAll, nullptr, static_cast<uint32_t*>(p.workspace), out}, stream);
}

}  // namespace gibbs
