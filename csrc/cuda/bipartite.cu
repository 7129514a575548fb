// SPDX-License-Identifier: Apache-2.0
// Plans and launches of binary sweeps of bipartite models.
#include "cuda/bipartite.h"

#include <algorithm>
#include <cmath>

#include "cuda/bipartite_kernel.cuh"

namespace gibbs {

namespace {

using enum BipartiteRoute;

const Kernel<BipartiteBinaryParams>& kernel_of(const BipartiteParams& p, const BipartitePlan& plan) {
  if (p.log_weights)
    return plan.route == kAllGlobal ? registered<bipartite_kernel<true, 1, 0, false>>
                                    : registered<bipartite_kernel<true, 1, 0, true>>;
  if (plan.route == kAllGlobal) return registered<bipartite_kernel<false, 1, 0, false>>;
  if (plan.kept_sides == 2) return registered<bipartite_kernel<false, 1, 2, true>>;
  if (plan.kept_sides == 1) return registered<bipartite_kernel<false, 1, 1, true>>;
  return plan.tiles_per_warp == kMostTilesOfWarp ? registered<bipartite_kernel<false, kMostTilesOfWarp, 0, true>>
         : plan.tiles_per_warp == kBundle        ? registered<bipartite_kernel<false, kBundle, 0, true>>
         : plan.tiles_per_warp == 2              ? registered<bipartite_kernel<false, 2, 0, true>>
                                                 : registered<bipartite_kernel<false, 1, 0, true>>;
}

// Plans of a call, and what they cost: an estimate of a sweep's clocks on a recent device, from counts in bench/NOTES.md.
class Planner {
 public:
  Planner(const BipartiteParams& p, const DeviceLimits& limits)
      : p_(p), limits_(limits), scale_(plan_bipartite_scale(p, limits)), nowhere_(nullptr), packed_(p, scale_, nowhere_) {}

  // Takes plans if they are possible and cost least.
  void consider(BipartiteRoute route, int tiles, int cluster_size, int kept_sides = 0) {
    const bool takes_one = p_.log_weights || kept_sides || route == kAllGlobal;
    const int least = takes_one ? 1 : std::min(tiles, kBundle), most = takes_one ? 1 : std::min(tiles, kMostTilesOfWarp);
    for (int of_warp = least; of_warp <= most; of_warp *= 2) consider_plan(route, tiles, of_warp, cluster_size, kept_sides);
  }
  bool has_plan() const { return least_ < kInfinite; }

  BipartitePlan plan() {
    plan_.workspace = nowhere_.size() + plan_.shape.num_ctas * layout(plan_).device_memory();
    return plan_;
  }

 private:
  static constexpr double kInfinite = 1e300;

  void consider_plan(BipartiteRoute route, int tiles, int tiles_per_warp, int cluster_size, int kept_sides) {
    BipartitePlan plan = {};
    plan.route = route;
    plan.tiles = tiles;
    plan.tiles_per_warp = tiles_per_warp;
    plan.kept_sides = kept_sides;
    plan.scale = scale_;
    plan.shape.cluster_size = cluster_size;
    const Counts counts(*this, plan);
    if (layout(plan).states > INT32_MAX) return;  // their places are int32
    if (kept_sides && std::max(left().words, right().words) > kept_words(kept_sides)) return;
    const int most = most_threads(p_.log_weights != nullptr, tiles_per_warp, kept_sides),
              warps = int(std::min<int64_t>(std::max(counts.items[0], counts.items[1]), most / kWarpSize));
    constexpr int kLeastThreads = 4 * kWarpSize;
    static_assert(kLeastThreads >= kMaxBipartiteTiles * kTileChains, "a chain's log-weight has a thread");
    plan.shape.num_threads = std::clamp(warps * kWarpSize, kLeastThreads, most);
    // Random bytes of more sweeps are drawn at once if threads would have nothing to do.
    const int64_t counters = (int64_t{left().n} + right().n) / 16 / cluster_size * tiles * kTileChains;
    plan.sweeps_ahead = int(std::clamp<int64_t>(plan.shape.num_threads / std::max<int64_t>(counters, 1), 1, kMaxSweepsAhead));
    while (plan.sweeps_ahead && !make_fit(plan)) --plan.sweeps_ahead;
    if (!make_fit(plan)) return;
    if (route != kGlobal && route != kAllGlobal)
      plan.resident = std::min((limits_.shared_memory_per_cta - plan.shape.shared_memory) / block_bytes(), counts.blocks);
    if (!make_fit(plan) || ((route == kShared || route == kRegisters) && plan.resident < counts.blocks)) return;
    const double clocks = choose_ctas(plan, cost(plan, counts));
    if (clocks < least_) plan_ = plan, least_ = clocks;
  }

  const BipartiteSide& left() const { return packed_.sides[0]; }
  const BipartiteSide& right() const { return packed_.sides[1]; }
  int64_t block_bytes() const { return block_fragments(packed_.num_slices) * int64_t(sizeof(LeftFragment)); }
  BipartiteLayout layout(const BipartitePlan& plan) const { return {packed_, plan}; }
  // Finds the plan's shared memory, and returns whether a CTA can have so much.
  bool make_fit(BipartitePlan& plan) const {
    plan.shape.shared_memory = layout(plan).shared_memory();
    return plan.shape.shared_memory <= limits_.shared_memory_per_cta;
  }

  // The number of clusters, or of CTAs that are in none, that the device runs at a time.
  int64_t clusters_at_a_time(const BipartitePlan& plan) const {
    if (const int size = plan.shape.cluster_size; size > 1) return limits_.ctas_in_clusters(kernel_of(p_, plan), plan.shape) / size;
    const int64_t registers = plan.kept_sides || p_.log_weights ? 256 : plan.tiles_per_warp == kMostTilesOfWarp ? 192 : 168;
    return limits_.num_sms * ctas_per_sm(limits_, plan.shape, registers);
  }

  // Counts of the CTA with the most words.
  struct Counts {
    int64_t items[2];   // of a half sweep of a side, which warps share
    int64_t rounds[2];  // of an item
    int64_t products;   // of blocks and tiles
    int64_t blocks;     // of slices that do not lie in registers
    int64_t reads;      // of these, in a sweep
    int64_t bits;       // wavefronts of the other side's bits
    int64_t words;      // of both sides
    Counts(const Planner& of, const BipartitePlan& plan) : products(0), blocks(0), reads(0), bits(0), words(0) {
      const int parts = plan.tiles_per_warp >= kBundle ? 2 : 1;  // of a word, which items have
      for (int side = 0; side < 2; ++side) {
        const int64_t own = most_words(of.packed_.sides[side].words, plan.shape.cluster_size),
                      all = own * of.packed_.sides[1 - side].words;
        const bool is_kept = plan.kept_sides > 1 - side;
        const int64_t groups = is_kept ? 1 : plan.tiles / plan.tiles_per_warp;
        items[side] = own * parts * groups;
        rounds[side] = is_kept ? plan.tiles : 1;
        products += all * plan.tiles;
        bits += all * (plan.tiles_per_warp >= kBundle ? parts * plan.tiles / kBundle : plan.tiles);
        if (!is_kept) blocks += all, reads += all * groups;
        words += own;
      }
    }
  };

  // Each CTA has a multiprocessor's clocks for itself or shares them with others. A product of a fragment takes 2 of them, a wavefront of shared
  // memory 1; 24 bytes a clock come from L2; an update takes 28 instructions of a lane, or 63 if its random byte is drawn alone, and four warps issue
  // one each clock. A CTA also waits: for loads, for instructions that depend on each other, and at barriers.
  struct Cost {
    double throughput, latency;  // of a cluster that has a multiprocessor, or some, for itself, and of any
    double of(int64_t on_one_sm) const { return std::max(latency, throughput * double(on_one_sm)); }
  };
  Cost cost(const BipartitePlan& plan, const Counts& counts) const {
    const double from_shared = counts.blocks ? double(plan.resident) / double(counts.blocks) : 1;
    const double bytes = double(counts.reads * block_bytes());
    const double products = double(counts.products) * packed_.num_slices * kFragments * 2;
    const double wavefronts = bytes * from_shared / 128 + double(counts.bits);
    const double updates =
        double(counts.words * kWarpSize * plan.tiles * kTileChains) * (plan.sweeps_ahead ? 28 : 63) / (4 * kWarpSize);
    const double throughput =
        std::hypot(products, wavefronts, bytes * (1 - from_shared) / 24) + updates;  // they get in each other's way
    // A warp makes the products of a block one after another, and then its decisions, and has a quarter of the multiprocessor for itself.
    const int fragments = plan.tiles_per_warp * (plan.tiles_per_warp >= kBundle ? 1 : kFragments);
    const double of_block = std::max(40.0, 6.5 * fragments * packed_.num_slices) + 110 * (1 - from_shared),
                 of_item = 100 + 100 * fragments;
    double latency = plan.shape.cluster_size > 1 ? 2000 : 600;
    for (int side = 0; side < 2; ++side) {
      const double rounds =
          double(counts.rounds[side]) * std::ceil(double(counts.items[side]) * kWarpSize / plan.shape.num_threads);
      latency += rounds * (packed_.sides[1 - side].words * of_block + of_item);
    }
    return {throughput, latency};
  }

  // Chooses the number of CTAs, and returns what a sweep of all chains costs. A cluster stays for many groups of chains of its model, so that it
  // reads the weight once, unless that makes a sweep slower by more than a sixteenth, because multiprocessors would be idle.
  double choose_ctas(BipartitePlan& plan, const Cost& cost) const {
    const int64_t at_a_time = clusters_at_a_time(plan), size = plan.shape.cluster_size, models = p_.sweep.batch.num_models,
                  groups = ctas_per_model(p_.sweep.batch, plan.tiles * kTileChains);
    if (at_a_time == 0) return kInfinite;
    const auto round = [&](int64_t clusters) { return cost.of(divide_up(clusters * size, limits_.num_sms)); };
    const auto time = [&](int64_t clusters) {
      const int64_t left_over = clusters % at_a_time;
      return double(clusters / at_a_time) * round(at_a_time) + (left_over ? round(left_over) : 0);
    };
    const int64_t staying = std::max<int64_t>(std::min(groups, at_a_time / std::max<int64_t>(models, 1)), 1);
    const double alone = time(models * groups),
                 together = double(groups / staying) * time(models * staying) + time(models * (groups % staying));
    const bool stays = together <= alone * (1 + 1.0 / 16);
    plan.shape.num_ctas = models * (stays ? std::min(staying, groups) : groups) * size;
    return stays ? together : alone;
  }

  const BipartiteParams& p_;
  const DeviceLimits& limits_;
  const ScalePlan scale_;
  Workspace nowhere_;
  const BipartitePacked packed_;
  BipartitePlan plan_ = {};
  double least_ = kInfinite;
};

}  // namespace

BipartitePlan plan_bipartite(const BipartiteParams& p, const DeviceLimits& limits, BipartiteRoute route) {
  Planner planner(p, limits);
  const auto consider = [&](BipartiteRoute of) {
    for (int tiles = 1; tiles <= kMaxBipartiteTiles; tiles *= 2) {
      if (tiles > 1 && (tiles / 2) * kTileChains >= p.sweep.batch.chains_per_model) break;
      if (of == kRegisters) {
        if (p.log_weights) break;  // four slices do not fit
        planner.consider(of, tiles, 1, 2);
        planner.consider(of, tiles, 1, 1);
      } else if (of == kCluster) {
        if (p.log_weights) break;  // terms would lie in several CTAs
        for (int size = 2; size <= kMaxClusterSize; size *= 2) planner.consider(of, tiles, size);
      } else {
        planner.consider(of, tiles, 1);
      }
    }
  };
  // A route that a test has chosen is taken wherever it is possible.
  if (route != kAuto) consider(route);
  if (!planner.has_plan())
    for (const BipartiteRoute any : {kRegisters, kShared, kCluster, kGlobal}) consider(any);
  if (!planner.has_plan()) consider(kAllGlobal);
  if (!planner.has_plan()) throw std::invalid_argument("the device has too little shared memory");
  return planner.plan();
}

void launch_bipartite(const BipartiteParams& p, const BipartitePlan& plan, Stream stream) {
  Workspace workspace(p.workspace);
  const BipartitePacked packed(p, plan.scale, workspace);
  launch_bipartite_pack(p, plan.scale, packed, stream);
  const BipartiteLayout arrays(packed, plan);
  const auto clusters = int32_t(plan.shape.num_ctas / plan.shape.cluster_size / p.sweep.batch.num_models);
  launch(kernel_of(p, plan), plan.shape, stream,
         BipartiteBinaryParams{p.sweep, p.weight, p.is_double, packed, arrays, plan, clusters,
                               workspace.take<unsigned char>(plan.shape.num_ctas * arrays.device_memory()), p.log_weights});
  launch_bipartite_unpack(p, packed, stream);
}

}  // namespace gibbs
