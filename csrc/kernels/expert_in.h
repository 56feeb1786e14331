// The experts' first product and its activation. Each level includes this file in its own namespace, after experts.h.

// Lists the panels of the block whose samples use expert e, and returns their number.
template <class T>
static int64_t panels_of_expert(const Problem& p, const Block& block, const Buffers& buffers, int64_t e,
                                typename Scratch<T>::A* active) {
  using Product = ProductOf<T>;
  using Activation = typename Product::Activation;
  const int64_t x_hat_slot = round_up(p.D, Product::kStep) * kPanel;
  const int64_t hidden_slot = round_up(p.F, Product::kStep) * kPanel;
  const int64_t panels_per_sample = ceil_div(p.L, kPanel);
  int64_t n = 0;
  for (int64_t i = 0; i < block.end - block.begin; ++i) {
    const int64_t b = (block.begin + i) / panels_per_sample;
    int64_t slot = p.indices ? 0 : e;
    if (p.indices)
      while (slot < p.K && p.indices[b * p.K + slot] != e) ++slot;
    if (slot == p.K) continue;
    const int64_t x_hat = p.expert_norm ? i * p.K + slot : i;
    active[n++] = {static_cast<const Activation*>(buffers.x_hat) + x_hat * x_hat_slot,
                   static_cast<Activation*>(buffers.hidden) + (i * p.K + slot) * hidden_slot,
                   p.weights[b * p.K + slot],
                   b,
                   (block.begin + i) % panels_per_sample * kPanel,
                   slot};
  }
  return n;
}

// The numbers [k, k + length) of a tile of w_in: n rows of values, and the rows of their gates.
template <class T>
static WeightRows<T> rows_of_units(const Problem& p, int64_t row, int64_t n, int64_t k, int64_t length,
                                   typename ProductOf<T>::Weight* copies) {
  using Weight = typename ProductOf<T>::Weight;
  constexpr int64_t kHalf = ProductOf<T>::kRows / 2;
  const T* values = static_cast<const T*>(p.w_in) + row * p.D + k;
  const T* gates = values + p.E * p.F * p.D;
  if (ProductOf<T>::kReadsWeightsInPlace && n == kHalf && k + length <= p.D)
    return {reinterpret_cast<const Weight*>(values), reinterpret_cast<const Weight*>(gates), p.D};
  const int64_t valid = min_of(length, p.D - k);
  copy_rows<T>(values, p.D, n, valid, length, copies, length);
  copy_rows<T>(gates, p.D, n, valid, length, copies + kHalf * length, length);
  return {copies, copies + kHalf * length, length};
}

// The biases of a tile: those of n values, then those of their gates. Each half is padded with zeros.
template <class T>
static void load_bias_of_units(const Problem& p, int64_t row, int64_t n, float* bias) {
  constexpr int64_t kHalf = ProductOf<T>::kRows / 2;
  const T* values = static_cast<const T*>(p.b_in) + row;
  const T* gates = values + p.E * p.F;
  for (int64_t i = 0; i < kHalf; i += kLanes) {
    store(bias + i, load(values + i, n - i), kHalf - i);
    store(bias + kHalf + i, load(gates + i, n - i), kHalf - i);
  }
}

// The epilogue of the first product: adds the bias to the sums (kRows, 16) of some panels, whose rows are values and
// then gates, applies GEGLU, and multiplies by the routing weight.
template <class T>
struct ActivationEpilogue {
  using Product = ProductOf<T>;
  static constexpr int kHalf = Product::kRows / 2;
  static constexpr int kRows = kHalf % 4 == 0 ? 4 : kHalf;  // rows of one step
  static constexpr int kSteps = kHalf / kRows;              // steps of a panel, without the one of has_more()

  const Problem* p;
  const typename Scratch<T>::A* panel;
  const float* sums;
  const float* bias;
  int64_t unit, units, padded;
  int64_t count = 0, done = 0, row = 0;

  ActivationEpilogue() = default;
  ActivationEpilogue(const Problem& p, const typename Scratch<T>::A* panels, int64_t num_panels, const float* sums,
                     const float* bias, int64_t unit, int64_t units)
      : p(&p),
        panel(panels),
        sums(sums),
        bias(bias),
        unit(unit),
        units(units),
        padded(round_up(p.F, Product::kStep)),
        count(num_panels * (kSteps + has_more())) {}

  bool has_more() const { return p->hidden || unit + kHalf >= p->F; }

  inline void step() {
    if (row < kHalf) activate();
    else store_more();
    ++done;
    row += kRows;
    if (row >= kHalf + has_more() * kRows) {
      row = 0;
      ++panel;
      sums += Scratch<T>::kTile;
    }
  }

 private:
  inline void activate() {
    for (int v = 0; v < kPanelVecs; ++v) {
      const Vec w = broadcast(panel->weight);
      Vec rows[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const Vec u = load(sums + (row + i) * kPanel + v * kLanes) + bias[row + i];
        const Vec g = load(sums + (kHalf + row + i) * kPanel + v * kLanes) + bias[kHalf + row + i];
        rows[i] = geglu<T>(u, g) * w;
      }
      Product::store_activations(panel->output + v * kLanes, unit + row, rows, min_of(kRows, padded - unit - row));
    }
  }

  void store_more() {
    // The last tile of an expert also writes the zeros that pad F to whole steps.
    if (unit + kHalf >= p->F)
      for (int64_t f = unit + kHalf; f < padded; ++f)
        __builtin_memset(panel->output + f * kPanel, 0, kPanel * sizeof(*panel->output));
    if (p->hidden) {
      const int64_t KF = p->K * p->F, tokens = min_of(kPanel, p->L - panel->l);
      T* z = static_cast<T*>(p->hidden) + (panel->b * p->L + panel->l) * 2 * KF + panel->slot * p->F + unit;
      store_tokens<kHalf>(sums, bias, z, 2 * KF, tokens, units);
      store_tokens<kHalf>(sums + kHalf * kPanel, bias + kHalf, z + KF, 2 * KF, tokens, units);
    }
  }
};

// Computes h = w · GEGLU(x̂ W_inᵀ + b_in) for tiles [begin, end) of hidden units, counted over the experts of the
// block.
template <class T>
static void expert_in(const Problem& p, const Block& block, const Buffers& buffers, int64_t begin, int64_t end) {
  using Product = ProductOf<T>;
  constexpr int64_t kHalf = Product::kRows / 2, kPanels = Product::kPanels;
  Scratch<T> scratch(buffers.scratch, block.end - block.begin);
  const int64_t tiles = ceil_div(p.F, kHalf), depth = round_up(p.D, Product::kStep);
  int64_t current = -1, num_active = 0;
  float biases[Product::kGroup][2 * kHalf];
  Interleaved<ActivationEpilogue<T>> epilogue;
  Product::begin();
  for (int64_t first = begin, last; first < end; first = last) {
    const int64_t e = block.experts[first / tiles];
    last = min_of(min_of(first + Product::kGroup, end), (first / tiles + 1) * tiles);
    if (e != current) num_active = panels_of_expert<T>(p, block, buffers, e, scratch.active);
    current = e;
    for (int64_t k = 0, turn = 0; k < depth; k += Product::kDepth) {
      const Segment segment = {0, k, min_of(Product::kDepth, depth - k)};
      const bool is_last = k + segment.length == depth;
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t unit = tile % tiles * kHalf, units = min_of(kHalf, p.F - unit);
        const WeightRows<T> rows = rows_of_units<T>(p, e * p.F + unit, units, k, segment.length, scratch.weights);
        float* bias = biases[tile - first];
        if (is_last) load_bias_of_units<T>(p, e * p.F + unit, units, bias);
        for (int64_t i = 0; i < num_active; i += kPanels) {
          const int64_t count = min_of(kPanels, num_active - i);
          // Sums that are complete after one visit alternate between two places.
          const int64_t place = depth > Product::kDepth ? (tile - first) * num_active + i : turn++ % 2 * kPanels;
          float* sums = scratch.sums + place * Scratch<T>::kTile;
          multiply_panels<T>(&segment, 1, rows, scratch.active + i, count, sums, k > 0, epilogue);
          if (is_last)
            epilogue.start({p, scratch.active + i, count, sums, bias, unit, units}, segment.length, Product::kStep);
        }
      }
    }
    epilogue.finish();
  }
  Product::end();
}
