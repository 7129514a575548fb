// SPDX-License-Identifier: Apache-2.0
// The emulator itself: what barriers, collectives, matrix fragments and clusters do, and that faults planted in kernels are found.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/cluster.cuh"
#include "cuda/mma.cuh"

using namespace gibbs;
using cuda_emulator::options;

namespace {

struct Call {
  int *out, *in;
  int n;
};

void run(void (*kernel)(Call), unsigned ctas, unsigned threads, size_t shared, const Call& call, unsigned cluster = 1) {
  cuda_emulator::launch(kernel, dim3(ctas), dim3(threads), shared, dim3(cluster), call);
}
// The error of a launch, "" if it has none.
std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}
bool fails(void (*kernel)(Call), unsigned threads, size_t shared, const Call& call, const char* with, unsigned cluster = 1) {
  const std::string error = error_of([&] { run(kernel, cluster, threads, shared, call, cluster); });
  return error.find(with) != std::string::npos;
}

__global__ void reverse(const Call p) {
  SharedMemory memory;
  const Shared<int> values = memory.take<int>(blockDim.x);
  values[threadIdx.x] = p.in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}
__global__ void reverse_without_barrier(const Call p) {
  SharedMemory memory;
  const Shared<int> values = memory.take<int>(blockDim.x);
  values[threadIdx.x] = p.in[threadIdx.x];
  __syncwarp();
  p.out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}
__global__ void collectives(const Call p) {
  const int t = int(threadIdx.x), lane = t % 32;
  int sum = lane;
  for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(kFullWarp, sum, step);
  const bool ok = sum == 496 && __shfl_sync(kFullWarp, lane * 3, 5) == 15 &&
                  __shfl_down_sync(kFullWarp, lane, 3) == (lane < 29 ? lane + 3 : lane) &&
                  __shfl_up_sync(kFullWarp, lane, 2) == (lane >= 2 ? lane - 2 : lane) &&
                  __ballot_sync(kFullWarp, lane % 3 == 0) == 0x49249249u && __any_sync(kFullWarp, lane == 7) &&
                  !__all_sync(kFullWarp, lane != 7);
  int half = lane;
  const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
  for (int step = 8; step; step >>= 1) half += __shfl_xor_sync(mask, half, step);
  const int odd = __syncthreads_count(t % 2), any = __syncthreads_or(t == 40), none = __syncthreads_or(0);
  p.out[t] = ok && half == (lane < 16 ? 120 : 376) && odd == int(blockDim.x) / 2 && any && !none;
}
__global__ void early_return(const Call p) {
  if (int(threadIdx.x) >= p.n) return;
  __syncthreads();  // those who have returned are not waited for
  atomicAdd(p.out, 1);
}
__global__ void different_barriers(const Call) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void diverged_warp(const Call) {
  if (threadIdx.x % 2)
    __ballot_sync(kFullWarp, true);
  else
    __ballot_sync(kFullWarp, false);
}
__global__ void wrong_mask(const Call) { __ballot_sync(0xffu, true); }
__global__ void deadlock(const Call) {
  if (threadIdx.x < 40)
    __syncthreads();
  else if (threadIdx.x < 48)
    __syncwarp();
}
__global__ void index_at_the_end(const Call) {
  SharedMemory memory;
  const Shared<int> first = memory.take<int>(10), second = memory.take<int>(10);
  first[threadIdx.x] = second[9];  // index 10 lies in shared memory still, but not in the array
}
__global__ void array_too_long(const Call) {
  SharedMemory memory;
  memory.take<int>(100);
}
__global__ void read_before_written(const Call p) {
  SharedMemory memory;
  p.out[threadIdx.x] = memory.take<int>(32)[threadIdx.x];
}

// One warp: out = a b + 1000 for a of 16 x 32 and b of 32 x 8 signed bytes, with elements in registers as the documentation of PTX numbers them.
__global__ void multiply(const Call p) {
  const int group = int(threadIdx.x) / 4, of_group = int(threadIdx.x) % 4;
  LeftFragment a = {};
  RightFragment b = {};
  for (int i = 0; i < 16; ++i) {
    const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8, column = of_group * 4 + (i & 3) + (i < 8 ? 0 : 16);
    a.of[i / 4] |= uint32_t(uint8_t(p.in[row * 32 + column])) << (8 * (i & 3));
  }
  for (int i = 0; i < 8; ++i) {
    const int row = of_group * 4 + (i & 3) + (i < 4 ? 0 : 16);
    b.of[i / 4] |= uint32_t(uint8_t(p.in[512 + row * 8 + group])) << (8 * (i & 3));
  }
  int c[4] = {1000, 1000, 1000, 1000};
  p.n ? multiply_add_in_parts(c, a, b) : multiply_add(c, a, b);
  for (int i = 0; i < 4; ++i) p.out[(i < 2 ? group : group + 8) * 8 + of_group * 2 + (i & 1)] = c[i];
}

__global__ void exchange(const Call p) {
  const auto cluster = cooperative_groups::this_cluster();
  SharedMemory memory;
  const Shared<int> values = memory.take<int>(blockDim.x);
  values[threadIdx.x] = int(blockIdx.x * 1000 + threadIdx.x);
  cluster.sync();
  const unsigned peer = (cluster.block_rank() + 1) % cluster.num_blocks();
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = cluster_array(values, peer)[threadIdx.x];
  if (!p.n) cluster.sync();  // else some CTA leaves while another may read its memory
}

__global__ void strided(const Call p) {
  SharedMemory memory;
  const Shared<int> values = memory.take<int>(4096);
  p.out[threadIdx.x] = values[int(threadIdx.x) * p.n];
}
__global__ void strided_doubles(const Call p) {
  SharedMemory memory;
  const Shared<double> values = memory.take<double>(2048);
  p.out[threadIdx.x] = values[int(threadIdx.x) * p.n] != 0;
}
int64_t wavefronts(void (*kernel)(Call), int stride) {
  std::vector<int> out(32);
  options().counts = true;
  cuda_emulator::counts() = {};
  run(kernel, 1, 32, 4096 * 4, {out.data(), nullptr, stride});
  options().counts = false;
  return cuda_emulator::counts().wavefronts;
}

bool multiplies(bool in_parts) {
  std::vector<int> in(768), out(128);
  uint32_t random = 1;
  for (int& x : in) random = random * 1664525u + 1013904223u, x = int8_t(random >> 24);
  run(multiply, 1, 32, 0, {out.data(), in.data(), in_parts});
  bool ok = true;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      int sum = 1000;
      for (int k = 0; k < 32; ++k) sum += in[size_t(m * 32 + k)] * in[size_t(512 + k * 8 + n)];
      ok &= out[size_t(m * 8 + n)] == sum;
    }
  return ok;
}

}  // namespace

int main() {
  std::vector<int> in(512), out(400);
  for (int i = 0; i < 512; ++i) in[size_t(i)] = i;
  int seeds_that_show_the_race = 0;
  for (const auto order : {cuda_emulator::Order::kRandom, cuda_emulator::Order::kForward, cuda_emulator::Order::kReverse}) {
    options().order = order;
    for (options().seed = 1; options().seed < 9; ++options().seed) {
      run(reverse, 4, 100, 400, {out.data(), in.data(), 0});
      for (int i = 0; i < 400; ++i) CHECK(out[size_t(i)] == i / 100 * 100 + 99 - i % 100);
      run(collectives, 1, 96, 0, {out.data(), nullptr, 0});
      for (int i = 0; i < 96; ++i) CHECK(out[size_t(i)] == 1);
      out[0] = 0;
      run(early_return, 3, 100, 0, {out.data(), nullptr, 77});
      CHECK(out[0] == 231);
      for (const bool in_parts : {false, true}) CHECK(multiplies(in_parts));
      run(exchange, 8, 40, 160, {out.data(), nullptr, 0}, 4);
      for (int i = 0; i < 320; ++i) CHECK(out[size_t(i)] == ((i / 40 + 1) % 4 + i / 160 * 4) * 1000 + i % 40);
      // planted faults
      run(reverse_without_barrier, 1, 96, 400, {out.data(), in.data(), 0});
      for (int i = 0; i < 96; ++i)
        if (out[size_t(i)] != 95 - i) {
          ++seeds_that_show_the_race;
          break;
        }
      CHECK(fails(exchange, 40, 160, {out.data(), nullptr, 1}, "begun to leave", 4) || order != cuda_emulator::Order::kRandom);
    }
  }
  CHECK(seeds_that_show_the_race >= 16);
  options() = {};
  CHECK(fails(different_barriers, 64, 0, {}, "different barriers"));
  CHECK(fails(diverged_warp, 32, 0, {}, "different places"));
  CHECK(fails(wrong_mask, 32, 0, {}, "not in the mask"));
  CHECK(fails(deadlock, 64, 0, {}, "deadlock"));
  CHECK(fails(index_at_the_end, 32, 128, {}, "of an array of 10"));
  CHECK(fails(array_too_long, 32, 128, {}, "does not lie in the CTA's shared memory"));
  CHECK(fails(reverse, 32, 1 << 20, {out.data(), in.data(), 0}, "bytes of shared memory"));
  run(read_before_written, 1, 32, 128, {out.data(), nullptr, 0});
  for (int i = 0; i < 32; ++i) CHECK(out[size_t(i)] == int(0xcdcdcdcd));
  // a launch after one that failed
  run(reverse, 1, 100, 400, {out.data(), in.data(), 0});
  CHECK(out[0] == 99);
  CHECK(wavefronts(strided, 0) == 1 && wavefronts(strided, 1) == 1 && wavefronts(strided, 2) == 2 && wavefronts(strided, 32) == 32);
  CHECK(wavefronts(strided, 33) == 1 && wavefronts(strided, 24) == 8);
  CHECK(wavefronts(strided_doubles, 1) == 2 && wavefronts(strided_doubles, 2) == 4 && wavefronts(strided_doubles, 0) == 2);
  std::puts("the emulator does as CUDA is documented to, and finds every planted fault");
  return 0;
}
