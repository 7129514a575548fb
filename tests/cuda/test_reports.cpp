// SPDX-License-Identifier: Apache-2.0
// Kernels store faults while the host takes them: no fault is lost, none is found twice, and a word is never mixed from two faults.
#include <atomic>
#include <thread>

#include "check.h"
#include "cuda/devices.h"

using namespace gibbs;

constexpr int64_t kRounds = 20000;

// Numbered by what they are and by the round.
static void store(DeviceReport& report, int64_t round) {
  SweepView sweep = {};
  sweep.report = &report;
  sweep.op = uint32_t(round % 12);
  report_fault(sweep, Outcome::kNonFiniteWeight, float(round));
  report_rounding(sweep, {exp2f(float(round % 200 - 100)), float(round % 256)}, round + 1 + (int64_t{1} << 31));
}

// Now and then: the other thread may be waiting for this one's processor.
static void make_room(int64_t times) {
  if (times % 1024 == 0) std::this_thread::yield();
}

// A thread stores one fault a round while this one takes what there is, until both have done. Returns how many rounds' faults were lost.
template <class Take>
static int64_t lost_faults(int64_t rounds, const Take& take) {
  DeviceReport report = {};
  std::atomic<int64_t> begun = -1, stored = -1;
  std::thread device([&] {
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t times = 1; begun.load() < round; ++times) make_room(times);
      store(report, round);
      stored = round;
    }
  });
  int64_t lost = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    int64_t faults = 0, roundings = 0, times = 0;
    begun = round;
    for (bool is_last = false; !is_last;) {
      is_last = stored.load() == round;  // what is there now is all there will be
      make_room(++times);
      const Findings found = take(report);
      if (found.fault) {
        ++faults;
        CHECK(found.fault->op == uint32_t(round % 12) && found.fault->outcome == Outcome::kNonFiniteWeight);
        CHECK(found.fault->value == float(round), "round %ld: %g", long(round), double(found.fault->value));
      }
      if (found.rounding) {
        ++roundings;
        CHECK(found.rounding->op == uint32_t(round % 12));
        const Rounding& rounding = found.rounding->rounding;
        CHECK(rounding.scale == exp2f(float(round % 200 - 100)), "%g", double(rounding.scale));
        CHECK(rounding.bias == float(round % 256), "%g", double(rounding.bias));
        CHECK(found.rounding->degree == round + 1 + (int64_t{1} << 31), "round %ld: %ld", long(round),
              long(found.rounding->degree));
      }
    }
    CHECK(faults <= 1 && roundings <= 1, "%ld faults and %ld roundings in a round", long(faults), long(roundings));
    lost += !faults + !roundings;
  }
  device.join();
  return lost;
}

// How it is done wrong. Both see a whole word, but forget one that is stored in between, for which the other thread gets the processor: on a busy
// machine the two may not run at a time otherwise.
static Findings read_then_reset(DeviceReport& report) {
  DeviceReport copy;
  copy.fault = *static_cast<volatile uint64_t*>(&report.fault);
  copy.rounding = *static_cast<volatile uint64_t*>(&report.rounding);
  std::this_thread::yield();
  *static_cast<volatile uint64_t*>(&report.fault) = 0;
  *static_cast<volatile uint64_t*>(&report.rounding) = 0;
  return take_findings(copy);
}

int main() {
  DeviceReport report = {};
  CHECK(!take_findings(report).fault && !take_findings(report).rounding);
  const int64_t lost = lost_faults(kRounds, take_findings);
  CHECK(lost == 0, "%ld of %ld are lost", long(lost), long(2 * kRounds));
  // That this test can fail.
  const int64_t lost_by_resetting = lost_faults(kRounds, read_then_reset);
  CHECK(lost_by_resetting > 0, "%ld rounds of reading and then resetting lost nothing", long(kRounds));
  printf("%ld rounds lose nothing; by reading and then resetting %ld of %ld words are lost\n", long(kRounds),
         long(lost_by_resetting), long(2 * kRounds));
}
