// The operators of the backend "cpp" for CPU tensors. Schemas, fakes and autograd are in Python (mtu_kernels/cpp.py).
//
// Only the part of torch's C++ interface that stays the same from version to version is used, so that one build serves
// every torch from 2.10 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "forward.h"
#include "levels.h"
#include "parallel.h"

namespace mtu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: STD_TORCH_CHECK(false, "The backend 'cpp' computes in float32, bfloat16 and float16.");
  }
}

const Kernels& kernels_at(int64_t i) {
  const Kernels* kernels = level(i);
  STD_TORCH_CHECK(kernels != nullptr, "This machine has no level ", i, ".");
  return *kernels;
}

Tensor as(const Tensor& t, ScalarType dtype) {
  const Tensor typed = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return torch::stable::contiguous(typed);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

// The bias of y: b_out (D,) for all samples, or Σ_e w[b,e] · b_out,e for each.
Tensor bias_of_y(const Tensor& b_out, const Tensor& weights, const int32_t* indices, int64_t B, int64_t K, int64_t D) {
  const Tensor rows = as(b_out, ScalarType::Float);
  if (b_out.dim() == 1) return rows;
  const Tensor bias = empty(b_out, {B, D}, ScalarType::Float);
  const float* w = data<float>(weights);
  for (int64_t b = 0; b < B; ++b) {
    float* sums = mutable_data<float>(bias) + b * D;
    std::fill(sums, sums + D, 0.0f);
    for (int64_t k = 0; k < K; ++k) {
      const float* row = data<float>(rows) + (indices ? indices[b * K + k] : k) * D;
      for (int64_t d = 0; d < D; ++d) sums[d] += w[b * K + k] * row[d];
    }
  }
  return bias;
}

// y (no elements unless wanted), hidden, mean, rstd (no elements unless training).
std::tuple<Tensor, Tensor, Tensor, Tensor> run(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& w_in, const Tensor& b_in,
    const Tensor& w_out, const Tensor& b_out, const Tensor& routing_weights,
    const std::optional<Tensor>& expert_indices, int64_t num_experts, double eps, bool with_y, bool training,
    const Kernels& kernels) {
  Problem p{};
  p.B = x.size(0), p.L = x.size(1), p.D = x.size(2);
  p.E = num_experts, p.F = w_out.size(1) / num_experts, p.K = routing_weights.size(1);
  p.compute = storage_of(w_in);
  p.x_storage = storage_of(x);
  p.eps = static_cast<float>(eps);
  p.expert_norm = norm_weight.dim() == 3;
  const ScalarType compute = w_in.scalar_type();
  const Tensor x_c = torch::stable::contiguous(x), w_in_c = torch::stable::contiguous(w_in);
  const Tensor w_out_c = torch::stable::contiguous(w_out), b_in_c = torch::stable::contiguous(b_in);
  const Tensor gamma = as(norm_weight, ScalarType::Float), beta = as(norm_bias, ScalarType::Float);
  const Tensor weights = as(routing_weights, ScalarType::Float);
  std::optional<Tensor> indices;
  if (expert_indices) {
    indices = as(*expert_indices, ScalarType::Int);
    p.indices = data<int32_t>(*indices);
    // The public function has checked them; foreign callers of the operator must not make us read anywhere.
    for (int64_t i = 0; i < p.B * p.K; ++i)
      STD_TORCH_CHECK(p.indices[i] >= 0 && p.indices[i] < p.E, "expert_indices must lie in [0, ", p.E, "), got ",
                      p.indices[i], ".");
  }
  const Tensor bias = bias_of_y(b_out, weights, p.indices, p.B, p.K, p.D);
  p.x = x_c.const_data_ptr();
  p.norm_weight = data<float>(gamma), p.norm_bias = data<float>(beta);
  p.w_in = w_in_c.const_data_ptr(), p.b_in = b_in_c.const_data_ptr(), p.w_out = w_out_c.const_data_ptr();
  p.y_bias = data<float>(bias);
  p.y_bias_stride = b_out.dim() == 1 ? 0 : p.D;
  p.weights = data<float>(weights);

  const bool has_rows = p.B * p.L * p.D > 0;
  const Tensor y = with_y ? empty(x, {p.B, p.L, p.D}, compute) : empty(x, {0}, compute);
  const Tensor hidden = training ? empty(x, {p.B, p.L, 2 * p.K * p.F}, compute) : empty(x, {0}, compute);
  const std::vector<int64_t> rows = training ? std::vector<int64_t>{p.B, p.L} : std::vector<int64_t>{0};
  const Tensor mean = empty(x, rows, ScalarType::Float), rstd = empty(x, rows, ScalarType::Float);
  if (with_y) p.y = y.mutable_data_ptr();
  if (training) {
    p.hidden = hidden.mutable_data_ptr();
    p.mean = mutable_data<float>(mean), p.rstd = mutable_data<float>(rstd);
  }
  if (has_rows) forward(p, kernels);
  return {y, hidden, mean, rstd};
}

Tensor moe_ffn_at(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& w_in,
                  const Tensor& b_in, const Tensor& w_out, const Tensor& b_out, const Tensor& routing_weights,
                  std::optional<Tensor> expert_indices, int64_t num_experts, double eps, int64_t level) {
  return std::get<0>(run(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, routing_weights, expert_indices,
                         num_experts, eps, true, false, kernels_at(level)));
}

Tensor moe_ffn(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& w_in,
               const Tensor& b_in, const Tensor& w_out, const Tensor& b_out, const Tensor& routing_weights,
               std::optional<Tensor> expert_indices, int64_t num_experts, double eps) {
  return moe_ffn_at(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, routing_weights, expert_indices, num_experts,
                    eps, 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_at(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& w_in, const Tensor& b_in,
    const Tensor& w_out, const Tensor& b_out, const Tensor& routing_weights, std::optional<Tensor> expert_indices,
    int64_t num_experts, double eps, bool with_y, int64_t level) {
  return run(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, routing_weights, expert_indices, num_experts, eps,
             with_y, true, kernels_at(level));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train(
    const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& w_in, const Tensor& b_in,
    const Tensor& w_out, const Tensor& b_out, const Tensor& routing_weights, std::optional<Tensor> expert_indices,
    int64_t num_experts, double eps) {
  return train_at(x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, routing_weights, expert_indices, num_experts,
                  eps, true, 0);
}

// (B, L, K·F) d_weighted, (B, L, 2·K·F) z, (B, K) weights → h, ∂z, and sums over runs of tokens of ∂w, (B, runs, K), and of
// ∂z, (B, runs, 2·K·F). Without experts that learn, h and the sums of ∂z have no elements. All contiguous.
std::tuple<Tensor, Tensor, Tensor, Tensor> geglu_backward(const Tensor& d_weighted, const Tensor& z,
                                                          const Tensor& weights, bool expert_grads, int64_t level) {
  GegluBackward p{};
  p.B = z.size(0), p.L = z.size(1);
  p.K = weights.size(1), p.F = d_weighted.size(2) / p.K;
  p.compute = storage_of(z);
  const int64_t runs = (p.L + kRun - 1) / kRun;
  const Tensor h = expert_grads ? torch::stable::empty_like(d_weighted) : empty(z, {0}, z.scalar_type());
  const Tensor d_z = torch::stable::empty_like(z);
  const Tensor d_weights = empty(z, {p.B, runs, p.K}, ScalarType::Float);
  const Tensor d_bias = expert_grads ? empty(z, {p.B, runs, 2 * p.K * p.F}, ScalarType::Float)
                                     : empty(z, {0}, ScalarType::Float);
  p.d_weighted = d_weighted.const_data_ptr(), p.z = z.const_data_ptr();
  p.weights = data<float>(weights);
  p.d_z = d_z.mutable_data_ptr();
  p.d_weights = mutable_data<float>(d_weights);
  if (expert_grads) {
    p.h = h.mutable_data_ptr();
    p.d_bias = mutable_data<float>(d_bias);
  }
  const Kernels& kernels = kernels_at(level);
  share(p.B * runs, [&](int64_t begin, int64_t end) { kernels.geglu_backward(p, begin, end); });
  return {h, d_z, d_weights, d_bias};
}

// x (B, L, D), mean and rstd (B, L), affines (B, slots, D) float32 → x̂ (B, slots, L, D) in the dtype of `like`.
Tensor normalize(const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& norm_weight,
                 const Tensor& norm_bias, const Tensor& like, int64_t level) {
  Normalize p{};
  p.B = x.size(0), p.L = x.size(1), p.D = x.size(2), p.slots = norm_weight.size(1);
  p.compute = storage_of(like), p.x_storage = storage_of(x);
  const Tensor x_hat = empty(x, {p.B, p.slots, p.L, p.D}, like.scalar_type());
  p.x = x.const_data_ptr();
  p.mean = data<float>(mean), p.rstd = data<float>(rstd);
  p.norm_weight = data<float>(norm_weight), p.norm_bias = data<float>(norm_bias);
  p.x_hat = x_hat.mutable_data_ptr();
  const Kernels& kernels = kernels_at(level);
  share(p.B * p.L, [&](int64_t begin, int64_t end) { kernels.normalize_rows(p, begin, end); });
  return x_hat;
}

// ∂x̂ (B, slots, L, D) and what `normalize` took → ∂x, and sums of ∂γ and ∂β over runs of tokens, (B, runs, slots, D).
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& d_x_hat, const Tensor& x, const Tensor& mean,
                                                 const Tensor& rstd, const Tensor& norm_weight, int64_t level) {
  NormBackward p{};
  p.B = x.size(0), p.L = x.size(1), p.D = x.size(2), p.slots = norm_weight.size(1);
  p.compute = storage_of(d_x_hat), p.x_storage = storage_of(x);
  const int64_t runs = (p.L + kRun - 1) / kRun;
  const Tensor d_x = torch::stable::empty_like(x);
  const Tensor d_gamma = empty(x, {p.B, runs, p.slots, p.D}, ScalarType::Float);
  const Tensor d_beta = empty(x, {p.B, runs, p.slots, p.D}, ScalarType::Float);
  p.d_x_hat = d_x_hat.const_data_ptr(), p.x = x.const_data_ptr();
  p.mean = data<float>(mean), p.rstd = data<float>(rstd), p.norm_weight = data<float>(norm_weight);
  p.d_x = d_x.mutable_data_ptr();
  p.d_norm_weight = mutable_data<float>(d_gamma), p.d_norm_bias = mutable_data<float>(d_beta);
  const Kernels& kernels = kernels_at(level);
  share(p.B * runs, [&](int64_t begin, int64_t end) { kernels.norm_backward(p, begin, end); });
  return {d_x, d_gamma, d_beta};
}

}  // namespace
}  // namespace mtu

STABLE_TORCH_LIBRARY_IMPL(mtu_kernels, CPU, m) {
  m.impl("moe_ffn_cpp", TORCH_BOX(&mtu::moe_ffn));
  m.impl("moe_ffn_cpp_train", TORCH_BOX(&mtu::train));
  m.impl("cpp_moe_ffn_at", TORCH_BOX(&mtu::moe_ffn_at));
  m.impl("cpp_train_at", TORCH_BOX(&mtu::train_at));
  m.impl("cpp_geglu_backward", TORCH_BOX(&mtu::geglu_backward));
  m.impl("cpp_normalize", TORCH_BOX(&mtu::normalize));
  m.impl("cpp_norm_backward", TORCH_BOX(&mtu::norm_backward));
}

// The name of the i-th level that this machine runs, the fastest first; null past the last one.
extern "C" __attribute__((visibility("default"))) const char* mtu_level_name(int64_t i) {
  const mtu::Kernels* kernels = mtu::level(i);
  return kernels ? kernels->name : nullptr;
}
