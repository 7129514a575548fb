// SPDX-License-Identifier: Apache-2.0
// One call of the CPU's drivers, so that callgrind counts its instructions: "instructions CASE". bench/instructions.py runs it.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/graph_view.h"
#include "cpu/bipartite.h"
#include "cpu/graph.h"
#include "cpu/graph_layout.h"

using namespace gibbs;

// callgrind collects inside this function alone.
extern "C" __attribute__((noinline)) void measured(const std::function<Outcome()>& call) {
  if (call() != Outcome::kOk) abort();
}

static const Runtime serial = {1, nullptr, nullptr};
static uint32_t random_state = 1;
// Uniform in [-1, 1].
static float uniform() {
  random_state = random_state * 1664525 + 1013904223;
  return float(int32_t(random_state)) * 0x1p-31f;
}
static std::vector<float> uniform(int64_t count, double largest) {
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) x = float(largest) * uniform();
  return out;
}
// Bits of chains, with none beyond the last unit.
static std::vector<uint32_t> bits(int64_t chains, int64_t n) {
  std::vector<uint32_t> out(static_cast<size_t>(chains * state_words(n)));
  for (int64_t c = 0; c < chains; ++c)
    for (int64_t i = 0; i < n; ++i) out[size_t(c * state_words(n) + i / 32)] |= uint32_t(uniform() > 0) << (i % 32);
  return out;
}

enum class Kind { kBinary, kAnnealed, kRelaxed };

// `models` models of `chains` chains each.
static void bipartite(int64_t models, int64_t chains, int64_t n1, int64_t n2, int64_t num_sweeps, Kind kind = Kind::kBinary) {
  const int64_t all = models * chains;
  const std::vector<float> weight = uniform(models * n1 * n2, 0.15), left_bias = uniform(n1, 1), right_bias = uniform(n2, 1);
  std::vector<uint32_t> left = bits(all, n1), right = bits(all, n2);
  std::vector<double> log_weights(static_cast<size_t>(all));
  BipartiteCall call;
  call.n1 = n1, call.n2 = n2;
  call.batch = Batch({models, chains}, {true, false});
  call.weight = {weight.data(), {n1 * n2, 0}, 1, n2};
  call.left_bias = call.base_left_bias = {left_bias.data(), {0, 0}, 1, 0};
  call.right_bias = call.base_right_bias = {right_bias.data(), {0, 0}, 1, 0};
  call.num_sweeps = num_sweeps;
  call.left_bits = left.data(), call.right_bits = right.data();
  call.beta = {1.0};
  if (kind == Kind::kAnnealed) {
    call.log_weights = log_weights.data();
    for (int64_t s = 1; s <= num_sweeps; ++s) call.beta.push_back(double(s) / double(num_sweeps));
    call.beta[0] = 0, call.num_betas = num_sweeps + 1;
  }
  const auto floats = [](int64_t count) { return std::vector<float>(static_cast<size_t>(count), 0.5f); };
  std::vector<float> state = floats(all * n1), out_left = state, left_mean = state, out_right = floats(all * n2),
                     fields = floats(all * (n1 + n2)), grad_state = state, grad_left_bias = state, grad_right_bias = out_right,
                     grad_weight = floats(models * n1 * n2);
  Rounding rounding;
  if (kind != Kind::kRelaxed) return measured([&] { return run_bipartite(call, serial, &rounding); });
  call.num_relaxed_sweeps = 1;
  call.state = state.data(), call.left = out_left.data(), call.right = out_right.data(), call.left_mean = left_mean.data();
  call.fields = fields.data();
  measured([&] {
    const Outcome outcome = run_bipartite(call, serial, &rounding);
    if (outcome != Outcome::kOk) return outcome;
    return run_bipartite_backward({call, out_left.data(), out_right.data(), left_mean.data(), grad_state.data(),
                                   grad_left_bias.data(), grad_right_bias.data(), grad_weight.data(), true},
                                  serial);
  });
}

// Chimera of size x size cells.
static void chimera(int64_t models, int64_t chains, int64_t size, int64_t num_sweeps, bool relaxed = false,
                    bool metropolis = false) {
  std::vector<int64_t> edges;
  const auto node = [&](int64_t r, int64_t c, int64_t side, int64_t k) { return ((r * size + c) * 2 + side) * 4 + k; };
  for (int64_t r = 0; r < size; ++r)
    for (int64_t c = 0; c < size; ++c)
      for (int64_t k = 0; k < 4; ++k) {
        for (int64_t l = 0; l < 4; ++l) edges.insert(edges.end(), {node(r, c, 0, k), node(r, c, 1, l)});
        if (r + 1 < size) edges.insert(edges.end(), {node(r, c, 0, k), node(r + 1, c, 0, k)});
        if (c + 1 < size) edges.insert(edges.end(), {node(r, c, 1, k), node(r, c + 1, 1, k)});
      }
  const int64_t n = size * size * 8, num_edges = int64_t(edges.size() / 2), all = models * chains;
  const std::vector<int32_t> layout = graph_layout(n, edges, std::nullopt);
  const std::vector<float> bias = uniform(n, 1), coupling = uniform(models * num_edges, 1);
  std::vector<uint32_t> state_bits = bits(all, n);
  GraphCall call;
  call.graph = graph_view(layout.data());
  call.batch = Batch({models, chains}, {true, false});
  call.bias = {bias.data(), {0, 0}, 1, 0};
  call.coupling = {coupling.data(), {num_edges, 0}, 1, 0};
  call.num_sweeps = num_sweeps;
  call.bits = state_bits.data();
  call.beta = {0.5};
  call.metropolis = metropolis;
  std::vector<float> state(static_cast<size_t>(all * n), 0.5f), out = state, mean = state, fields = state, grad_state = state,
                                                                grad_bias = state, grad_coupling(size_t(models * num_edges));
  Rounding rounding;
  if (!relaxed) return measured([&] { return run_graph(call, serial, &rounding); });
  call.num_relaxed_sweeps = 1;
  call.state = state.data(), call.relaxed = out.data(), call.mean = mean.data(), call.fields = fields.data();
  measured([&] {
    const Outcome outcome = run_graph(call, serial, &rounding);
    if (outcome != Outcome::kOk) return outcome;
    return run_graph_backward({call, out.data(), mean.data(), grad_state.data(), grad_bias.data(), grad_coupling.data()}, serial);
  });
}

int main(int argc, char** argv) {
  const std::map<std::string, std::function<void()>> cases = {
      {"8 models, 100+100, 20 sweeps", [] { bipartite(8, 1, 100, 100, 20); }},
      {"1 model, 500+400, 20 sweeps", [] { bipartite(1, 1, 500, 400, 20); }},
      {"shared weight, 64 chains, 100+100, 20 sweeps", [] { bipartite(1, 64, 100, 100, 20); }},
      {"shared weight, 32 chains, 64+64, annealed over 20 betas", [] { bipartite(1, 32, 64, 64, 20, Kind::kAnnealed); }},
      {"8 models, 100+100, 10 + 1 sweeps and backward", [] { bipartite(8, 1, 100, 100, 10, Kind::kRelaxed); }},
      {"Chimera C6, 256 chains, 20 sweeps", [] { chimera(1, 256, 6, 20); }},
      {"Chimera C6, 32 models, 10 + 1 sweeps and backward", [] { chimera(32, 1, 6, 10, true); }},
      {"Chimera C6, 32 chains, 20 Metropolis sweeps", [] { chimera(1, 32, 6, 20, false, true); }},
  };
  if (argc == 2 && cases.count(argv[1])) return cases.at(argv[1])(), 0;
  for (const auto& [name, run] : cases) puts(name.c_str());
  return argc > 1;
}
