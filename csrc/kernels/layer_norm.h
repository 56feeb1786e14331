// LayerNorm into panels and into rows, and its gradients. Included inside a level's own namespace.

struct Statistics {
  float mean, rstd;
};

// In two passes: about the first pass's mean, so that nothing cancels where |mean| is large beside the deviation, and the
// second pass also finds what rounding took from that mean.
template <class X>
static inline Statistics statistics_of(const X* x, int64_t D, float eps) {
  constexpr int kChains = 4;  // additions in flight
  Vec sums[kChains] = {};
  int64_t d = 0;
  for (; d + kChains * kLanes <= D; d += kChains * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) sums[i] += load(x + d + i * kLanes);
  for (; d < D; d += kLanes) sums[0] += load(x + d, D - d);
  const float mean = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(D);

  Vec deviations[kChains] = {}, squares[kChains] = {};
  for (d = 0; d + kChains * kLanes <= D; d += kChains * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      const Vec centred = load(x + d + i * kLanes) - mean;
      deviations[i] += centred;
      squares[i] += centred * centred;
    }
  float deviation = sum_of((deviations[0] + deviations[1]) + (deviations[2] + deviations[3]));
  float square = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; d < D; ++d) {
    X lanes[kLanes] = {x[d]};
    const float centred = load(lanes)[0] - mean;
    deviation += centred;
    square += centred * centred;
  }
  const float shift = deviation / static_cast<float>(D);
  const float variance = square / static_cast<float>(D) - shift * shift;
  // Where the squares overflow, no number is better than a wrong one: the product is NaN then.
  return {mean + shift, 1.0f / __builtin_sqrtf(maximum_of(variance, 0.0f) + eps) + 0.0f * variance};
}

// kLanes numbers of each of kLanes tokens, n of them and `tokens` of these: the rest is zero.
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

// x̂ of panels [begin, end), counted from the block's first, once for each slot that has an affine of its own.
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
    for (int64_t t = 0; t < tokens; ++t) {
      statistics[t] = statistics_of(x + t * p.D, p.D, p.eps);
      if (p.mean) {
        p.mean[b * p.L + l + t] = statistics[t].mean;
        p.rstd[b * p.L + l + t] = statistics[t].rstd;
      }
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

// x̂ of tokens [begin, end) of all samples, as rows of (B, slots, L, D).
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

// Runs [begin, end) of kRun tokens: ∂x, and the run's sums for ∂γ and ∂β.
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
