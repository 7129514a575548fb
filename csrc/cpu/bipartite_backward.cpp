// SPDX-License-Identifier: Apache-2.0
// The backward pass of relaxed sweeps of bipartite models.
#include "cpu/bipartite_couplings.h"

namespace gibbs {

namespace {

template <class T>
Outcome run_backward(const BipartiteBackwardCall& back, const Runtime& runtime) {
  const BipartiteCall& call = back.forward;
  const int64_t models = call.batch.num_models(), chains = call.batch.chains_per_model();
  const int64_t n1 = call.n1, n2 = call.n2, factors = 2 * call.num_relaxed_sweeps, total = models * chains;
  Progress progress(runtime);
  if (total == 0) {
    std::fill_n(static_cast<T*>(back.grad_weight), models * n1 * n2, T{});
    return Outcome::kOk;
  }
  struct Scratch {
    Scratch(const BipartiteCall& c)
        : words(random_bytes_capacity(c.n1 + c.n2)),
          bytes(random_bytes_capacity(c.n1 + c.n2)),
          values(2 * (c.n1 + c.n2)),
          packed(packed_size(c)) {}
    Buffer<uint32_t> words;
    Buffer<uint8_t> bytes;
    Buffer<T> values, packed;
  };
  // Computes the factors of one model's chains; the gradient of its weight is the sum of their outer products.
  const auto run_chains = [&](int64_t model, Interval range, T* left_factors, T* right_factors, Scratch& scratch) {
    const RelaxedSweeps<T> sweeps = relaxed_sweeps(call, model, scratch.packed.get());
    for (int64_t chain = range.begin; chain < range.end && !progress.stop(); ++chain) {
      const int64_t linear = call.batch.linear(model, chain);
      const auto row = [&](const void* base, int64_t n) { return static_cast<const T*>(base) + linear * n; };
      const auto out = [&](void* base, int64_t n) { return static_cast<T*>(base) + linear * n; };
      const RelaxedBackwardChain<T> c = {row(back.grad_left, n1),
                                         row(back.grad_right, n2),
                                         row(back.grad_left_mean, n1),
                                         row(call.state, n1),
                                         row(call.fields, n1 + n2),
                                         out(back.grad_state, n1),
                                         out(back.grad_left_bias, n1),
                                         out(back.grad_right_bias, n2),
                                         left_factors + chain * factors * n1,
                                         right_factors + chain * factors * n2,
                                         chain_number(call, model, chain)};
      kernels().of<T>().relaxed_backward(sweeps, c, back.needs_grad_state, scratch.words.get(), scratch.bytes.get(),
                                         scratch.values.get());
    }
  };
  const auto outer = [&](int64_t model, const T* left_factors, const T* right_factors, Interval rows) {
    kernels().of<T>().outer_products(left_factors, right_factors, chains * factors, n1, n2, rows.begin, rows.end,
                                     static_cast<T*>(back.grad_weight) + model * n1 * n2);
  };
  if (models >= runtime.num_threads) {
    for_each_task(runtime, models, progress, [&] {
      return [&, scratch = std::make_shared<Scratch>(call), left = std::make_shared<Buffer<T>>(chains * factors * n1),
              right = std::make_shared<Buffer<T>>(chains * factors * n2)](int64_t model) {
        run_chains(model, {0, chains}, left->get(), right->get(), *scratch);
        outer(model, left->get(), right->get(), {0, n1});
      };
    });
  } else {
    const Buffer<T> left(chains * factors * n1), right(chains * factors * n2);
    constexpr int64_t kChains = 8, kRows = 16;  // to a task
    for (int64_t model = 0; model < models && !progress.stop(); ++model) {
      for_each_task(runtime, (chains + kChains - 1) / kChains, progress, [&] {
        return [&, scratch = std::make_shared<Scratch>(call)](int64_t t) {
          run_chains(model, {t * kChains, std::min(chains, (t + 1) * kChains)}, left.get(), right.get(), *scratch);
        };
      });
      for_each_task(runtime, (n1 + kRows - 1) / kRows, progress, [&] {
        return [&](int64_t t) { outer(model, left.get(), right.get(), {t * kRows, std::min(n1, (t + 1) * kRows)}); };
      });
    }
  }
  return progress.outcome();
}

}  // namespace

Outcome run_bipartite_backward(const BipartiteBackwardCall& back, const Runtime& runtime) {
  return back.forward.is_double ? run_backward<double>(back, runtime) : run_backward<float>(back, runtime);
}

}  // namespace gibbs
