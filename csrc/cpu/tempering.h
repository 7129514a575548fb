// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <vector>

#include "core/tempering.h"
#include "cpu/batch.h"

// Parallel tempering of the chains of a call, whose first batch dimension is the ladder of betas.
namespace gibbs {

struct Ladder {
  // State bits of each part: [linear number, words].
  struct Part {
    uint32_t* bits;
    int64_t words;
  };
  std::vector<double> betas;
  std::vector<Part> parts;
  int64_t columns;     // chains at each beta
  int64_t* chains;     // [betas, columns] numbers of the replicas, mutated as they move
  double* energies;    // out: [rounds, betas, columns], before the swaps
  int64_t* chains_at;  // out: [rounds, betas, columns], after the swaps
};

// Makes call.num_sweeps sweeps at each beta and then swaps replicas, num_swaps times. run(call, after) makes the rounds. Replicas of
// one beta stay neighbours in memory, because their bits and numbers move instead of their betas.
template <class Call, class Run>
Outcome run_tempering(Call& call, const Ladder& ladder, int64_t num_swaps, const Run& run) {
  const int64_t columns = ladder.columns, size = int64_t(ladder.betas.size()) * columns;
  std::vector<double> energies(static_cast<size_t>(size));
  call.energies = energies.data();
  call.num_rounds = num_swaps;
  return run(call, [&](int64_t round) {
    std::copy_n(energies.data(), size, ladder.energies + round * size);
    const uint64_t last_sweep = uint64_t(call.sweep_offset + call.num_sweeps - 1);
    for (int64_t b = first_pair(call.sweep_offset, call.num_sweeps); b + 1 < int64_t(ladder.betas.size()); b += 2)
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t at = b * columns + column, next = at + columns;
        const auto number = uint64_t(ladder.chains[at]) / ladder.betas.size();
        if (!replicas_swap(ladder.betas[size_t(b)], ladder.betas[size_t(b) + 1], energies[size_t(at)], energies[size_t(next)],
                           call.seed, number, last_sweep, uint32_t(b)))
          continue;
        std::swap(ladder.chains[at], ladder.chains[next]);
        for (const Ladder::Part& part : ladder.parts)
          std::swap_ranges(part.bits + at * part.words, part.bits + (at + 1) * part.words, part.bits + next * part.words);
      }
    std::copy_n(ladder.chains, size, ladder.chains_at + round * size);
    call.sweep_offset += call.num_sweeps;
  });
}

}  // namespace gibbs
