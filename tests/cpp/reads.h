// SPDX-License-Identifier: Apache-2.0
#pragma once

// States that are read while chains sweep: what the counts and the best states must be, and a run of cpu/moments.h beside it.
#include <utility>

#include "cpu/moments.h"
#include "fuzz.h"

namespace gibbs {

struct Reads {
  struct Part {
    int64_t n;
    std::vector<int64_t> counts;        // [chains, n], of which rows of models' first chains are used
    std::vector<uint32_t> state, best;  // [chains, words]
  };
  std::vector<Part> parts;
  std::vector<int64_t> pairs;    // [chains, pairs]
  std::vector<double> energies;  // [chains]

  Reads(int64_t chains, std::vector<std::pair<int64_t, std::vector<uint32_t>>> starts, size_t num_pairs)
      : pairs(size_t(chains) * num_pairs), energies(size_t(chains), std::numeric_limits<double>::infinity()) {
    for (auto& [n, start] : starts) parts.push_back({n, std::vector<int64_t>(size_t(chains * n)), start, start});
  }
  bool operator==(const Reads& other) const {
    const auto same = [](const Part& a, const Part& b) { return a.counts == b.counts && a.state == b.state && a.best == b.best; };
    return std::equal(parts.begin(), parts.end(), other.parts.begin(), same) && pairs == other.pairs && energies == other.energies;
  }

  // What a read of the states `now` adds. ends: the units of each pair, those of all parts numbered on.
  void expect(const Batch& batch, const std::vector<std::vector<uint32_t>>& now, const std::vector<double>& energy,
              const std::vector<std::pair<int64_t, int64_t>>& ends) {
    const auto is_one = [&](int64_t chain, int64_t unit) {
      size_t part = 0;
      for (; unit >= parts[part].n; ++part) unit -= parts[part].n;
      return bit(now[part].data() + chain * state_words(parts[part].n), unit);
    };
    for (int64_t model = 0; model < batch.num_models(); ++model)
      for (int64_t c = 0; c < batch.chains_per_model(); ++c) {
        const int64_t chain = batch.linear(model, c), row = batch.linear(model, 0);
        const bool is_better = energy[size_t(chain)] < energies[size_t(chain)];
        if (is_better) energies[size_t(chain)] = energy[size_t(chain)];
        for (size_t p = 0; p < parts.size(); ++p) {
          Part& part = parts[p];
          const int64_t words = state_words(part.n);
          for (int64_t i = 0; i < part.n; ++i) part.counts[size_t(row * part.n + i)] += bit(now[p].data() + chain * words, i);
          std::copy_n(now[p].data() + chain * words, words, part.state.data() + chain * words);
          if (is_better) std::copy_n(now[p].data() + chain * words, words, part.best.data() + chain * words);
        }
        for (size_t e = 0; e < ends.size(); ++e)
          pairs[size_t(row) * ends.size() + e] += is_one(chain, ends[e].first) && is_one(chain, ends[e].second);
      }
  }

  // Makes a call's sweeps, given a call of states that are these parts'.
  template <class Call, class Run>
  Outcome make(Call& call, int64_t every, bool wants_best, const Run& run) {
    Counts counts;
    for (Part& part : parts) counts.units.push_back(part.counts.data());
    if (!pairs.empty()) counts.pairs = pairs.data();
    call.counts = &counts, call.sweeps_per_read = every;
    BestStates best;
    best.energies = energies.data();
    for (Part& part : parts) best.parts.push_back({part.state.data(), part.best.data(), state_words(part.n)});
    return run_with_reads(call, wants_best ? &best : nullptr, run);
  }
  // As a run that looks for no best states leaves it.
  void forget_best(const Reads& start) {
    energies = start.energies;
    for (size_t p = 0; p < parts.size(); ++p) parts[p].best = start.parts[p].best;
  }
};

// Some divisor.
inline int64_t random_divisor(int64_t n) {
  int64_t out = 1 + below(n);
  while (n % out) --out;
  return out;
}

}  // namespace gibbs
