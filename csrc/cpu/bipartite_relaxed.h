// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/bipartite_couplings.h"

// Relaxed sweeps of chains that share a bipartite model.
namespace gibbs {

// Scratch memory and code of one thread.
template <class T>
class BipartiteRelaxedRunner {
 public:
  BipartiteRelaxedRunner(const BipartiteCall& call, Progress& progress)
      : call_(call),
        progress_(progress),
        words_(random_bytes_capacity(call.n1 + call.n2)),
        bytes_(random_bytes_capacity(call.n1 + call.n2)),
        packed_(packed_size(call)),
        bias_copies_(kRelaxedGroup * (call.n1 + call.n2)) {}

  void run(int64_t model, Interval range) {
    const int64_t n1 = call_.n1, n2 = call_.n2;
    const RelaxedSweeps<T> sweeps = relaxed_sweeps(call_, model, packed_.get());
    for (int64_t begin = range.begin; begin < range.end && !progress_.stop(); begin += kRelaxedGroup) {
      const int count = int(std::min<int64_t>(kRelaxedGroup, range.end - begin));
      RelaxedChain<T> chains[kRelaxedGroup];
      T* fields[kRelaxedGroup];
      T* copies = bias_copies_.get();
      bool finite = true;
      const auto copy_bias = [&](const Operand& bias, int64_t n, int64_t chain) {
        const T* from = row_of<T>(call_.batch, bias, model, chain);
        T* to = copies;
        for (int64_t i = 0; i < n; ++i) {
          to[i] = from[i * bias.stride];
          finite &= std::isfinite(to[i]);
        }
        copies += n;
        return to;
      };
      for (int c = 0; c < count; ++c) {
        const int64_t linear = call_.batch.linear(model, begin + c);
        RelaxedChain<T>& chain = chains[c];
        chain.left_bias = copy_bias(call_.left_bias, n1, begin + c);
        if (!finite) return progress_.fail(Outcome::kNonFiniteLeftBias);
        chain.right_bias = copy_bias(call_.right_bias, n2, begin + c);
        if (!finite) return progress_.fail(Outcome::kNonFiniteRightBias);
        chain.state = static_cast<T*>(call_.state) + linear * n1;
        chain.left = static_cast<T*>(call_.left) + linear * n1;
        chain.right = static_cast<T*>(call_.right) + linear * n2;
        chain.left_mean = static_cast<T*>(call_.left_mean) + linear * n1;
        chain.number = chain_number(call_, model, begin + c);
        fields[c] = static_cast<T*>(call_.fields) + linear * (n1 + n2);
        if (call_.num_sweeps) {
          const uint32_t* bits = call_.left_bits + linear * state_words(n1);
          for (int64_t i = 0; i < n1; ++i) chain.state[i] = T(bits[i / 32] >> (i % 32) & 1);
        }
      }
      kernels().of<T>().relaxed(sweeps, chains, fields, count, words_.get(), bytes_.get());
    }
  }

 private:
  const BipartiteCall& call_;
  Progress& progress_;
  Buffer<uint32_t> words_;
  Buffer<uint8_t> bytes_;
  Buffer<T> packed_, bias_copies_;
};

}  // namespace gibbs
