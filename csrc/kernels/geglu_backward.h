// Gradients of the weighed activation. Included inside a level's own namespace.

// Rows (b, l) [begin, end): from G = ∂(w·a) and z = [u; g], ∂u = w G gelu(g), ∂g = w G u (Φ + g φ), h = w·a, and the
// token's summand ⟨G, a⟩ of ∂w.
template <class T>
static void geglu_backward(const GegluBackward& p, int64_t begin, int64_t end) {
  const int64_t KF = p.K * p.F;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t slot = 0; slot < p.K; ++slot) {
      const T* u_row = static_cast<const T*>(p.z) + row * 2 * KF + slot * p.F;
      const T* d_row = static_cast<const T*>(p.d_weighted) + row * KF + slot * p.F;
      T* d_u_row = static_cast<T*>(p.d_z) + row * 2 * KF + slot * p.F;
      T* h_row = static_cast<T*>(p.h) + row * KF + slot * p.F;
      const Vec w = broadcast(p.weights[row / p.L * p.K + slot]);
      Vec sum{};
      for (int64_t f = 0; f < p.F; f += kLanes) {
        const int64_t n = p.F - f;
        const Vec u = load(u_row + f, n), g = load(u_row + KF + f, n), d_weighted = load(d_row + f, n);
        const Vec cdf = normal_cdf<T>(g);
        const Vec gelu = g * cdf;
        const Vec a = u * gelu;
        const Vec d_a = d_weighted * w;
        sum += d_weighted * a;
        store(d_u_row + f, d_a * gelu, n);
        store(d_u_row + KF + f, d_a * u * (cdf + g * normal_pdf(g)), n);
        if (p.h) store(h_row + f, a * w, n);
      }
      p.d_weights[row * p.K + slot] = sum_of(sum);
    }
  }
}
