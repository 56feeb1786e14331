// The backward pass of the activation. Each level includes this file in its own namespace, after activation.h.

// For the hidden units of one expert and one token, from G = ∂y W_out and z = [u; g]: stores ∂u = w G gelu(g)
// and ∂g = w G u (Φ + g φ), and returns ⟨G, a⟩, which the token adds to ∂w. If the pointers to sums are not null, the
// expert is trained: ∂u and ∂g are then added to the sums, and h = w·a overwrites G.
template <class T>
static inline float geglu_backward_of(const T* u_row, const T* g_row, T* d_row, float weight, int64_t F, T* d_u_row,
                                      T* d_g_row, float* u_sums, float* g_sums) {
  const Vec w = broadcast(weight);
  Vec sum{};
  for (int64_t f = 0; f < F; f += kLanes) {
    const int64_t n = F - f;
    const Vec u = load(u_row + f, n), g = load(g_row + f, n), d_weighted = load(d_row + f, n);
    Vec pdf;
    const Vec cdf = normal_cdf<T>(g, &pdf);
    const Vec gelu = g * cdf;
    const Vec a = u * gelu;
    const Vec d_a = d_weighted * w;
    const Vec d_u = d_a * gelu, d_g = d_a * u * (cdf + g * pdf);
    sum += d_weighted * a;
    store(d_u_row + f, d_u, n);
    store(d_g_row + f, d_g, n);
    if (u_sums) {
      store(d_row + f, a * w, n);
      store(u_sums + f, load(u_sums + f, n) + d_u, n);
      store(g_sums + f, load(g_sums + f, n) + d_g, n);
    }
  }
  return sum_of(sum);
}

// Computes runs [begin, end), counted over all samples.
template <class T>
static void geglu_backward(const GegluBackward& p, int64_t begin, int64_t end) {
  const int64_t KF = p.K * p.F, runs = ceil_div(p.L, kRun);
  for (int64_t run = begin; run < end; ++run) {
    const int64_t b = run / runs, first = run % runs * kRun, last = min_of(p.L, first + kRun);
    double* d_weights = p.d_weights + run * p.K;
    float* d_bias = p.d_bias ? p.d_bias + run * 2 * KF : nullptr;
    if (d_bias) __builtin_memset(d_bias, 0, sizeof(float) * 2 * KF);
    for (int64_t slot = 0; slot < p.K; ++slot) {
      const int64_t unit = slot * p.F;
      float* sums = d_bias ? d_bias + unit : nullptr;
      double d_weight = 0;
      for (int64_t l = first; l < last; ++l) {
        const int64_t row = b * p.L + l;
        const T* z = static_cast<const T*>(p.z) + row * 2 * KF + unit;
        T* d_weighted = static_cast<T*>(p.d_weighted) + row * KF + unit;
        T* d_z = static_cast<T*>(p.d_z) + row * 2 * KF + unit;
        d_weight += geglu_backward_of(z, z + KF, d_weighted, p.weights[b * p.K + slot], p.F, d_z, d_z + KF, sums,
                                      sums ? sums + KF : nullptr);
      }
      d_weights[slot] = d_weight;
    }
  }
}
