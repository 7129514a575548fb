// SPDX-License-Identifier: Apache-2.0
#include "cpu/driver.h"

namespace gibbs {

Batch::Batch(std::vector<int64_t> sizes, const std::vector<bool>& is_model_dim)
    : sizes_(std::move(sizes)), contiguous_(sizes_.size()) {
  int64_t stride = 1;
  for (size_t d = sizes_.size(); d-- > 0; stride *= sizes_[d]) contiguous_[d] = stride;
  for (size_t d = 0; d < sizes_.size(); ++d) {
    (is_model_dim[d] ? model_dims_ : chain_dims_).push_back(int(d));
    (is_model_dim[d] ? num_models_ : chains_per_model_) *= sizes_[d];
  }
}

int64_t Batch::offset(const std::vector<int64_t>& strides, int64_t model, int64_t chain) const {
  int64_t at = 0;
  for (size_t i = model_dims_.size(); i-- > 0; model /= sizes_[size_t(model_dims_[i])])
    at += model % sizes_[size_t(model_dims_[i])] * strides[size_t(model_dims_[i])];
  for (size_t i = chain_dims_.size(); i-- > 0; chain /= sizes_[size_t(chain_dims_[i])])
    at += chain % sizes_[size_t(chain_dims_[i])] * strides[size_t(chain_dims_[i])];
  return at;
}

}  // namespace gibbs
