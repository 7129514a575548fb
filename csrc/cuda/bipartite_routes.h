// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/bipartite.h"

// The routes of binary sweeps that plan_bipartite chooses from. Each plan says whether the route can be taken.
namespace gibbs {

bool plan_bipartite_resident(const BipartiteParams&, const DeviceLimits&, BipartitePlan*);
void launch_bipartite_resident(const BipartiteParams&, const BipartitePlan&, Stream);

bool plan_bipartite_streaming(const BipartiteParams&, const DeviceLimits&, BipartitePlan*);
void launch_bipartite_streaming(const BipartiteParams&, const BipartitePlan&, Stream);

bool plan_bipartite_cluster(const BipartiteParams&, const DeviceLimits&, BipartitePlan*);
void launch_bipartite_cluster(const BipartiteParams&, const BipartitePlan&, Stream);

bool plan_bipartite_tensor(const BipartiteParams&, const DeviceLimits&, BipartitePlan*);
bool plan_bipartite_tensor_streaming(const BipartiteParams&, const DeviceLimits&, BipartitePlan*);
void launch_bipartite_tensor(const BipartiteParams&, const BipartitePlan&, Stream);

// Whether enough chains share a weight for tensor cores to be fastest.
bool prefers_tensor(const BipartiteParams&, const DeviceLimits&);

}  // namespace gibbs
