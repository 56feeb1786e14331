// Panels of bfloat16 [k/2][16][2] for instructions that add the products of two pairs. They need 16 lanes.

// Interleaves two rows of floats as (16, 2) bfloat16, rounded to the nearest.
static inline __m512i pack_pair(Vec even, Vec odd) {
  const __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(odd), bit_cast<__m512>(even)));
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
}

// Stores numbers k to k + 31 of 16 tokens as rows of the panel, n at most. Pairs are transposed like single floats.
static inline void store_token_pairs(bfloat16* panel, int64_t k, const Vec (&tokens)[2][kLanes], int64_t n) {
  Vec rows[kLanes];
#pragma GCC unroll 16
  for (int t = 0; t < kLanes; ++t)
    rows[t] = bit_cast<Vec>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(tokens[1][t]), bit_cast<__m512>(tokens[0][t])));
  transpose(rows);
  for (int64_t i = 0; i < min_of(kLanes, n / 2); ++i)
    store(reinterpret_cast<float*>(panel + (k + 2 * i) * kPanel), rows[i]);
}

// Stores rows k to k + n − 1 of a panel, where k and n are even.
static inline void store_pairs(bfloat16* panel, int64_t k, const Vec* rows, int64_t n) {
  for (int64_t i = 0; i < n; i += 2) _mm512_storeu_si512(panel + (k + i) * kPanel, pack_pair(rows[i], rows[i + 1]));
}

// `store_tokens` for sums (32, 16), without a residual.
static inline void store_tokens_by_pairs(const float* sums, const float* bias, bfloat16* out, int64_t stride,
                                         int64_t tokens, int64_t columns) {
  Vec pairs[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    pairs[i] = bit_cast<Vec>(
        pack_pair(load(sums + 2 * i * kPanel) + bias[2 * i], load(sums + (2 * i + 1) * kPanel) + bias[2 * i + 1]));
  transpose(pairs);
  const int64_t bytes = min_of(columns, 32) * sizeof(bfloat16);
  if (tokens == kPanel && bytes == 64) {
#pragma GCC unroll 16
    for (int t = 0; t < kLanes; ++t) __builtin_memcpy(out + t * stride, &pairs[t], 64);
  } else {
    for (int64_t t = 0; t < tokens; ++t) __builtin_memcpy(out + t * stride, &pairs[t], bytes);
  }
}

// The members that the products of such panels share.
struct PairPanels {
  using Weight = bfloat16;
  using Activation = bfloat16;
  static constexpr int kPack = 2;  // neighbouring numbers of a token in a panel
  static constexpr bool kReadsWeightsInPlace = true;

  static inline void store_activations(bfloat16* panel, int64_t k, const Vec* rows, int64_t n) {
    store_pairs(panel, k, rows, n);
  }
  static inline void store_normalized(bfloat16* panel, int64_t k, const Vec (&tokens)[kPack][kLanes], int64_t n) {
    store_token_pairs(panel, k, tokens, n);
  }
};
