// SPDX-License-Identifier: Apache-2.0
// Measures the limits of a GPU with kernels that do one thing only. bench/gpu_steps.py compiles and runs this program.
// It writes a line of JSON for each limit. If something fails it ends with exit status 1 and CUDA's message.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/mma.cuh"

namespace {

constexpr int kThreads = 512, kRepeats = 30;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "ceilings: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

void say(const char* name, double value) {
  std::printf("{\"%s\": %.6g}\n", name, value);
  std::fflush(stdout);
}

// Median seconds of 30 calls.
template <class Call>
double seconds(const Call& call) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> times;
  for (int i = -3; i < kRepeats; ++i) {
    check(cudaEventRecord(begin), "cudaEventRecord");
    call();
    check(cudaGetLastError(), "launch");
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    if (i >= 0) times.push_back(milliseconds / 1e3);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

template <class T>
T* device_memory(size_t count) {
  T* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  check(cudaMemset(memory, 0, count * sizeof(T)), "cudaMemset");
  return memory;
}

__global__ void empty_kernel() {}

__global__ void copy_kernel(const uint4* from, uint4* to, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += gridDim.x * int64_t(blockDim.x)) to[i] = from[i];
}

// Every CTA reads the same few megabytes (a power of two) several times, past L1.
__global__ void l2_kernel(const uint4* from, uint32_t* out, int count, int passes) {
  uint32_t sum = 0;
  for (int pass = 0; pass < passes; ++pass)
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const uint4 value = __ldcg(from + ((i + blockIdx.x * 4096) & (count - 1)));
      sum += value.x ^ value.y ^ value.z ^ value.w;
    }
  if (sum == 1) *out = sum;  // this never happens, but the compiler does not know
}

// Each step of a warp is a wavefront of 32 words without bank conflicts.
__global__ void shared_kernel(uint32_t* out, int steps) {
  constexpr int kReads = 16;  // their offsets are constants, because address arithmetic would take longer than the reads
  __shared__ uint32_t words[kReads * kThreads];
  for (int i = threadIdx.x; i < kReads * kThreads; i += kThreads) words[i] = 0;
  __syncthreads();
  const volatile uint32_t* reads = words + threadIdx.x;
  uint32_t sum = 0;
  for (int step = 0; step < steps; step += kReads)
#pragma unroll
    for (int i = 0; i < kReads; ++i) sum += reads[i * kThreads];
  if (sum == 1) *out = sum;
}

// The products of the kernels, in this many independent sums.
constexpr int kSums = 8;
__global__ void tensor_kernel(int* out, int steps) {
  const gibbs::LeftFragment left = {{threadIdx.x & 1, 0, 0, 0}};
  const gibbs::RightFragment right = {{threadIdx.x & 2, 0}};
  int sums[kSums][4];
  for (int i = 0; i < 4 * kSums; ++i) sums[i / 4][i % 4] = i;  // equal sums would be computed once
  for (int step = 0; step < steps; ++step)
    for (auto& sum : sums) gibbs::multiply_add(sum, left, right);
  int total = 0;
  for (auto& sum : sums)
    for (const int element : sum) total += element;
  if (total == 1) *out = total;
}

// Clocks from a load to its value. Each load gives the address of the next.
template <bool kShared>
__global__ void latency_kernel(const uint32_t* memory, uint32_t* out, int64_t* clocks, int count, int steps) {
  __shared__ uint32_t words[4096];
  for (int i = 0; i < count; ++i) words[i % 4096] = memory[i];
  uint32_t place = 0;
  for (int step = 0; step < count; ++step) place = kShared ? words[place] : __ldcg(memory + place);
  const int64_t begin = clock64();
  for (int step = 0; step < steps; ++step) place = kShared ? words[place] : __ldcg(memory + place);
  *out = place;
  *clocks = clock64() - begin;
}

__global__ void barrier_kernel(int64_t* clocks, int steps) {
  __syncthreads();
  const int64_t begin = clock64();
  for (int step = 0; step < steps; ++step) __syncthreads();
  if (threadIdx.x == 0) *clocks = clock64() - begin;
}

__global__ void cluster_barrier_kernel(int64_t* clocks, int steps) {
#if __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  const int64_t begin = clock64();
  for (int step = 0; step < steps; ++step) cluster.sync();
  if (threadIdx.x == 0 && blockIdx.x == 0) *clocks = clock64() - begin;
#endif
}

void launch_in_clusters(int64_t* clocks, int steps) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {8, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = 8;
  config.blockDim = kThreads;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, cluster_barrier_kernel, clocks, steps), "cudaLaunchKernelEx");
}

double clocks_of(const int64_t* clocks, int steps) {
  int64_t value = 0;
  check(cudaMemcpy(&value, clocks, sizeof value, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return double(value) / steps;
}

// Microseconds of one of many empty kernels, launched one by one and as nodes of a graph.
void measure_launches() {
  constexpr int kLaunches = 1000;
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  const auto launch_all = [&] {
    for (int i = 0; i < kLaunches; ++i) empty_kernel<<<1, 32, 0, stream>>>();
  };
  const auto wait = [&] { check(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); };
  // The events are on the default stream, which waits for this one.
  say("launch_us", seconds([&] { launch_all(), wait(); }) / kLaunches * 1e6);
  say("launch_and_wait_us", seconds([&] { empty_kernel<<<1, 32, 0, stream>>>(), wait(); }) * 1e6);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  launch_all();
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  const auto replay = [&] {
    check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
    wait();
  };
  say("graph_node_us", seconds(replay) / kLaunches * 1e6);
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  const int num_sms = properties.multiProcessorCount;
  uint32_t* out = device_memory<uint32_t>(1);
  int64_t* clocks = device_memory<int64_t>(1);

  constexpr int64_t kCopied = int64_t{1} << 26;  // 1 GiB
  uint4 *from = device_memory<uint4>(kCopied), *to = device_memory<uint4>(kCopied);
  say("copy_bytes_per_second",
      2.0 * kCopied * sizeof(uint4) / seconds([&] { copy_kernel<<<16 * num_sms, kThreads>>>(from, to, kCopied); }));

  constexpr int kInL2 = (8 << 20) / sizeof(uint4), kPasses = 8;
  const double l2 = seconds([&] { l2_kernel<<<4 * num_sms, kThreads>>>(from, out, kInL2, kPasses); });
  say("L2_bytes_per_second", 4.0 * num_sms * kPasses * kInL2 * sizeof(uint4) / l2);

  constexpr int kSteps = 1 << 14;
  const double shared = seconds([&] { shared_kernel<<<4 * num_sms, kThreads>>>(out, kSteps); });
  say("shared_bytes_per_second", 4.0 * num_sms * kThreads * kSteps * sizeof(uint32_t) / shared);

  constexpr int kProducts = 1 << 12;
  int* sums = device_memory<int>(1);
  const double tensor = seconds([&] { tensor_kernel<<<2 * num_sms, kThreads>>>(sums, kProducts); });
  say("tensor_s8_multiply_adds_per_second", 2.0 * num_sms * (kThreads / 32) * kProducts * kSums * 16 * 8 * 32 / tensor);

  // The addresses form a ring, so far apart that each has a cache line of its own.
  constexpr int kRing = 4096, kStride = 65, kLoads = 1 << 12;
  std::vector<uint32_t> ring(kRing);
  for (int i = 0; i < kRing; ++i) ring[i] = (i + kStride) % kRing;
  uint32_t* memory = device_memory<uint32_t>(kRing);
  check(cudaMemcpy(memory, ring.data(), kRing * sizeof(uint32_t), cudaMemcpyHostToDevice), "cudaMemcpy");
  latency_kernel<true><<<1, 1>>>(memory, out, clocks, kRing, kLoads);
  say("shared_latency_clocks", clocks_of(clocks, kLoads));
  latency_kernel<false><<<1, 1>>>(memory, out, clocks, kRing, kLoads);
  say("L2_latency_clocks", clocks_of(clocks, kLoads));
  barrier_kernel<<<1, kThreads>>>(clocks, kLoads);
  say("barrier_clocks", clocks_of(clocks, kLoads));
  if (properties.major == 9 || properties.major == 10) {
    launch_in_clusters(clocks, kLoads);
    say("cluster_barrier_clocks", clocks_of(clocks, kLoads));
  }
  measure_launches();
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return 0;
}
