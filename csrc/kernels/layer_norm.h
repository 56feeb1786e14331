// LayerNorm into panels and into rows, and its backward pass. Each level includes this file in its own namespace.

struct Statistics {
  float mean, rstd;
};

// The sum of each row, in the lane with the row's number. Overwrites the rows.
static inline Vec sums_of(Vec* rows) {
  transpose(rows);
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < step; ++i) rows[i] += rows[i + step];
  return rows[0];
}

// For each of n rows, in the lane with the row's number: the sum of x − centre, and the sum of its squares.
template <class X>
static inline void centred_sums(const X* x, int64_t n, int64_t D, Vec centres, Vec& sum, Vec& square) {
  const int64_t whole = D / kLanes * kLanes;
  Bits lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const Bits is_rest = lane < static_cast<int32_t>(D - whole);
  Vec sums[kLanes] = {}, squares[kLanes] = {};
  for (int64_t t = 0; t < n; ++t) {
    const X* row = x + t * D;
    const Vec centre = broadcast(centres[t]);
    Vec total[2]{}, squared[2]{};
    auto add = [&](Vec centred, int chain) {
      total[chain] += centred;
      squared[chain] += centred * centred;
    };
    int64_t d = 0;
    for (; d + 2 * kLanes <= whole; d += 2 * kLanes) {
      add(load(row + d) - centre, 0);
      add(load(row + d + kLanes) - centre, 1);
    }
    if (d < whole) add(load(row + d) - centre, 0);
    if (whole < D) add(bit_cast<Vec>(bit_cast<Bits>(load(row + whole, D - whole) - centre) & is_rest), 1);
    sums[t] = total[0] + total[1];
    squares[t] = squared[0] + squared[1];
  }
  sum = sums_of(sums);
  square = sums_of(squares);
}

// The mean and 1 / sqrt(variance + eps) of a panel's tokens, for kLanes tokens at a time.
//
// One pass sums around a guess of the mean, which it takes from the first numbers of each row. So digits do not cancel
// where |mean| is much larger than the deviation. If the guess is far off, a second pass sums around the mean of the
// first.
template <class X>
static inline void statistics_of(const X* x, int64_t tokens, int64_t D, float eps, Statistics* statistics) {
  const float width = static_cast<float>(D);
  for (int64_t t0 = 0; t0 < tokens; t0 += kLanes) {
    const int64_t n = min_of(kLanes, tokens - t0);
    const X* rows = x + t0 * D;
    Vec firsts[kLanes] = {};
    for (int64_t t = 0; t < n; ++t) firsts[t] = load(rows + t * D, D);
    Vec centre = sums_of(firsts) / static_cast<float>(min_of(kLanes, D));
    Vec sum, square;
    centred_sums(rows, n, D, centre, sum, square);
    Vec shift = sum / width, variance = square / width - shift * shift;
    bool is_far = false;
    for (int64_t t = 0; t < n; ++t) is_far = is_far || shift[t] * shift[t] > variance[t];
    if (is_far) {
      centre += shift;
      centred_sums(rows, n, D, centre, sum, square);
      shift = sum / width;
      variance = square / width - shift * shift;
    }
    for (int64_t t = 0; t < n; ++t)
      // If the squares overflow, the last product is NaN: no result is better than a wrong one.
      statistics[t0 + t] = {centre[t] + shift[t],
                            1.0f / __builtin_sqrtf(maximum_of(variance[t], 0.0f) + eps) + 0.0f * variance[t]};
  }
}

// Normalises n numbers of `tokens` tokens, both at most kLanes. The other lanes and rows are zero.
template <class X>
static inline void normalize_tokens(const X* x, int64_t stride, int64_t n, const Statistics* statistics, int64_t tokens,
                                    const float* gamma, const float* beta, Vec* rows) {
  const Vec g = load(gamma, n), b = load(beta, n);
  if (tokens >= kLanes && n >= kLanes) {
#pragma GCC unroll 16
    for (int t = 0; t < kLanes; ++t)
      rows[t] = (load(x + t * stride) - statistics[t].mean) * (g * statistics[t].rstd) + b;
    return;
  }
  for (int t = 0; t < kLanes; ++t)
    rows[t] = t < tokens ? (load(x + t * stride, n) - statistics[t].mean) * (g * statistics[t].rstd) + b : Vec{};
}

// Computes x̂ of panels [begin, end) of the block, once for each slot that has its own affine.
template <class T, class X>
static void normalize_panels(const Problem& p, const Block& block, const Buffers& buffers, int64_t begin, int64_t end) {
  using Product = ProductOf<T>;
  const int64_t padded = round_up(p.D, Product::kStep);
  const int64_t slots = p.expert_norm ? p.K : 1;
  const int64_t panels_per_sample = ceil_div(p.L, kPanel);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = (block.begin + i) / panels_per_sample;
    const int64_t l = (block.begin + i) % panels_per_sample * kPanel;
    const int64_t tokens = min_of(kPanel, p.L - l);
    const X* x = static_cast<const X*>(p.x) + (b * p.L + l) * p.D;
    Statistics statistics[kPanel] = {};
    statistics_of(x, tokens, p.D, p.eps, statistics);
    for (int64_t t = 0; p.mean && t < tokens; ++t) {
      p.mean[b * p.L + l + t] = statistics[t].mean;
      p.rstd[b * p.L + l + t] = statistics[t].rstd;
    }
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t e = p.indices ? p.indices[b * p.K + slot] : slot;
      const int64_t affine = (p.expert_norm ? b * p.E + e : b) * p.D;
      auto* panel = static_cast<typename Product::Activation*>(buffers.x_hat) + (i * slots + slot) * padded * kPanel;
      for (int64_t d = 0; d < padded; d += Product::kPack * kLanes)
        for (int64_t t = 0; t < kPanel; t += kLanes) {
          Vec rows[Product::kPack][kLanes];
#pragma GCC unroll 2
          for (int half = 0; half < Product::kPack; ++half)
            normalize_tokens(x + t * p.D + d + half * kLanes, p.D, p.D - d - half * kLanes, statistics + t, tokens - t,
                             p.norm_weight + affine + d + half * kLanes, p.norm_bias + affine + d + half * kLanes,
                             rows[half]);
          Product::store_normalized(panel + t, d, rows, padded - d);
        }
    }
  }
}

// Computes x̂ (B, slots, L, D) for tokens [begin, end), counted over all samples.
template <class T, class X>
static void normalize_rows(const Normalize& n, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / n.L, l = i % n.L;
    const X* x = static_cast<const X*>(n.x) + i * n.D;
    for (int64_t slot = 0; slot < n.slots; ++slot) {
      T* out = static_cast<T*>(n.x_hat) + ((b * n.slots + slot) * n.L + l) * n.D;
      const float* gamma = n.norm_weight + (b * n.slots + slot) * n.D;
      const float* beta = n.norm_bias + (b * n.slots + slot) * n.D;
      for (int64_t d = 0; d < n.D; d += kLanes) {
        const Vec unit = (load(x + d, n.D - d) - n.mean[i]) * n.rstd[i];
        store(out + d, unit * load(gamma + d, n.D - d) + load(beta + d, n.D - d), n.D - d);
      }
    }
  }
}

// Computes ∂x, and the partial sums of ∂γ and ∂β, for runs [begin, end) of kRun tokens.
//
// ∂n = Σ_slot γ ∂x̂, ∂x = rstd (∂n − mean(∂n) − n mean(n ∂n)), with n = (x − mean) rstd.
template <class T, class X>
static void norm_backward(const NormBackward& g, int64_t begin, int64_t end) {
  const int64_t runs = ceil_div(g.L, kRun);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / runs, first = i % runs * kRun, last = min_of(g.L, first + kRun);
    float* d_gamma = g.d_norm_weight + i * g.slots * g.D;
    float* d_beta = g.d_norm_bias + i * g.slots * g.D;
    __builtin_memset(d_gamma, 0, sizeof(float) * g.slots * g.D);
    __builtin_memset(d_beta, 0, sizeof(float) * g.slots * g.D);
    for (int64_t l = first; l < last; ++l) {
      const int64_t row = b * g.L + l;
      const X* x = static_cast<const X*>(g.x) + row * g.D;
      const Vec mean = broadcast(g.mean[row]), rstd = broadcast(g.rstd[row]);
      auto d_x_hat_at = [&](int64_t d, int64_t slot) {
        const T* d_x_hat = static_cast<const T*>(g.d_x_hat) + ((b * g.slots + slot) * g.L + l) * g.D;
        return load(d_x_hat + d, g.D - d);
      };
      const float* gamma = g.norm_weight + b * g.slots * g.D;
      Vec total{}, projected{};
      for (int64_t d = 0; d < g.D; d += kLanes) {
        const Vec unit = (load(x + d, g.D - d) - mean) * rstd;
        Vec d_unit{};
        for (int64_t slot = 0; slot < g.slots; ++slot) {
          const Vec d_x_hat = d_x_hat_at(d, slot);
          d_unit += d_x_hat * load(gamma + slot * g.D + d, g.D - d);
          float* to_gamma = d_gamma + slot * g.D + d;
          float* to_beta = d_beta + slot * g.D + d;
          store(to_gamma, load(to_gamma, g.D - d) + d_x_hat * unit, g.D - d);
          store(to_beta, load(to_beta, g.D - d) + d_x_hat, g.D - d);
        }
        total += d_unit;
        projected += d_unit * unit;
      }
      const float mean_total = sum_of(total) / static_cast<float>(g.D);
      const float mean_projected = sum_of(projected) / static_cast<float>(g.D);
      X* d_x = static_cast<X*>(g.d_x) + row * g.D;
      for (int64_t d = 0; d < g.D; d += kLanes) {
        const Vec unit = (load(x + d, g.D - d) - mean) * rstd;
        Vec d_unit{};
        for (int64_t slot = 0; slot < g.slots; ++slot)
          d_unit += d_x_hat_at(d, slot) * load(gamma + slot * g.D + d, g.D - d);
        store(d_x + d, rstd * (d_unit - mean_total - unit * mean_projected), g.D - d);
      }
    }
  }
}
