// SPDX-License-Identifier: Apache-2.0
#pragma once

// Runs CUDA kernels on the host, thread by thread: the very text of csrc/cuda/*.cu compiled as C++ with -DGIBBS_EMULATE. For tests.
//
// A CUDA thread is a fiber with a stack of its own. It runs until it comes to a barrier or a collective of its warp and goes on when all that take
// part have come; which of those that can run is next is drawn from a seed (or is the first, or the last), so that a race changes the answer
// for some seed. Checked: that those who meet at a barrier meet at the same place; masks of warps; deadlock; every index of an array in shared
// memory, whose bytes are garbage at first; that no CTA of a cluster leaves while another may read its memory. Under
// AddressSanitizer also device memory and the ends of shared memory. On request, what a launch asks of the memories and tensor cores is counted.
//
// What it takes for granted, and only a GPU can show: memory is sequentially consistent (no weak ordering between CTAs of a cluster, no torn
// stores); exp, log and log1p are those of the C library; the threads of
// a warp meet only where they are told to.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// ---- the language ----------------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define GIBBS_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_emulator::shared_memory()

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_emulator {

enum class Order { kRandom, kForward, kReverse };
struct Options {
  uint64_t seed = 1;
  Order order = Order::kRandom;
  int64_t shared_memory_limit = 232448;
  bool counts = false;
  int64_t most_ctas = -1;  // of a launch, so many are run (whole clusters of them); -1: all
  int64_t (*least_ctas)(const void* kernel) =
      nullptr;  // unless most_ctas is 0, so many are run of kernels whose results others need
};
inline Options& options() {
  static Options value;
  return value;
}

// What warps asked of shared memory, and in how many wavefronts of 32 banks of 4 bytes it was served; what they asked by global_load(): lines
// of 128 bytes, sectors of 32, and how many different ones a CTA did; barriers of CTAs; products of matrix tiles.
struct Counts {
  int64_t instructions = 0, wavefronts = 0, conflicts = 0, barriers = 0;
  int64_t lines = 0, sectors = 0, different_sectors = 0, products = 0;
};
inline Counts& counts() {
  static Counts value;
  return value;
}

// Those of the last calls, while counts are kept.
struct Launch {
  const void* kernel;
  int64_t num_ctas, num_threads, shared_memory, cluster_size, ctas_run;
  Counts counts;
};
inline std::vector<Launch>& launches() {
  static std::vector<Launch> value;
  return value;
}

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10, kPage = 4096;
constexpr size_t kSharedAlignment = 16;  // no more than the kernels ask for

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Cta;
enum class Waits { kNot, kForCta, kForWarp, kForCluster, kDone };

struct Fiber {
  Cta* cta = nullptr;
  unsigned thread = 0;
  dim3 index;
  Waits waits = Waits::kDone;
  // What it waits with: its place in the kernel, and in a warp's collective the operation, who takes part, and a value.
  const char* place = "";
  int operation = 0;
  unsigned mask = 0, source = 0;
  uint64_t value = 0, result = 0;
  char* stack = nullptr;
  void *context = nullptr, *fake_stack = nullptr;
#if !defined(__x86_64__)
  ucontext_t registers;
#endif
  // While accesses are counted: how often it has met others, and has come by each place since.
  int64_t meetings = 0;
  std::map<const void*, int64_t> visits;
};

struct Access {
  unsigned lane;
  uint64_t address;  // in shared memory: from its beginning
  size_t size;
  bool is_global;
};

struct Cta {
  dim3 index;
  unsigned rank = 0, alive = 0, at_barrier = 0;
  unsigned barrier_predicate = 0, last_predicate = 0;
  std::vector<unsigned> arrived;  // of each warp, lanes in a collective
  struct Free {
    void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t(kSharedAlignment)); }
  };
  std::unique_ptr<unsigned char[], Free> memory;
  size_t memory_size = 0;
  std::vector<Fiber> fibers;
  std::vector<std::array<std::vector<int>, 2>> tiles;  // of each warp, what its lanes put together for a matrix product
  std::map<std::tuple<unsigned, int64_t, const void*, int64_t>, std::vector<Access>> accesses;
};

// All that runs at one time: the CTAs of a cluster, one after the other cluster of a launch.
struct Machine {
  dim3 grid, block, cluster;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<Fiber*> ready;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::string error;
  uint64_t random = 1;
  void *context = nullptr, *fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#if !defined(__x86_64__)
  ucontext_t registers;
#endif
};
// Not inlined: a fiber must not remember where the thread-local storage of the thread was that began it.
inline __attribute__((noinline)) Machine& machine() {
  static thread_local Machine value;
  return value;
}
inline Fiber& fiber() { return *machine().current; }
inline unsigned lane() { return fiber().thread % kWarp; }

// Of two places in the code; the same one may be written down more than once.
inline bool is_elsewhere(const char* a, const char* b) { return a != b && std::strcmp(a, b) != 0; }

struct Abandoned {};  // unwinds the fibers of a launch that has failed

// ---- fibers ----------------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void cuda_emulator_switch(void** save, void* load);
asm(R"(.text
.weak cuda_emulator_switch
.type cuda_emulator_switch,@function
cuda_emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rcx
  jmp *%rcx
.size cuda_emulator_switch,.-cuda_emulator_switch
)");
#endif

inline void leave([[maybe_unused]] bool for_good) {
  Machine& m = machine();
  Fiber& f = *m.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.fake_stack, m.stack_bottom, m.stack_size);
#endif
#if defined(__x86_64__)
  cuda_emulator_switch(&f.context, m.context);
#else
  swapcontext(&f.registers, &m.registers);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
  if (!m.error.empty()) throw Abandoned{};
}

inline void count_meeting() {
  if (!options().counts) return;
  ++fiber().meetings;
  fiber().visits.clear();
}

inline std::string name_of(const Fiber& f) {
  return "CTA " + std::to_string(f.cta->index.x) + ", thread " + std::to_string(f.thread);
}
[[noreturn]] inline void fail(const std::string& what) {
  machine().error = "emulator: " + what + " (" + name_of(fiber()) + ")";
  throw Abandoned{};
}

void release_barrier(Cta&);

inline void run_fiber() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.stack_bottom, &m.stack_size);
#endif
  Fiber& f = *m.current;
  try {
    (*m.kernel)();
  } catch (Abandoned&) {
  }
  f.waits = Waits::kDone;
  --f.cta->alive;
  if (machine().error.empty()) release_barrier(*f.cta);  // it is not waited for any more
  leave(true);
  std::abort();
}

// Stacks outlive launches: to make one takes longer than most threads run.
inline char* stack(size_t number) {
  static thread_local std::vector<char*> stacks;
  while (number >= stacks.size()) {
    void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("emulator: no memory for the stack of a thread");
    mprotect(memory, kPage, PROT_NONE);  // an overflow is a fault, and not somebody else's stack
    stacks.push_back(static_cast<char*>(memory) + kPage);
  }
  return stacks[number];
}

inline void begin(Fiber& f) {
  f.stack = stack(f.cta->rank * f.cta->fibers.size() + f.thread);
  f.meetings = 0;
  f.visits.clear();
  f.fake_stack = nullptr;
#if defined(__x86_64__)
  // Different threads' stacks begin at different lines of the cache.
  void** top = reinterpret_cast<void**>(f.stack + kStack - f.thread % 64 * 320 / 64 * 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.context = top;
#else
  getcontext(&f.registers);
  f.registers.uc_stack.ss_sp = f.stack;
  f.registers.uc_stack.ss_size = kStack;
  f.registers.uc_link = nullptr;
  makecontext(&f.registers, run_fiber, 0);
#endif
}

inline void enter(Fiber& f) {
  Machine& m = machine();
  m.current = &f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.fake_stack, f.stack, kStack);
#endif
#if defined(__x86_64__)
  cuda_emulator_switch(&m.context, f.context);
#else
  swapcontext(&m.registers, &f.registers);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.fake_stack, nullptr, nullptr);
#endif
}

// ---- scheduling ------------------------------------------------------------------------------------------------------------------

inline Fiber* next(Machine& m) {
  size_t at = 0;
  if (options().order == Order::kRandom) {
    m.random = m.random * 6364136223846793005u + 1442695040888963407u;
    at = size_t((m.random >> 33) * m.ready.size() >> 31);
  } else {  // the first, or the last, of the first, or the last, CTA that has any
    const auto number = [](const Fiber* f) { return std::pair(f->cta->rank, f->thread); };
    const bool forward = options().order == Order::kForward;
    for (size_t i = 1; i < m.ready.size(); ++i)
      if ((number(m.ready[i]) < number(m.ready[at])) == forward) at = i;
  }
  std::swap(m.ready[at], m.ready.back());
  Fiber* f = m.ready.back();
  m.ready.pop_back();
  return f;
}

inline void release(Fiber& f) {
  f.waits = Waits::kNot;
  machine().ready.push_back(&f);
}

// Lets the threads of a CTA go on once all that have not returned wait at its barrier.
inline void release_barrier(Cta& cta) {
  if (!cta.alive || cta.at_barrier != cta.alive) return;
  const char* place = nullptr;
  for (Fiber& f : cta.fibers) {
    if (f.waits != Waits::kForCta) continue;
    if (place && is_elsewhere(place, f.place)) {
      machine().error = std::string("emulator: threads of CTA ") + std::to_string(cta.index.x) + " meet at different barriers, " +
                        place + " and " + f.place;
      return;
    }
    place = f.place;
  }
  cta.at_barrier = 0;
  cta.last_predicate = cta.barrier_predicate;
  cta.barrier_predicate = 0;
  ++counts().barriers;
  for (Fiber& f : cta.fibers)
    if (f.waits == Waits::kForCta) release(f);
}

inline bool release_cluster(Machine& m) {
  for (auto& cta : m.ctas)
    for (Fiber& f : cta->fibers)
      if (f.waits != Waits::kForCluster && f.waits != Waits::kDone) return false;
  counts().barriers += int64_t(m.ctas.size());
  for (auto& cta : m.ctas)
    for (Fiber& f : cta->fibers)
      if (f.waits == Waits::kForCluster) release(f);
  return !m.ready.empty();
}

inline void run_cluster(Machine& m) {
  for (;;) {
    if (!m.ready.empty()) {
      Fiber* f = next(m);
      enter(*f);
      m.current = nullptr;
      continue;
    }
    size_t alive = 0;
    for (auto& cta : m.ctas) alive += cta->alive;
    if (!alive) return;
    if (m.error.empty() && release_cluster(m)) continue;
    if (m.error.empty()) {
      m.error = "emulator: deadlock:";
      int shown = 0;
      for (auto& cta : m.ctas)
        for (Fiber& f : cta->fibers)
          if (f.waits != Waits::kDone && shown++ < 4) m.error += " " + name_of(f) + " waits at " + f.place + ";";
    }
    for (auto& cta : m.ctas)  // to be unwound
      for (Fiber& f : cta->fibers)
        if (f.waits != Waits::kDone) release(f);
  }
}

// ---- counting --------------------------------------------------------------------------------------------------------------------

// Accesses of a warp's lanes, each at its n-th visit to one place of the code since they last met, are one instruction. Eight bytes a lane are served by half warps,
// sixteen by quarters; lanes that ask for the same word share it.
inline void count_accesses(Cta& cta) {
  std::set<uint64_t> different;
  for (auto& [key, accesses] : cta.accesses) {
    if (accesses[0].is_global) {
      std::set<uint64_t> sectors;
      for (const Access& access : accesses) sectors.insert(access.address / 32);
      counts().lines += int64_t(sectors.size() + 3) / 4;  // at least: the host's alignment is not the device's
      counts().sectors += int64_t(sectors.size());
      different.merge(sectors);
      continue;
    }
    std::sort(accesses.begin(), accesses.end(), [](const Access& a, const Access& b) { return a.lane < b.lane; });
    const size_t lanes = accesses[0].size <= 4 ? 32 : accesses[0].size <= 8 ? 16 : 8;
    ++counts().instructions;
    for (size_t begin = 0, end; begin < accesses.size(); begin = end) {
      for (end = begin; end < accesses.size() && accesses[end].lane / lanes == accesses[begin].lane / lanes;) ++end;
      std::map<uint64_t, std::vector<uint64_t>> banks;
      for (size_t i = begin; i < end; ++i)
        for (uint64_t word = accesses[i].address / 4; word < (accesses[i].address + accesses[i].size + 3) / 4; ++word) {
          auto& words = banks[word % 32];
          if (std::find(words.begin(), words.end(), word) == words.end()) words.push_back(word);
        }
      size_t most = 0;
      for (const auto& [bank, words] : banks) most = std::max(most, words.size());
      counts().wavefronts += int64_t(most);
      counts().conflicts += int64_t(most) - 1;
    }
  }
  counts().different_sectors += int64_t(different.size());
  cta.accesses.clear();
}

// Whether a place lies in the CTA's shared memory.
inline bool is_shared(const void* place) {
  const Cta& cta = *fiber().cta;
  const auto* at = static_cast<const unsigned char*>(place);
  return at >= cta.memory.get() && at < cta.memory.get() + cta.memory_size;
}

inline void record_global(const void* site, const void* address, size_t size) {
  Fiber& f = fiber();
  f.cta->accesses[{f.thread / kWarp, f.meetings, site, f.visits[site]++}].push_back(
      {f.thread % kWarp, reinterpret_cast<uintptr_t>(address), size, true});
}
inline void record(const void* site, const void* address, size_t size) {
  Fiber& f = fiber();
  const auto* place = static_cast<const unsigned char*>(address);
  for (const auto& cta : machine().ctas) {  // whose memory it is
    if (place < cta->memory.get() || place >= cta->memory.get() + cta->memory_size) continue;
    f.cta->accesses[{f.thread / kWarp, f.meetings, site, f.visits[site]++}].push_back(
        {f.thread % kWarp, uint64_t(place - cta->memory.get()), size, false});
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------------------

inline unsigned char* shared_memory() { return fiber().cta->memory.get(); }

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, dim3 cluster, const Args&... args) {
  static_assert((sizeof(Params) + ... + 0) <= 4096, "CUDA passes at most 4 KiB of parameters to kernels of older devices");
  const unsigned threads = block.x * block.y * block.z;
  if (grid.y != 1 || grid.z != 1 || cluster.y != 1 || cluster.z != 1)
    throw Error("emulator: grids and clusters have one dimension here");
  if (threads < 1 || threads > 1024) throw Error("emulator: a CTA cannot have " + std::to_string(threads) + " threads");
  if (int64_t(shared_bytes) > options().shared_memory_limit)
    throw Error("emulator: a CTA cannot have " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (cluster.x < 1 || cluster.x > 8 || grid.x % cluster.x)
    throw Error("emulator: no cluster of " + std::to_string(cluster.x) + " CTAs");
  Machine& m = machine();
  const std::function<void()> run = [&] { kernel(args...); };
  m.kernel = &run;
  m.grid = grid, m.block = block, m.cluster = cluster;
  m.random = options().seed * 0x9E3779B97F4A7C15u + 1;
  const auto name = reinterpret_cast<const void*>(kernel);
  const int64_t wanted = options().most_ctas < 0 ? grid.x
                         : options().most_ctas > 0 && options().least_ctas
                             ? std::max(options().most_ctas, options().least_ctas(name))
                             : options().most_ctas;
  const int64_t most = std::min<int64_t>(grid.x, wanted);
  const auto run_ctas = unsigned((most + cluster.x - 1) / cluster.x * cluster.x);
  if (options().counts) counts() = {};
  for (unsigned first = 0; first < run_ctas; first += cluster.x) {
    m.error.clear();
    m.ready.clear();
    m.current = nullptr;
    m.ctas.resize(cluster.x);
    for (unsigned rank = 0; rank < cluster.x; ++rank) {
      if (!m.ctas[rank]) m.ctas[rank] = std::make_unique<Cta>();
      Cta& cta = *m.ctas[rank];
      cta.index = dim3(first + rank);
      cta.rank = rank;
      cta.alive = threads;
      cta.at_barrier = cta.barrier_predicate = 0;
      cta.arrived.assign((threads + kWarp - 1) / kWarp, 0);
      cta.tiles.resize(cta.arrived.size());
      cta.memory.reset(new (std::align_val_t(kSharedAlignment)) unsigned char[shared_bytes ? shared_bytes : 1]);
      cta.memory_size = shared_bytes;
      std::memset(cta.memory.get(), 0xcd, shared_bytes);  // nobody has written there yet
      cta.fibers.resize(threads);
      cta.accesses.clear();
    }
    for (auto& cta : m.ctas)
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& f = cta->fibers[t];
        f.cta = cta.get();
        f.thread = t;
        f.index = dim3(t % block.x, t / block.x % block.y, t / (block.x * block.y));
        begin(f);
        release(f);
      }
    run_cluster(m);
    if (options().counts)
      for (auto& cta : m.ctas) count_accesses(*cta);
    if (!m.error.empty()) {
      const std::string error = m.error;
      m.error.clear();
      throw Error(error);
    }
  }
  if (options().counts) launches().push_back({name, grid.x, threads, int64_t(shared_bytes), cluster.x, run_ctas, counts()});
}

// ---- barriers and collectives ----------------------------------------------------------------------------------------------------

inline void wait_for_cta(const char* place) {
  Fiber& f = fiber();
  f.waits = Waits::kForCta;
  f.place = place;
  ++f.cta->at_barrier;
  release_barrier(*f.cta);
  leave(false);
  count_meeting();
}
inline unsigned wait_and_count(bool predicate, const char* place) {
  fiber().cta->barrier_predicate += predicate;
  wait_for_cta(place);
  return fiber().cta->last_predicate;
}

enum Operation { kSync, kShuffle, kBallot };

inline uint64_t collective(int operation, unsigned mask, uint64_t value, unsigned source, const char* place) {
  count_meeting();
  Fiber& f = fiber();
  Cta& cta = *f.cta;
  const unsigned first = f.thread / kWarp * kWarp, lanes = unsigned(cta.fibers.size()) - first;
  if (!(mask >> (f.thread - first) & 1)) fail(std::string("a lane is not in the mask that it gives, at ") + place);
  f.operation = operation, f.mask = mask, f.value = value, f.source = source, f.place = place;
  f.waits = Waits::kForWarp;
  unsigned& arrived = cta.arrived[f.thread / kWarp];
  arrived |= 1u << (f.thread - first);
  const unsigned wanted = lanes >= kWarp ? mask : mask & ((1u << lanes) - 1);
  if ((arrived & wanted) != wanted) {
    leave(false);
    return f.result;
  }
  // The last to come does it for all.
  uint64_t ballot = 0;
  for (unsigned m = wanted; m; m &= m - 1) {
    const unsigned l = unsigned(__builtin_ctz(m));
    Fiber& other = cta.fibers[first + l];
    if (other.mask != mask || other.operation != operation || is_elsewhere(other.place, place))
      fail(std::string("lanes of a warp meet at different places, ") + place + " and " + other.place);
    if (operation == kBallot && other.value) ballot |= uint64_t{1} << l;
  }
  arrived &= ~wanted;
  for (unsigned m = wanted; m; m &= m - 1) {
    Fiber& other = cta.fibers[first + unsigned(__builtin_ctz(m))];
    const bool has_source = mask >> other.source & 1 && other.source < lanes;
    other.result = operation != kShuffle ? ballot : has_source ? cta.fibers[first + other.source].value : 0xdeadbeefdeadbeefu;
    if (&other != &f) release(other);
  }
  f.waits = Waits::kNot;
  return f.result;
}

inline unsigned ballot(unsigned mask, bool predicate, const char* place) {
  return unsigned(collective(kBallot, mask, predicate, 0, place));
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* place) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = collective(kShuffle, mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned within(unsigned source, unsigned otherwise) { return source < kWarp ? source : otherwise; }

// ---- shared memory ---------------------------------------------------------------------------------------------------------------

template <class T>
class SharedArray {
 public:
  SharedArray() = default;
  SharedArray(T* base, int64_t count) : base_(base), count_(count) {}
  template <class Index>
  __attribute__((always_inline)) T& operator[](Index at) const {
    if (uint64_t(int64_t(at)) >= uint64_t(count_)) out_of_bounds(int64_t(at));
    if (options().counts) count(base_ + at);
    return base_[at];
  }
  SharedArray operator+(int64_t offset) const { return {base_ + offset, count_ - offset}; }
  T* get() const { return base_; }
  int64_t size() const { return count_; }

 private:
  __attribute__((noinline)) void out_of_bounds(int64_t at) const {
    fail("index " + std::to_string(at) + " of an array of " + std::to_string(count_) + " in shared memory");
  }
  __attribute__((noinline)) static void count(const T* address) { record(__builtin_return_address(0), address, sizeof(T)); }
  T* base_ = nullptr;
  int64_t count_ = 0;
};

inline void check_shared(const void* base, size_t size) {
  const Cta& cta = *fiber().cta;
  const auto* begin = static_cast<const unsigned char*>(base);
  if (begin < cta.memory.get() || begin + size > cta.memory.get() + cta.memory_size)
    fail("an array of " + std::to_string(size) + " bytes does not lie in the CTA's shared memory");
}

}  // namespace cuda_emulator

template <class T>
using Shared = cuda_emulator::SharedArray<T>;
template <class T>
Shared<T> shared_array(unsigned char* base, int64_t count) {
  if (count) cuda_emulator::check_shared(base, size_t(count) * sizeof(T));
  if (reinterpret_cast<uintptr_t>(base) % alignof(T)) cuda_emulator::fail("an array in shared memory is not aligned");
  return {reinterpret_cast<T*>(base), count};
}
template <class T>
T* shared_pointer(const Shared<T>& array) {
  return array.get();
}
inline Shared<uint8_t> byte_view(const Shared<uint32_t>& words) {
  return {reinterpret_cast<uint8_t*>(words.get()), 4 * words.size()};
}
inline uint8_t* byte_view(uint32_t* words) { return reinterpret_cast<uint8_t*>(words); }
template <class T>
__attribute__((noinline)) void cuda_emulator_count_global(const T* p) {
  cuda_emulator::record_global(__builtin_return_address(0), p, sizeof(T));
}
template <class T>
__attribute__((always_inline)) inline T global_load(const T* p) {
  if (cuda_emulator::options().counts) cuda_emulator_count_global(p);
  return *p;
}

#define CUDA_EMULATOR_TEXT(x) #x
#define CUDA_EMULATOR_LINE(x) CUDA_EMULATOR_TEXT(x)
#define CUDA_EMULATOR_PLACE __FILE__ ":" CUDA_EMULATOR_LINE(__LINE__)

#define threadIdx (::cuda_emulator::fiber().index)
#define blockIdx (::cuda_emulator::fiber().cta->index)
#define blockDim (::cuda_emulator::machine().block)
#define gridDim (::cuda_emulator::machine().grid)
#define __syncthreads() ::cuda_emulator::wait_for_cta(CUDA_EMULATOR_PLACE)
#define __syncthreads_or(predicate) int(::cuda_emulator::wait_and_count((predicate), CUDA_EMULATOR_PLACE) != 0)
#define __syncthreads_count(predicate) int(::cuda_emulator::wait_and_count((predicate), CUDA_EMULATOR_PLACE))
#define CUDA_EMULATOR_SYNCWARP(mask, ...) \
  ((void)::cuda_emulator::collective(::cuda_emulator::kSync, (mask), 0, 0, CUDA_EMULATOR_PLACE))
#define __syncwarp(...) CUDA_EMULATOR_SYNCWARP(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu)
#define __shfl_sync(mask, value, source) ::cuda_emulator::shuffle((mask), (value), unsigned(source) % 32, CUDA_EMULATOR_PLACE)
#define __shfl_xor_sync(mask, value, bits) \
  ::cuda_emulator::shuffle((mask), (value), (::cuda_emulator::lane() ^ unsigned(bits)) % 32, CUDA_EMULATOR_PLACE)
#define __shfl_down_sync(mask, value, by)                                                                                     \
  ::cuda_emulator::shuffle((mask), (value), ::cuda_emulator::within(::cuda_emulator::lane() + (by), ::cuda_emulator::lane()), \
                           CUDA_EMULATOR_PLACE)
#define __shfl_up_sync(mask, value, by)                                                                                       \
  ::cuda_emulator::shuffle((mask), (value), ::cuda_emulator::within(::cuda_emulator::lane() - (by), ::cuda_emulator::lane()), \
                           CUDA_EMULATOR_PLACE)
#define __ballot_sync(mask, predicate) ::cuda_emulator::ballot((mask), (predicate), CUDA_EMULATOR_PLACE)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))

// ---- intrinsics ------------------------------------------------------------------------------------------------------------------

inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class To, class From>
To cuda_emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return cuda_emulator_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_emulator_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_emulator_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_emulator_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_emulator_bits<double>(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline int __double2int_rn(double x) { return int(std::nearbyint(x)); }
using std::exp;
using std::fabs;
using std::log;
using std::log1p;
template <class T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_integral_v<T>, "sums in floating point would depend on the schedule");
  const T old = *p;
  *p = T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(value));
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
  return std::exchange(*p, std::max(*p, value));
}
template <class T>
T atomicOr(T* p, T value) {
  return std::exchange(*p, T(*p | value));
}
template <class T>
T atomicXor(T* p, T value) {
  return std::exchange(*p, T(*p ^ value));
}
// The sum of products of four pairs of signed bytes, and c; it wraps around.
inline int __dp4a(int a, int b, int c) {
  auto sum = unsigned(c);
  for (int i = 0; i < 4; ++i) sum += unsigned(int(int8_t(unsigned(a) >> (8 * i))) * int(int8_t(unsigned(b) >> (8 * i))));
  return int(sum);
}

// ---- clusters --------------------------------------------------------------------------------------------------------------------

namespace cooperative_groups {

struct cluster_group {
  static unsigned block_rank() { return cuda_emulator::fiber().cta->rank; }
  static unsigned num_blocks() { return cuda_emulator::machine().cluster.x; }
  static void sync() {
    cuda_emulator::Fiber& f = cuda_emulator::fiber();
    f.waits = cuda_emulator::Waits::kForCluster;
    f.place = "cluster.sync()";
    cuda_emulator::leave(false);
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

inline void sync_cluster() { cooperative_groups::this_cluster().sync(); }

// The array at the same place in the shared memory of another CTA of the cluster.
template <class T>
Shared<T> cluster_array(const Shared<T>& array, unsigned rank) {
  auto& m = cuda_emulator::machine();
  if (rank >= m.cluster.x)
    cuda_emulator::fail("no CTA " + std::to_string(rank) + " in a cluster of " + std::to_string(m.cluster.x));
  cuda_emulator::Cta& other = *m.ctas[rank];
  if (other.alive != other.fibers.size())
    cuda_emulator::fail("CTA " + std::to_string(rank) + " of the cluster has begun to leave, and its memory with it");
  const auto offset = reinterpret_cast<unsigned char*>(array.get()) - cuda_emulator::shared_memory();
  return {reinterpret_cast<T*>(other.memory.get() + offset), array.size()};
}

// ---- matrix products ---------------------------------------------------------------------------------------------------------------

namespace cuda_emulator {

// sum += left right of kM x kK and kK x 8 signed bytes, by the layouts of csrc/cuda/mma.cuh. All lanes take part.
template <int kM, int kK>
void multiply_add(int (&sum)[kM / 4], const uint32_t (&left)[kM * kK / 128], const uint32_t (&right)[kK / 16]) {
  constexpr int kN = 8, kLeft = kM * kK / 128, kRight = kK / 16, kSum = kM / 4;
  Fiber& f = fiber();
  auto& [a, b] = f.cta->tiles[f.thread / kWarp];
  a.resize(kM * kK), b.resize(kK * kN);
  const int g = int(lane()) / 4, t = int(lane()) % 4;
  const auto byte = [](uint32_t word, int i) { return int(int8_t(word >> (8 * i))); };
  for (int i = 0; i < 4; ++i) {
    for (int r = 0; r < kLeft; ++r) a[size_t((g + 8 * (r % 2)) * kK + 4 * t + i + 16 * (r / 2))] = byte(left[r], i);
    for (int r = 0; r < kRight; ++r) b[size_t((4 * t + i + 16 * r) * kN + g)] = byte(right[r], i);
  }
  collective(kSync, 0xffffffffu, 0, 0, "multiply_add");
  counts().products += lane() == 0;
  for (int e = 0; e < kSum; ++e) {
    const int m = g + 8 * (e / 2), n = 2 * t + e % 2;
    auto of = unsigned(sum[e]);
    for (int k = 0; k < kK; ++k) of += unsigned(a[size_t(m * kK + k)] * b[size_t(k * kN + n)]);
    sum[e] = int(of);
  }
  collective(kSync, 0xffffffffu, 0, 0, "the end of multiply_add");
}
inline void multiply_add(int (&sum)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  multiply_add<16, 32>(sum, left, right);
}
inline void multiply_add(int& sum0, int& sum1, uint32_t left, uint32_t right) {
  int sum[] = {sum0, sum1};
  multiply_add<8, 16>(sum, {left}, {right});
  sum0 = sum[0], sum1 = sum[1];
}

}  // namespace cuda_emulator
