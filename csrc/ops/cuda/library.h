// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/faults.h"

// The interface between gibbs_ext._C and the library that holds the CUDA kernels. _C loads the library at run time and calls its
// extern "C" gibbs_cuda_library().
namespace gibbs {

struct CudaLibrary {
  void (*set_hooks)(const Hooks&);
  const char* architectures;  // architectures of the kernels, "75;80;...": machine code, and PTX of the last generation
  // Returns the faults that kernels on a device have found since its last call, or null if there are none. The text is valid until the
  // thread's next call.
  const char* (*take_fault)(int device);
  // The name of route number `index` of binary sweeps; null: there are no more. Number 0 is "auto", which takes the fastest.
  const char* (*route_name)(int index);
  // Chooses a route by name, for tests and benchmarks; false: there is none of the name.
  bool (*set_route)(const char* name);
  // The route that the last binary sweeps took; "": there were none.
  const char* (*last_route)();
};

}  // namespace gibbs
