// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/devices.cpp, and launches of the kernels as nvcc has compiled them, with a CUDA runtime of the tests' own. Each check uses devices
// of its own, as what is made for a device stays.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/bipartite.h"
#include "cuda/devices.h"
#include "fake_runtime.h"

using namespace gibbs;

// The text of the exception that f throws; "" if it throws none.
static std::string thrown(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}
static bool begins(const std::string& text, const char* with) { return text.starts_with(with); }

static const Device& use(int device) {
  fake::current_device = device;
  return use_device(device);
}

// A kernel of its own, so that launch() is compiled here, too, with any fault that is planted in it.
struct Number {
  int64_t number;
};
static void own_kernel(Number) {}
static const Kernel<Number>& own = registered<own_kernel>;

// A launch of clusters, or of CTAs that share more than the 48 KiB that CUDA grants without being asked.
static BipartiteParams model(int64_t n) {
  static std::vector<float> memory(1);
  BipartiteParams p = {};
  p.n1 = p.n2 = n;
  p.sweep.batch.num_models = p.sweep.batch.chains_per_model = 1;
  p.sweep.num_sweeps = 1;
  p.weight.data = memory.data();
  return p;
}

static void check_that_first_use_loads_all_kernels_once() {
  const int device = 0;
  CHECK(report_if_used(device) == nullptr && fake::calls == 0, "%ld calls to ask whether anybody has used it", long(fake::calls));
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back([] { use(device); });
  for (std::thread& thread : threads) thread.join();
  const fake::Device& used = fake::devices[device];
  CHECK(!fake::kernels.empty());
  for (const auto& [kernel, name] : fake::kernels) CHECK(used.loaded.count(kernel), "%s is not loaded", name.c_str());
  for (const auto& [kernel, times] : used.shared_memory_changes) {
    CHECK(times == 1, "%s has opted in %d times", fake::kernels[kernel].c_str(), times);
    CHECK(used.shared_memory.at(kernel) == (227 << 10) - fake::kStaticShared);
  }
  CHECK(used.shared_memory_changes.size() == fake::kernels.size());
  CHECK(used.host_allocations == 1, "%d reports", used.host_allocations);
  CHECK(report_if_used(device) == use(device).report);
}

// Of binary sweeps of bipartite models: scale, slices, packing, sweeps, unpacking; CTAs that share a model find its scale in two more.
static int launches_of(const BipartitePlan& plan) { return plan.scale.parts > 1 ? 7 : 5; }

static void check_that_launches_ask_for_nothing() {
  const int device = 1;
  const BipartiteParams p = model(200);
  const BipartitePlan plan = plan_bipartite(p, use(device).limits, BipartiteRoute::kShared);
  CHECK(plan.shape.shared_memory > 48 << 10);
  const int64_t before = fake::calls;
  launch_bipartite(p, plan, nullptr);
  launch(own, plan.shape, nullptr, Number{1});
  const int launches = launches_of(plan) + 1;
  CHECK(fake::devices[device].launches == launches && fake::calls == before + launches, "%ld calls of %d launches",
        long(fake::calls - before), launches);
}

static void check_the_first_use_ever_in_a_capture() {
  const int device = 2, other = 3;
  const BipartiteParams p = model(200);
  fake::is_capturing = true;
  const BipartitePlan plan = plan_bipartite(p, use(device).limits);
  launch_bipartite(p, plan, nullptr);
  CHECK(fake::devices[device].launches == launches_of(plan));
  CHECK(fake::capture_mode == cudaStreamCaptureModeGlobal);
  // That the check can fail: what is not loaded is refused here.
  fake::current_device = other;
  CHECK(thrown([&] { launch_bipartite(p, plan, nullptr); }) == "CUDA error: operation not permitted when stream is capturing");
  fake::is_capturing = false;
}

static void check_that_a_failed_first_use_leaves_nothing_behind() {
  const int device = 4;
  fake::devices[device].is_out_of_host_memory = true;
  CHECK(thrown([] { use(device); }) == "CUDA error: out of memory");
  CHECK(fake::capture_mode == cudaStreamCaptureModeGlobal);
  CHECK(fake::last_error == cudaSuccess, "error %d stays behind", int(fake::last_error));
  CHECK(report_if_used(device) == nullptr);
  fake::devices[device].is_out_of_host_memory = false;
  CHECK(use(device).report != nullptr);
}

static void check_clusters() {
  const int all = 5, few = 6, none = 7, old_code = 8;
  const BipartiteParams p = model(512);
  fake::devices[few].largest_cluster = 4;
  fake::devices[none].has_clusters = 0;
  fake::devices[old_code].ptx_version = 80;  // as of a build for 8.0 alone, which the driver translates for a newer device
  for (const int device : {all, few, none, old_code}) {
    int questions = 0;
    for (int times = 0; times < 2; ++times) {
      const BipartitePlan plan = plan_bipartite(p, use(device).limits, BipartiteRoute::kCluster);
      CHECK((plan.route == BipartiteRoute::kCluster) == (device == all || device == few), "device %d takes route %d", device,
            int(plan.route));
      CHECK(plan.shape.cluster_size <= (device == all ? 8 : 4), "device %d has clusters of %d", device, plan.shape.cluster_size);
      launch_bipartite(p, plan, nullptr);
      CHECK(fake::last_error == cudaSuccess, "error %d stays behind on device %d", int(fake::last_error), device);
      if (times == 0) questions = fake::devices[device].cluster_questions;
    }
    CHECK(fake::devices[device].cluster_questions == questions, "device %d is asked again", device);
  }
  CHECK(fake::devices[all].cluster_questions > 0 && fake::devices[few].cluster_questions > 0);
  const int64_t before = fake::calls;
  CHECK(use(none).limits.active_clusters == nullptr && fake::calls == before);
}

static void check_that_a_failed_launch_leaves_nothing_behind() {
  const int device = 9;
  const BipartiteParams p = model(512);
  const BipartitePlan plan = plan_bipartite(p, use(device).limits, BipartiteRoute::kCluster);
  fake::devices[device].largest_cluster = 1;
  for (const std::string& message :
       {thrown([&] { launch_bipartite(p, plan, nullptr); }), thrown([&] { launch(own, plan.shape, nullptr, Number{1}); })}) {
    CHECK(message == "CUDA error: invalid cluster size", "%s", message.c_str());
    CHECK(fake::last_error == cudaSuccess, "error %d stays behind", int(fake::last_error));
  }
}

static void check_a_device_that_is_too_old() {
  const int device = 10;
  fake::devices[device].capability = 70;
  CHECK(begins(thrown([] { use(device); }), "cuda:10 has compute capability 7.0, older than"));
  CHECK(fake::devices[device].loaded.empty());
}

// The child of a fork has neither a context nor the memory of reports: to look there would kill it.
static void check_a_fork() {
  use(0);
  const pid_t child = fork();
  if (child == 0) {
    const char* message = "CUDA cannot be used in a process that was forked";
    const bool refuses = begins(thrown([] { take_findings(*use(0).report); }), message) &&
                         begins(thrown([] { take_findings(*report_if_used(0)); }), message);
    _exit(refuses ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %d", status);
}

static void check_the_stream() {
  CHECK(thrown([] { current_stream(0); }) == "this PyTorch has no current CUDA stream to offer");
  CHECK(!is_capturing(nullptr));
  fake::is_capturing = true;
  CHECK(is_capturing(nullptr));
  CHECK(begins(thrown([] { synchronize(nullptr); }), "CUDA error: operation not permitted"));
  fake::is_capturing = false;
  synchronize(nullptr);
}

int main() {
  printf("%zu kernels\n", fake::kernels.size());
  fake::kernels[own.function] = "own_kernel";
  check_that_first_use_loads_all_kernels_once();
  check_that_launches_ask_for_nothing();
  check_the_first_use_ever_in_a_capture();
  check_that_a_failed_first_use_leaves_nothing_behind();
  check_clusters();
  check_that_a_failed_launch_leaves_nothing_behind();
  check_a_device_that_is_too_old();
  check_a_fork();
  check_the_stream();
}
