// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "core/outcome.h"

namespace gibbs {

// Memory on a cache line's boundary. It is cleared once, because kernels read the padding.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, size_t(round_up(count * int64_t(sizeof(T)) + 64, 64))))) {
    if (!data_) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_.get()), 0, size_t(round_up(count * int64_t(sizeof(T)) + 64, 64)));
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace gibbs
