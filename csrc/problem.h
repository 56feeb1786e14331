// The arguments of every kernel, as plain pointers and numbers that the bindings and all levels share. A level is the
// set of kernels for one instruction set.
//
// Shape suffixes: B samples, L tokens per sample, D width, E experts, K active experts, F hidden units of one expert,
// H = E·F. A panel is 16 tokens of one sample. Tokens are its innermost dimension, so that they lie along the lanes of
// vector registers. Weights are read from the tensors of each call. No copy outlives a call, so none can be outdated.
//
// Files that are compiled for different instruction sets include this header. It must not define functions: the linker
// may keep the copy that was compiled for one instruction set, and use it for all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mtu {

enum class Storage { float32, bfloat16, float16 };

constexpr int64_t kPanel = 16;

struct Problem {
  int64_t B, L, D, E, F, K;
  Storage compute;
  Storage x_storage;
  float eps;
  bool expert_norm;  // whether norm affines are (B, E, D), not (B, D)
  bool residual;     // whether x is added to y; x then has the compute dtype
  const void* x;     // (B, L, D) x_storage
  const float* norm_weight;
  const float* norm_bias;
  const void* w_in;        // (2H, D) compute
  const void* b_in;        // (2H,) compute
  const void* w_out;       // (D, H) compute
  const float* y_bias;     // (B, D), or one row (D,) for all samples
  int64_t y_bias_stride;   // D or 0
  const float* weights;    // (B, K)
  const int32_t* indices;  // (B, K), or null for dense routing, where K = E
  void* y;                 // (B, L, D) compute
  void* hidden;            // (B, L, 2·K·F) compute, or null if only y is wanted
  float* mean;             // (B, L), or null
  float* rstd;
};

// A range [begin, end) of the panels of all samples, and the experts that at least one of its samples uses.
struct Block {
  int64_t begin, end;
  const int32_t* experts;  // ascending
  int64_t num_experts;
};

// Memory for one block. `Layout` has the sizes.
struct Buffers {
  void* x_hat;    // [panel][slot][D, padded][16]
  void* hidden;   // [panel][slot][F, padded][16]
  void* scratch;  // for one thread
};

// Sizes in bytes of the buffers, and numbers of tiles, for one problem.
struct Layout {
  int64_t x_hat_panel;
  int64_t hidden_panel;
  int64_t scratch;        // the part that does not depend on the block
  int64_t scratch_panel;  // the part for each panel of the block
  int64_t block_panels;   // panels of a block, chosen so that it stays in the L2 cache of a core
  int64_t group;          // consecutive tiles that reuse the panels in that cache
  int64_t unit_tiles;     // tiles of the hidden units of one expert
  int64_t column_tiles;   // tiles of the columns of y
};

// Gradients that are sums over tokens are computed as one partial sum for each run of kRun tokens of a sample. So they
// do not depend on which thread computes which run.
constexpr int64_t kRun = 64;

// The backward pass of the activation.
struct GegluBackward {
  int64_t B, L, K, F;
  Storage compute;
  void* d_weighted;      // (B, L, K·F) compute, ∂y W_out; overwritten by w·a if experts are trained
  const void* z;         // (B, L, 2·K·F) compute
  const float* weights;  // (B, K)
  void* d_z;             // (B, L, 2·K·F) compute
  double* d_weights;     // (B, runs, K), sums over hidden units and tokens
  float* d_bias;         // (B, runs, 2·K·F), sums of ∂z over tokens; or null if experts are frozen
};

// The backward pass of LayerNorm and its affine.
struct NormBackward {
  int64_t B, L, D, slots;
  Storage compute, x_storage;
  const void* d_x_hat;  // (B, slots, L, D) compute
  const void* x;        // (B, L, D) x_storage
  const float* mean;    // (B, L)
  const float* rstd;
  const float* norm_weight;  // (B, slots, D)
  void* d_x;                 // (B, L, D) x_storage
  float* d_norm_weight;      // (B, runs, slots, D)
  float* d_norm_bias;
};

// x̂ in rows, for matrix products that PyTorch computes.
struct Normalize {
  int64_t B, L, D, slots;
  Storage compute, x_storage;
  const void* x;
  const float* mean;  // (B, L)
  const float* rstd;
  const float* norm_weight;  // (B, slots, D)
  const float* norm_bias;
  void* x_hat;  // (B, slots, L, D) compute
};

// The kernels of one level. Each computes a range of its work, so that the caller can share it among threads.
struct Kernels {
  const char* name;
  Layout (*layout)(const Problem&);
  void (*normalize)(const Problem&, const Block&, const Buffers&, int64_t begin, int64_t end);   // panels of the block
  void (*expert_in)(const Problem&, const Block&, const Buffers&, int64_t begin, int64_t end);   // tiles of its experts
  void (*expert_out)(const Problem&, const Block&, const Buffers&, int64_t begin, int64_t end);  // tiles of columns
  void (*geglu_backward)(const GegluBackward&, int64_t begin, int64_t end);                      // runs of all samples
  void (*norm_backward)(const NormBackward&, int64_t begin, int64_t end);                        // runs of all samples
  void (*normalize_rows)(const Normalize&, int64_t begin, int64_t end);  // tokens of all samples
};

}  // namespace mtu
