// SPDX-License-Identifier: Apache-2.0
// Plans and launches of relaxed sweeps of bipartite models, forward and backward.
#include <algorithm>

#include "cuda/bipartite.h"
#include "cuda/bipartite_relaxed_kernel.cuh"
#include "cuda/stages.h"

namespace gibbs {

namespace {

constexpr int kMaxChainsPerCta = 4 * kChainsAtATime;

int64_t ctas(const BatchView& batch, int chains) { return batch.num_models * ctas_per_model(batch, chains); }

// The number of chains of a CTA: more of them while there are more CTAs than multiprocessors, because four chains cost little more than one.
template <class Fits>
int choose_chains(const BatchView& batch, const DeviceLimits& limits, const Fits& fits) {
  int chains = 1;
  const auto next = [&] { return std::max(2 * chains, kChainsAtATime); };
  while (chains < std::min<int64_t>(kMaxChainsPerCta, batch.chains_per_model) && ctas(batch, chains) > limits.num_sms &&
         fits(next()))
    chains = next();
  return int(std::min<int64_t>(chains, batch.chains_per_model));
}

}  // namespace

BipartiteRelaxedPlan plan_bipartite_relaxed(const BipartiteParams& p, const DeviceLimits& limits) {
  BipartiteRelaxedPlan plan = {};
  const auto bytes = [&](int chains) {
    return p.is_double ? RelaxedLayout<double>(p, chains, plan.is_resident, plan.values_in_shared).bytes()
                       : RelaxedLayout<float>(p, chains, plan.is_resident, plan.values_in_shared).bytes();
  };
  const auto fits = [&](int chains) { return bytes(chains) <= limits.shared_memory_per_cta; };
  plan.is_resident = plan.values_in_shared = true;
  if (!fits(1)) plan.is_resident = false;
  if (!fits(1)) plan.values_in_shared = false;
  plan.chains_per_cta = choose_chains(p.sweep.batch, limits, fits);
  plan.shape = {ctas(p.sweep.batch, plan.chains_per_cta), kRelaxedThreads, bytes(plan.chains_per_cta)};
  if (p.sweep.num_sweeps) plan.binary = plan_bipartite(p, limits);
  // Without binary sweeps the couplings' scale is found all the same, for its faults.
  if (!p.sweep.num_sweeps) plan.resolution = plan_coupling_resolution(p, limits);
  plan.workspace = std::max(plan.binary.workspace, plan.resolution.workspace);
  return plan;
}

template <class T, int kChains>
static void launch_relaxed(const BipartiteParams& p, const BipartiteRelaxedPlan& plan, Stream stream) {
  launch(plan.is_resident ? registered<bipartite_relaxed_kernel<T, kChains, true>>
                          : registered<bipartite_relaxed_kernel<T, kChains, false>>,
         plan.shape, stream, BipartiteRelaxedParams{p, plan.chains_per_cta, plan.values_in_shared});
}
void launch_bipartite_relaxed(const BipartiteParams& p, const BipartiteRelaxedPlan& plan, Stream stream) {
  if (p.sweep.num_sweeps)
    launch_bipartite(p, plan.binary, stream);
  else
    launch_coupling_resolution(p, plan.resolution, nullptr, stream);
  p.is_double                                         ? launch_relaxed<double, 1>(p, plan, stream)
  : chains_at_a_time<float>(plan.chains_per_cta) == 1 ? launch_relaxed<float, 1>(p, plan, stream)
                                                      : launch_relaxed<float, kChainsAtATime>(p, plan, stream);
}

// Of the factors of outer products, in the workspace.
template <class T>
static int64_t factors_bytes(const BipartiteBackwardParams& p) {
  return num_rows(p.sweep.batch) * 2 * p.sweep.num_relaxed_sweeps * (p.n1 + p.n2) * int64_t(sizeof(T));
}

template <class T>
static BipartiteBackwardPlan plan_backward(const BipartiteBackwardParams& p, const DeviceLimits& limits) {
  const BatchView& batch = p.sweep.batch;
  const auto fits = [&](int chains, bool is_resident, bool sums_outer) {
    return BackwardLayout<T>(p, chains, is_resident, sums_outer).bytes() <= limits.shared_memory_per_cta;
  };
  BipartiteBackwardPlan plan = {};
  // One launch is enough if a CTA can take all chains of a model and more CTAs would use no other multiprocessor.
  const int64_t all = batch.chains_per_model;
  const bool few = all <= kMaxChainsPerCta && (all == 1 || batch.num_models >= limits.num_sms);
  plan.weight_in_shared = fits(1, true, false);
  const bool sums_outer = few && fits(int(all), plan.weight_in_shared, true);
  plan.chains_per_cta =
      sums_outer ? int(all) : choose_chains(batch, limits, [&](int chains) { return fits(chains, plan.weight_in_shared, false); });
  plan.shape = {ctas(batch, plan.chains_per_cta), kRelaxedThreads,
                BackwardLayout<T>(p, plan.chains_per_cta, plan.weight_in_shared, sums_outer).bytes()};
  if (sums_outer) return plan;
  const auto tiles = [](int64_t n) { return divide_up(n, kOuterTile); };
  // Few tiles with many factors are shared out, as far as no multiprocessor is idle and parts are worth a launch.
  constexpr int64_t kFactorsOfPart = 8 * kOuterFactors;
  const int64_t owners = batch.num_models * tiles(p.n1) * tiles(p.n2), factors = all * 2 * p.sweep.num_relaxed_sweeps,
                weights = batch.num_models * p.n1 * p.n2 * int64_t(sizeof(T));
  plan.outer_parts = int(std::max<int64_t>(1, std::min({2 * limits.num_sms / owners, factors / kFactorsOfPart,
                                                        PartialSums::kMaxBytes / std::max<int64_t>(weights, 1)})));
  plan.outer = {owners * plan.outer_parts, kOuterThreads, 2 * shared_bytes<T>(kOuterFactors * kOuterTile)};
  plan.workspace = factors_bytes<T>(p) + (plan.outer_parts > 1 ? plan.outer_parts * weights : 0);
  return plan;
}
BipartiteBackwardPlan plan_bipartite_backward(const BipartiteBackwardParams& p, const DeviceLimits& limits) {
  return p.is_double ? plan_backward<double>(p, limits) : plan_backward<float>(p, limits);
}

template <class T, int kChains>
static void launch_backward(const BipartiteBackwardParams& p, const BipartiteBackwardPlan& plan, Stream stream) {
  launch(plan.weight_in_shared ? registered<bipartite_backward_kernel<T, kChains, true>>
                               : registered<bipartite_backward_kernel<T, kChains, false>>,
         plan.shape, stream, BipartiteBackwardKernelParams{p, plan.chains_per_cta, plan.outer.num_ctas == 0});
  if (!plan.outer.num_ctas) return;
  const bool is_shared = plan.outer_parts > 1;
  void* const sums = is_shared ? static_cast<unsigned char*>(p.workspace) + factors_bytes<T>(p) : p.grad_weight;
  launch(registered<outer_products_kernel<T>>, plan.outer, stream, {p, plan.outer_parts, sums});
  if (is_shared)
    launch_partial_sums({p.sweep.batch.num_models, plan.outer_parts, p.n1 * p.n2, sums, p.grad_weight}, p.is_double, stream);
}
void launch_bipartite_backward(const BipartiteBackwardParams& p, const BipartiteBackwardPlan& plan, Stream stream) {
  p.is_double                                         ? launch_backward<double, 1>(p, plan, stream)
  : chains_at_a_time<float>(plan.chains_per_cta) == 1 ? launch_backward<float, 1>(p, plan, stream)
                                                      : launch_backward<float, kChainsAtATime>(p, plan, stream);
}

}  // namespace gibbs
