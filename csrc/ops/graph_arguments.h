// SPDX-License-Identifier: Apache-2.0
#pragma once

// The arguments of the ops on coloured graphs, checked in one place for every backend; see csrc/ops/bipartite_arguments.h.
#include "core/graph_view.h"
#include "ops/bipartite_arguments.h"

namespace gibbs {

// How many nodes, edges and colours a graph has, as the sizes of tensors tell it, or as its layout says.
struct GraphSize {
  int64_t num_nodes, num_edges, num_colors;
};

inline void check_layout_tensor(const char* op, const Tensor& layout) {
  if (layout.scalar_type() != ScalarType::Int || layout.dim() != 1 || !layout.is_contiguous())
    fail(op, "layout must be a contiguous 1-D int32 tensor, the layout of a ColoredGraph, got ", name_of(layout.scalar_type()), " ",
         text(shape_of(layout)));
}
[[noreturn]] inline void fail_layout(const char* op, const Tensor& layout) {
  fail(op, "layout must be the layout of a ColoredGraph, got ", layout.size(0), " numbers that are none");
}

class GraphProblem : public Problem {
 public:
  GraphProblem(const char* op, const Tensor& coupling, const Tensor& layout, const GraphSize& graph)
      : Problem(op, "coupling", coupling, 1, "[..., num_edges]"), size(graph) {
    const Tensor& c = this->coupling();
    if (c.size(c.dim() - 1) != size.num_edges)
      fail(op, "coupling must have shape [..., ", size.num_edges, "], one for each edge of graph, got ", text(shape_of(coupling)));
    same_device("layout", layout);
  }
  // What else has one value for each unit says so in terms of the graph.
  Tensor parameter(const char* name, const Tensor& t) { return units(name, t), Problem::parameter(name, t, size.num_nodes); }
  void state(const char* name, const Tensor& t) { units(name, t), Problem::state(name, t, size.num_nodes); }
  void mask(const char* name, const Tensor& t) { units(name, t), Problem::mask(name, t, size.num_nodes); }

  GraphSize size;

 private:
  void units(const char* name, const Tensor& t) const {
    if (t.dim() < 1 || t.size(t.dim() - 1) != size.num_nodes)
      fail(op(), name, " must have shape [..., ", size.num_nodes, "], one for each node of graph, got ", text(shape_of(t)));
  }
};

// Checks made after the problem is known: what a call does to its graph.

// Of graph_metropolis, too.
inline Tensor check_graph_gibbs(GraphProblem& p, const Tensor& state, const Tensor& bias, const Tensor& beta,
                                const std::optional<Tensor>& clamp, const Counters& counters) {
  const Tensor parameter = p.parameter("bias", bias);
  p.state("state", state);
  if (clamp) p.mask("clamp", *clamp);
  if (counters.chains) p.chain_numbers(*counters.chains);
  p.finish(false);
  check_counters(p.op(), p, counters);
  check_beta(p.op(), "beta", p, beta, counters.num_sweeps);
  return parameter;
}

inline Tensor check_graph_gibbs_relaxed(GraphProblem& p, const Tensor& state, const Tensor& bias, const Tensor& beta,
                                        const Counters& counters, const RelaxationArguments& relaxation) {
  const Tensor parameter = p.parameter("bias", bias);
  p.state("state", state);
  if (counters.chains) p.chain_numbers(*counters.chains);
  p.finish(false);
  if (counters.num_relaxed_sweeps < 1) fail(p.op(), "num_relaxed_sweeps must be at least 1, got ", counters.num_relaxed_sweeps);
  check_counters(p.op(), p, counters);
  check_beta(p.op(), "beta", p, beta, counters.num_sweeps + counters.num_relaxed_sweeps);
  check_relaxation(p.op(), relaxation);
  return parameter;
}

struct GraphBackwardTensors {
  Tensor grad_relaxed, grad_mean, state, fields;  // contiguous
};
inline GraphBackwardTensors check_graph_gibbs_relaxed_backward(GraphProblem& p, const Tensor& grad_relaxed, const Tensor& grad_mean,
                                                               const Tensor& state, const Tensor& fields, const Tensor& beta,
                                                               const Counters& counters, const RelaxationArguments& relaxation) {
  const Tensor* inputs[] = {&grad_relaxed, &grad_mean, &state};
  const char* names[] = {"grad_relaxed", "grad_mean", "state"};
  for (int i = 0; i < 3; ++i) p.own_type(names[i], *inputs[i]), p.state(names[i], *inputs[i]);
  if (counters.chains) p.chain_numbers(*counters.chains);
  p.finish(true);
  p.saved_fields(fields, p.size.num_nodes);
  const Shape shape = p.with_batch({p.size.num_nodes});
  const Tensor gr = whole_rows(p.op(), grad_relaxed, shape), gm = whole_rows(p.op(), grad_mean, shape),
               start = whole_rows(p.op(), state, shape);
  check_counters(p.op(), p, counters);
  check_beta(p.op(), "beta", p, beta, counters.num_sweeps + counters.num_relaxed_sweeps);
  check_relaxation(p.op(), relaxation);
  return {gr, gm, start, torch::stable::contiguous(fields)};
}

struct GraphAnnealedTensors {
  Tensor bias, base_bias;
};
inline GraphAnnealedTensors check_graph_ais(GraphProblem& p, const Tensor& state, const Tensor& bias, const Tensor& base_bias,
                                            const Tensor& betas, const Counters& counters) {
  const Tensor parameter = p.parameter("bias", bias), base = p.parameter("base_bias", base_bias);
  p.state("state", state);
  if (counters.chains) p.chain_numbers(*counters.chains);
  p.finish(false);
  check_counters(p.op(), p, counters);
  check_beta(p.op(), "betas", p, betas, counters.num_sweeps + 1);  // the starting one, and one a sweep
  return {parameter, base};
}

// Returns the bias as it is computed with.
inline Tensor check_graph_fields(GraphProblem& p, const Tensor& state, const Tensor& bias) {
  const Tensor parameter = p.parameter("bias", bias);
  p.own_type("state", state);
  p.state("state", state);
  p.finish(false);
  return parameter;
}

inline void check_graph_edge_sums(GraphProblem& p, const Tensor& first, const Tensor& second) {
  p.own_type("first", first), p.state("first", first);
  p.own_type("second", second), p.state("second", second);
  p.finish(true);
}

}  // namespace gibbs
