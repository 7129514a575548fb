// SPDX-License-Identifier: Apache-2.0
#pragma once

// Thread-block clusters (compute capability 9.0 and later). They are not in device.cuh, because their header takes nvcc a while.
#include "cuda/device.cuh"

#if !defined(GIBBS_EMULATE)

#include <cooperative_groups.h>

// A barrier of all threads of the cluster.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}
// The array at the same place in the shared memory of another CTA of the cluster.
template <class T>
__device__ __forceinline__ T* cluster_array(T* array, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(array, rank);
#else
  return array;
#endif
}

#endif
