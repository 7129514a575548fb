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
    {"registers", BipartiteRoute::kRegisters},
    {"shared", BipartiteRoute::kShared, GraphCudaRoute::kShared},
    {"cluster", BipartiteRoute::kCluster},
    {"global", BipartiteRoute::kGlobal, GraphCudaRoute::kGlobal},
    {"all_global", BipartiteRoute::kAllGlobal},
};

// The route that calls are asked to take, and a note of the one that the last binary sweeps took, which differs where that cannot be taken.
const Route& route_in_force();
void note(const BipartitePlan&);
void note(const GraphPlan&);

}  // namespace gibbs
