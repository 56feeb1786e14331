// Products of bfloat16 with AVX-512's instruction for pairs. Each level includes this file in its own namespace, after
// pairs.h.
//
// It works like FloatProduct, with two steps in k at a time. Weights are not copied.

struct PairProduct : PairPanels {
  static constexpr int kRows = 8, kPanels = 3;
  static constexpr int64_t kStep = 2, kDepth = 256, kGroup = 8, kBlockPanels = 12;

  static void begin() {}
  static void end() {}

  template <int P, class Epilogue>
  static inline void multiply(const Segment* segments, int64_t count, const bfloat16* upper, const bfloat16* lower,
                              int64_t stride, const bfloat16* const* panels, float* c, bool accumulate, Epilogue&) {
    __m512 sums[kRows][P];
#pragma GCC unroll 64
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 64
      for (int p = 0; p < P; ++p)
        sums[r][p] = accumulate ? _mm512_loadu_ps(c + (p * kRows + r) * kPanel) : _mm512_setzero_ps();
    for (int64_t s = 0; s < count; ++s) {
      const bfloat16* u = upper + segments[s].weight;
      const bfloat16* l = lower + segments[s].weight;
      const bfloat16* b[P];
      for (int p = 0; p < P; ++p) b[p] = panels[p] + segments[s].activation * kPanel;
      for (int64_t k = 0; k < segments[s].length; k += 2) {
        __m512bh x[P];
#pragma GCC unroll 64
        for (int p = 0; p < P; ++p) x[p] = bit_cast<__m512bh>(_mm512_loadu_si512(b[p] + k * kPanel));
#pragma GCC unroll 64
        for (int r = 0; r < kRows; ++r) {
          int32_t pair;
          __builtin_memcpy(&pair, r < kRows / 2 ? u + r * stride + k : l + (r - kRows / 2) * stride + k, sizeof(pair));
          const __m512bh w = bit_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 64
          for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], x[p], w);
        }
      }
    }
#pragma GCC unroll 64
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 64
      for (int p = 0; p < P; ++p) _mm512_storeu_ps(c + (p * kRows + r) * kPanel, sums[r][p]);
  }
};
