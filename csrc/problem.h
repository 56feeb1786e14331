// What a call computes, as plain pointers and numbers: the common language of the bindings and of every level.
//
// Shape suffixes: B samples, L tokens per sample, D width, E experts, K active experts, F hidden units of one expert,
// H = E·F. A panel is 16 tokens of one sample; it holds its numbers with tokens innermost, so that tokens lie along the
// lanes of vector registers. Weights are read where they are: they are never copied, and so never stale.
//
// This header is included by files that are compiled for different instruction sets. It must hold no function: an
// inline function compiled for one of them might be the copy that the linker keeps for all.
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
  bool expert_norm;  // norm affines are (B, E, D), not (B, D)
  bool residual;     // x, then in the compute dtype, is added to y
  const void* x;     // (B, L, D) x_storage
  const float* norm_weight;
  const float* norm_bias;
  const void* w_in;        // (2H, D) compute
  const void* b_in;        // (2H,) compute
  const void* w_out;       // (D, H) compute
  const float* y_bias;     // (B, D), or one row (D,) for all samples
  int64_t y_bias_stride;   // D or 0
  const float* weights;    // (B, K)
  const int32_t* indices;  // (B, K), or null: dense, K = E
  void* y;                 // (B, L, D) compute
  void* hidden;            // (B, L, 2·K·F) compute, or null: not asked for
  float* mean;             // (B, L), or null
  float* rstd;
};

// Panels [begin, end) of all samples' panels, and the experts that any of their samples uses.
struct Block {
  int64_t begin, end;
  const int32_t* experts;  // ascending
  int64_t num_experts;
};

// Buffers of a block. Their sizes are those of `Layout`.
struct Buffers {
  void* x_hat;    // [panel][slot][D, padded][16]
  void* hidden;   // [panel][slot][F, padded][16]
  void* scratch;  // of one thread
};

// Sizes in bytes for a problem.
struct Layout {
  int64_t x_hat_panel;
  int64_t hidden_panel;
  int64_t scratch;        // a constant part
  int64_t scratch_panel;  // and one for each panel of a block
  int64_t block_panels;   // panels of a block that stays in the L2 cache of a core
  int64_t group;          // tiles that share the panels in that cache
  int64_t unit_tiles;     // tiles of the hidden units of one expert
  int64_t column_tiles;   // tiles of the columns of y
};

// Where gradients are summed over tokens, each run of kRun tokens of a sample has a sum of its own: who makes it does not
// matter then.
constexpr int64_t kRun = 64;

// Gradients of the activation.
struct GegluBackward {
  int64_t B, L, K, F;
  Storage compute;
  void* d_weighted;      // (B, L, K·F) compute, the gradient of w·a without the factor w; then w·a, if experts learn
  const void* z;         // (B, L, 2·K·F) compute
  const float* weights;  // (B, K)
  void* d_z;             // (B, L, 2·K·F) compute
  double* d_weights;     // (B, runs, K): sums over all units of all tokens
  float* d_bias;         // (B, runs, 2·K·F), sums of ∂z; or null, if no expert learns
};

// Gradients of LayerNorm and of its affine.
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

// x̂ as rows, for products that the library makes.
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

// The kernels of one level. Ranges let the caller share the work among threads.
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
