// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "core/outcome.h"

namespace gibbs {

// Memory on a cache line's boundary. It is cleared once, because kernels read the padding. It comes from malloc, because aligned_alloc
// of glibc does not reuse small blocks that were freed before, which costs a call of a small model a tenth of its time.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t line = 64, bytes = size_t(round_up(count * int64_t(sizeof(T)), line)) + line;
    memory_.reset(std::malloc(bytes + line));
    if (!memory_) throw std::bad_alloc();
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + line - 1) / line * line);
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  T* get() const { return data_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  T* data_;
};

}  // namespace gibbs
