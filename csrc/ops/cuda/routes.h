// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/bipartite.h"
#include "cuda/graph.h"

namespace gibbs {

// The routes of binary sweeps by name. One that only bipartite models have leaves graphs to choose, and the other way round.
struct Route {
  const char* name;
  BipartiteRoute bipartite = BipartiteRoute::kAuto;
  GraphCudaRoute graph = GraphCudaRoute::kAuto;
};
constexpr Route kRoutes[] = {
    {"auto"},
    {"resident", BipartiteRoute::kResident},
    {"cluster", BipartiteRoute::kCluster},
    {"streaming", BipartiteRoute::kStreaming},
    {"tensor", BipartiteRoute::kTensor},
    {"tensor_streaming", BipartiteRoute::kTensorStreaming},
    {"shared", BipartiteRoute::kAuto, GraphCudaRoute::kShared},
    {"global", BipartiteRoute::kAuto, GraphCudaRoute::kGlobal},
};

// The route that calls are asked to take, and a note of the one that the last binary sweeps took, which differs where that cannot be taken.
const Route& route_in_force();
void note(const BipartitePlan&);
void note(const GraphPlan&);

}  // namespace gibbs
