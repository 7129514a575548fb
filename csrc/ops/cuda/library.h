// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/hooks.h"

// What gibbs_ext._C asks of the library that holds the CUDA kernels, which it loads at run time: extern "C" gibbs_cuda_library().
namespace gibbs {

struct CudaLibrary {
  void (*set_hooks)(const Hooks&);
  const char* architectures;  // what the kernels are compiled for, "75;80;...": machine code, and PTX of the last generation
  // What kernels on a device have found wrong since it was last asked; null: nothing. Valid until the thread's next call.
  const char* (*take_fault)(int device);
  // Which route binary sweeps take: "auto" or, for tests and benchmarks, one by name. False where it is none.
  bool (*set_route)(const char* name);
  // Which route the last binary sweeps took; "": there were none.
  const char* (*last_route)();
};

}  // namespace gibbs
