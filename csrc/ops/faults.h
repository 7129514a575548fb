// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "core/fixed_point.h"
#include "core/outcome.h"

// Messages to users: errors, warnings, and the hooks by which they reach Python. Every message starts with the op's name and names the
// argument.
namespace gibbs {

// Python's side of a call. The pybind11 module sets the hooks; they stay null in a C++ program that loads the ops without it.
struct Hooks {
  bool (*interrupted)() = nullptr;              // a signal handler raised: the exception waits in take_exception()
  bool (*warn)(const char* message) = nullptr;  // CouplingResolutionWarning; false: the warning was turned into an exception
};
extern Hooks hooks;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream out;
  out << op << ": ";
  (out << ... << parts);
  throw std::invalid_argument(out.str());
}

// The text of a fault that kernels found. value: the offending number, if it was no NaN. Interrupts are the caller's affair.
inline std::string text(Outcome outcome, float value = 0, const char* beta_name = "beta") {
  std::ostringstream found;
  found << value;
  switch (outcome) {
    case Outcome::kOk:
      return "";
    case Outcome::kInterrupted:
      return "interrupted";
    case Outcome::kNonFiniteWeight:
      return "weight must be finite, got NaN or inf";
    case Outcome::kTooLargeWeight:
      return "weight must be less than 2^127 in magnitude, got a larger value";
    case Outcome::kNonFiniteLeftBias:
      return "left_bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteRightBias:
      return "right_bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteBaseLeftBias:
      return "base_left_bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteBaseRightBias:
      return "base_right_bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteCoupling:
      return "coupling must be finite, got NaN or inf";
    case Outcome::kTooLargeCoupling:
      return "coupling must be less than 2^127 in magnitude, got a larger value";
    case Outcome::kNonFiniteBias:
      return "bias must be finite in float32, got NaN or inf";
    case Outcome::kNonFiniteBaseBias:
      return "base_bias must be finite in float32, got NaN or inf";
    case Outcome::kLeftNotBits:
      return "left must hold 0 and 1 only, got " + found.str();
    case Outcome::kRightNotBits:
      return "right must hold 0 and 1 only, got " + found.str();
    case Outcome::kStateNotBits:
      return "state must hold 0 and 1 only, got " + found.str();
    case Outcome::kNonFiniteLeft:
      return "left must be finite, got NaN or inf";
    case Outcome::kNonFiniteState:
      return "state must be finite, got NaN or inf";
    case Outcome::kChainOutOfRange:
      return "chain_offset must lie in 0 .. 2^48 - 1, got " + found.str();
    case Outcome::kNonFiniteBeta:
      return std::string(beta_name) + " must be finite in float32, got " + found.str();
    case Outcome::kBadLayout:
      return "layout must be the layout of a ColoredGraph, got numbers that are none";
  }
  return "an unknown fault";
}

// Warns that rounding may change probabilities and names the larger of the two errors. coupling: the argument's name; rest: the end of the
// message.
inline void warn_of_rounding(const char* op, const char* coupling, const Rounding& rounding, int64_t neighbors,
                             const std::string& rest) {
  static_assert(kResolutionLimit == 1e-3, "twice the error that the text below names");
  if (!hooks.warn) return;
  std::ostringstream out;
  out << op << ": " << coupling;
  if (2 * float32_error(rounding) > field_error(rounding, neighbors))
    out << " and biases of about " << rounding.bias << " may nearly cancel, and float32 then shifts a field by about "
        << float32_error(rounding);
  else
    out << " spans too wide a range: rounding it to steps of " << rounding.scale << " may shift logits by more than 5e-4";
  out << " (smaller parameters or a lower beta help) for units of up to " << neighbors << " neighbours" << rest;
  if (!hooks.warn(out.str().c_str())) throw std::runtime_error(std::string(op) + ": stopped by a warning");
}
inline std::string at_beta(double beta) {
  std::ostringstream out;
  out << " at beta " << beta;
  return out.str();
}

}  // namespace gibbs
