// Products in float32 vectors, for every storage dtype. Each level includes this file in its own namespace, after
// vector.h.
//
// It multiplies R rows of weights, with k innermost, by P panels of activations [k][16], and stores c [panel][R][16].
// Each step in k loads the vectors of the panels and broadcasts one number of each row. Weights of 16 bits are
// converted to float32 first, once for all panels of a block.

template <class T>
struct FloatProduct {
  using Weight = float;      // the type of weights that `multiply` reads
  using Activation = float;  // the type of a panel's numbers
  static constexpr int kRows = kFloatRows;
  static constexpr int kPanels = kFloatPanels;
  static constexpr int64_t kStep = 1;  // k is padded to a multiple of this
  static constexpr int kPack = 1;      // neighbouring numbers of a token in a panel
  // Steps in k between visits of c: sums of so few terms round like those of libraries.
  static constexpr int64_t kDepth = 256;
  static constexpr int64_t kGroup = 8;
  static constexpr int64_t kBlockPanels = 12;
  static constexpr bool kReadsWeightsInPlace = sizeof(T) == 4;

  static void begin() {}
  static void end() {}

  static inline void store_activations(float* panel, int64_t k, const Vec* rows, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store(panel + (k + i) * kPanel, rows[i]);
  }
  static inline void store_normalized(float* panel, int64_t k, Vec (&tokens)[kPack][kLanes], int64_t n) {
    transpose(tokens[0]);
    store_activations(panel, k, tokens[0], min_of(kLanes, n));
  }

  template <int P, class Epilogue>
  static inline void multiply(const Segment* segments, int64_t count, const float* upper, const float* lower,
                              int64_t stride, const float* const* panels, float* c, bool accumulate, Epilogue&) {
    constexpr int V = kPanelVecs;
    Vec sums[kRows][P][V];
#pragma GCC unroll 64
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 64
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 64
        for (int v = 0; v < V; ++v) sums[r][p][v] = Vec{};
    for (int64_t s = 0; s < count; ++s) {
      const float* u = upper + segments[s].weight;
      const float* l = lower + segments[s].weight;
      const float* b[P];
      for (int p = 0; p < P; ++p) b[p] = panels[p] + segments[s].activation * kPanel;
      for (int64_t k = 0; k < segments[s].length; ++k) {
        Vec x[P][V];
#pragma GCC unroll 64
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 64
          for (int v = 0; v < V; ++v) x[p][v] = load(b[p] + k * kPanel + v * kLanes);
#pragma GCC unroll 64
        for (int r = 0; r < kRows; ++r) {
          const float w = r < kRows / 2 ? u[r * stride + k] : l[(r - kRows / 2) * stride + k];
#pragma GCC unroll 64
          for (int p = 0; p < P; ++p)
#pragma GCC unroll 64
            for (int v = 0; v < V; ++v) sums[r][p][v] += w * x[p][v];
        }
      }
    }
#pragma GCC unroll 64
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 64
      for (int p = 0; p < P; ++p)
#pragma GCC unroll 64
        for (int v = 0; v < V; ++v) {
          float* to = c + (p * kRows + r) * kPanel + v * kLanes;
          store(to, accumulate ? load(to) + sums[r][p][v] : sums[r][p][v]);
        }
  }
};
