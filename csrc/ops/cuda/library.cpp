// SPDX-License-Identifier: Apache-2.0
// The library of CUDA kernels as gibbs_ext._C sees it: hooks, routes and reported faults.
#include "ops/cuda/library.h"

#include <atomic>
#include <cstring>
#include <iterator>

#include "ops/cuda/call.h"
#include "ops/cuda/routes.h"

namespace gibbs {

Hooks hooks;

namespace {

std::atomic<const Route*> in_force = kRoutes;
std::atomic<const char*> last_route = "";

bool set_route(const char* name) {
  for (const Route& route : kRoutes)
    if (!std::strcmp(route.name, name)) return in_force = &route, true;
  return false;
}
const char* route_name(int index) { return index < int(std::size(kRoutes)) ? kRoutes[index].name : nullptr; }

// The first entry, "auto", has no route of its own.
template <class R>
void note(R Route::* member, R taken) {
  for (const Route& route : kRoutes)
    if (route.*member == taken) return last_route = route.name, void();
}

const char* take_fault(int device) {
  static thread_local std::string text;
  DeviceReport* const report = report_if_used(device);
  text = report ? take_report(*report, FoundBy::kThisCall) : "";
  return text.empty() ? nullptr : text.c_str();
}

}  // namespace

const Route& route_in_force() { return *in_force; }
void note(const BipartitePlan& plan) { note(&Route::bipartite, plan.route); }
void note(const GraphPlan& plan) { note(&Route::graph, plan.route); }

}  // namespace gibbs

#if !defined(GIBBS_ARCHITECTURES)
#define GIBBS_ARCHITECTURES ""
#endif

extern "C" __attribute__((visibility("default"))) const gibbs::CudaLibrary* gibbs_cuda_library() {
  static const gibbs::CudaLibrary library = {[](const gibbs::Hooks& hooks) { gibbs::hooks = hooks; },
                                             GIBBS_ARCHITECTURES,
                                             gibbs::take_fault,
                                             gibbs::route_name,
                                             gibbs::set_route,
                                             [] { return gibbs::last_route.load(); }};
  return &library;
}

#if defined(GIBBS_EMULATE)
STABLE_TORCH_LIBRARY(gibbs_ext_emulated, m) {
  for (const auto& [name, signature] : gibbs::kOps) m.def((std::string(name) + signature).c_str());
}
#endif
