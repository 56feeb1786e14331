// The operators of the backend "cpp" for CPU tensors. Schemas, fakes and autograd are in Python (mtu_kernels/cpp).
//
// They use torch's stable interface only, so that one build works with every torch from 2.10 on.
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
    default: STD_TORCH_CHECK(false, "The backend 'cpp' computes in float32, bfloat16 and float16 only.");
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

// The bias of y: b_out (D,) for all samples, or Σ_e w[b,e] · b_out,e (B, D).
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

// The arguments of the operators.
struct Arguments {
  const Tensor &x, &norm_weight, &norm_bias, &w_in, &b_in, &w_out, &b_out, &routing_weights;
  const std::optional<Tensor>& expert_indices;
  int64_t num_experts;
  double eps;
  bool residual;
};

bool has_shape(const Tensor& t, const std::vector<int64_t>& shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != shape[i]) return false;
  return true;
}

// The public function checks the same with better messages. These checks keep other callers from reading past a tensor.
void check(const Arguments& a) {
  STD_TORCH_CHECK(a.x.dim() == 3 && a.w_out.dim() == 2 && a.routing_weights.dim() == 2,
                  "x must be (B, L, D), w_out (D, H) and routing_weights (B, K).");
  const int64_t B = a.x.size(0), D = a.x.size(2), H = a.w_out.size(1), E = a.num_experts;
  const int64_t K = a.routing_weights.size(1);
  STD_TORCH_CHECK(D > 0 && H > 0 && E > 0 && H % E == 0, "num_experts must divide H, and D must not be 0.");
  STD_TORCH_CHECK(has_shape(a.w_in, {2 * H, D}) && has_shape(a.b_in, {2 * H}) && has_shape(a.w_out, {D, H}) &&
                      (has_shape(a.b_out, {D}) || has_shape(a.b_out, {E, D})),
                  "w_in must be (2H, D), b_in (2H,), w_out (D, H), b_out (D,) or (E, D).");
  STD_TORCH_CHECK((has_shape(a.norm_weight, {B, D}) && has_shape(a.norm_bias, {B, D})) ||
                      (has_shape(a.norm_weight, {B, E, D}) && has_shape(a.norm_bias, {B, E, D})),
                  "norm_weight and norm_bias must be (B, D) or (B, E, D).");
  STD_TORCH_CHECK(has_shape(a.routing_weights, {B, K}) &&
                      (a.expert_indices ? has_shape(*a.expert_indices, {B, K}) && K >= 1 && K <= E : K == E),
                  "routing_weights and expert_indices must be (B, K), K at most E, or routing_weights alone (B, E).");
  const ScalarType compute = a.w_in.scalar_type();
  STD_TORCH_CHECK(a.b_in.scalar_type() == compute && a.w_out.scalar_type() == compute &&
                      a.b_out.scalar_type() == compute &&
                      (a.x.scalar_type() == compute || a.x.scalar_type() == ScalarType::Float),
                  "Biases and w_out must have the dtype of w_in, and x must have it or float32.");
  STD_TORCH_CHECK(!a.residual || a.x.scalar_type() == compute,
                  "x must have the dtype of w_in if it is added as the residual.");
}

// The indices as int32. Each must be in range, and a sample must not repeat one.
Tensor checked_indices(const Tensor& given, int64_t E) {
  const Tensor wide = as(given, ScalarType::Long);
  const int64_t B = wide.size(0), K = wide.size(1);
  const int64_t* from = data<int64_t>(wide);
  const Tensor indices = empty(wide, {B, K}, ScalarType::Int);
  int32_t* to = mutable_data<int32_t>(indices);
  std::vector<int64_t> user(E, -1);
  for (int64_t i = 0; i < B * K; ++i) {
    STD_TORCH_CHECK(from[i] >= 0 && from[i] < E, "expert_indices must lie in [0, ", E, "), got ", from[i], ".");
    STD_TORCH_CHECK(user[from[i]] != i / K, "expert_indices must name an expert at most once for each sample, got ",
                    from[i], " again.");
    user[from[i]] = i / K;
    to[i] = static_cast<int32_t>(from[i]);
  }
  return indices;
}

// Returns y, hidden, mean and rstd. y has no elements without with_y, and the others have none without training.
std::tuple<Tensor, Tensor, Tensor, Tensor> run(const Arguments& a, bool with_y, bool training, const Kernels& kernels) {
  check(a);
  Problem p{};
  p.B = a.x.size(0), p.L = a.x.size(1), p.D = a.x.size(2);
  p.E = a.num_experts, p.F = a.w_out.size(1) / p.E, p.K = a.routing_weights.size(1);
  p.compute = storage_of(a.w_in);
  p.x_storage = storage_of(a.x);
  p.eps = static_cast<float>(a.eps);
  p.expert_norm = a.norm_weight.dim() == 3;
  p.residual = a.residual;
  const Tensor x = torch::stable::contiguous(a.x);
  const Tensor w_in = torch::stable::contiguous(a.w_in), w_out = torch::stable::contiguous(a.w_out);
  const Tensor b_in = torch::stable::contiguous(a.b_in);
  const Tensor gamma = as(a.norm_weight, ScalarType::Float), beta = as(a.norm_bias, ScalarType::Float);
  const Tensor weights = as(a.routing_weights, ScalarType::Float);
  std::optional<Tensor> indices;
  if (a.expert_indices) {
    indices = checked_indices(*a.expert_indices, p.E);
    p.indices = data<int32_t>(*indices);
  }
  const Tensor bias = bias_of_y(a.b_out, weights, p.indices, p.B, p.K, p.D);
  p.x = x.const_data_ptr();
  p.norm_weight = data<float>(gamma), p.norm_bias = data<float>(beta);
  p.w_in = w_in.const_data_ptr(), p.b_in = b_in.const_data_ptr(), p.w_out = w_out.const_data_ptr();
  p.y_bias = data<float>(bias);
  p.y_bias_stride = a.b_out.dim() == 1 ? 0 : p.D;
  p.weights = data<float>(weights);

  const ScalarType compute = a.w_in.scalar_type();
  const Tensor y = with_y ? empty(x, {p.B, p.L, p.D}, compute) : empty(x, {0}, compute);
  const Tensor hidden = training ? empty(x, {p.B, p.L, 2 * p.K * p.F}, compute) : empty(x, {0}, compute);
  const std::vector<int64_t> rows = training ? std::vector<int64_t>{p.B, p.L} : std::vector<int64_t>{0};
  const Tensor mean = empty(x, rows, ScalarType::Float), rstd = empty(x, rows, ScalarType::Float);
  if (with_y) p.y = y.mutable_data_ptr();
  if (training) {
    p.hidden = hidden.mutable_data_ptr();
    p.mean = mutable_data<float>(mean), p.rstd = mutable_data<float>(rstd);
  }
  forward(p, kernels);
  return {y, hidden, mean, rstd};
}

#define MTU_PARAMETERS                                                                                               \
  const Tensor &x, const Tensor &norm_weight, const Tensor &norm_bias, const Tensor &w_in, const Tensor &b_in,       \
      const Tensor &w_out, const Tensor &b_out, const Tensor &routing_weights, std::optional<Tensor> expert_indices, \
      int64_t num_experts, double eps, bool residual
#define MTU_ARGUMENTS                                                                                                \
  Arguments {                                                                                                        \
    x, norm_weight, norm_bias, w_in, b_in, w_out, b_out, routing_weights, expert_indices, num_experts, eps, residual \
  }

Tensor moe_ffn_at(int64_t level, MTU_PARAMETERS) {
  return std::get<0>(run(MTU_ARGUMENTS, true, false, kernels_at(level)));
}

Tensor moe_ffn(MTU_PARAMETERS) { return std::get<0>(run(MTU_ARGUMENTS, true, false, kernels_at(0))); }

std::tuple<Tensor, Tensor, Tensor, Tensor> train_at(int64_t level, bool with_y, MTU_PARAMETERS) {
  return run(MTU_ARGUMENTS, with_y, true, kernels_at(level));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train(MTU_PARAMETERS) {
  return run(MTU_ARGUMENTS, true, true, kernels_at(0));
}

// From d_weighted (B, L, K·F), z (B, L, 2·K·F) and weights (B, K), all contiguous, returns ∂z and its sums over runs of
// tokens: of ∂w (B, runs, K) and of ∂z (B, runs, 2·K·F). If experts are trained, d_weighted is overwritten by h. If
// they are frozen, the sums of ∂z have no elements.
std::tuple<Tensor, Tensor, Tensor> geglu_backward(const Tensor& d_weighted, const Tensor& z, const Tensor& weights,
                                                  bool expert_grads, int64_t level) {
  GegluBackward p{};
  p.B = z.size(0), p.L = z.size(1);
  p.K = weights.size(1), p.F = d_weighted.size(2) / p.K;
  p.compute = storage_of(z);
  const int64_t runs = (p.L + kRun - 1) / kRun;
  const Tensor d_z = torch::stable::empty_like(z);
  const Tensor d_weights = empty(z, {p.B, runs, p.K}, ScalarType::Double);
  const Tensor d_bias =
      expert_grads ? empty(z, {p.B, runs, 2 * p.K * p.F}, ScalarType::Float) : empty(z, {0}, ScalarType::Float);
  p.d_weighted = d_weighted.mutable_data_ptr(), p.z = z.const_data_ptr();
  p.weights = data<float>(weights);
  p.d_z = d_z.mutable_data_ptr();
  p.d_weights = mutable_data<double>(d_weights);
  p.d_bias = expert_grads ? mutable_data<float>(d_bias) : nullptr;
  const Kernels& kernels = kernels_at(level);
  parallel_for_parts(p.B * runs, [&](int64_t begin, int64_t end) { kernels.geglu_backward(p, begin, end); });
  return {d_z, d_weights, d_bias};
}

// From x (B, L, D), mean and rstd (B, L) and float32 affines (B, slots, D), returns x̂ (B, slots, L, D) in the dtype of
// `like`.
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
  parallel_for_parts(p.B * p.L, [&](int64_t begin, int64_t end) { kernels.normalize_rows(p, begin, end); });
  return x_hat;
}

// From ∂x̂ (B, slots, L, D) and the arguments of `normalize`, returns ∂x, and ∂γ and ∂β (B, runs, slots, D) summed over
// runs of tokens.
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
  parallel_for_parts(p.B * runs, [&](int64_t begin, int64_t end) { kernels.norm_backward(p, begin, end); });
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
