// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the ops ask of Python. The pybind11 module sets these; without it (a C++ program that loads the ops) they stay null.
namespace gibbs {

struct Hooks {
  bool (*interrupted)() = nullptr;              // a signal handler raised: the exception waits in take_exception()
  bool (*warn)(const char* message) = nullptr;  // CouplingResolutionWarning; false: the warning was turned into an exception
};
extern Hooks hooks;

}  // namespace gibbs
