// The experts' second product. Each level includes this file in its own namespace, after experts.h.

static constexpr int64_t kMaxSegments = 32;

// Whether samples b and c use the same experts in the same order.
static inline bool use_same_experts(const Problem& p, int64_t b, int64_t c) {
  return b == c || !p.indices || !__builtin_memcmp(p.indices + b * p.K, p.indices + c * p.K, sizeof(int32_t) * p.K);
}

// Iterates over the active experts' columns of w_out in blocks of at most kDepth columns.
template <class T>
struct DepthBlocks {
  const Problem& p;
  int64_t b, slots, width, padded;  // dense experts without padding count as one wide expert
  int64_t slot = 0, f = 0;
  Segment segments[kMaxSegments];
  int64_t count = 0, depth = 0;
  bool is_ragged = false;

  DepthBlocks(const Problem& p, int64_t b) : p(p), b(b) {
    const bool is_one = !p.indices && p.F % ProductOf<T>::kStep == 0;
    slots = is_one ? 1 : p.K;
    width = is_one ? p.E * p.F : p.F;
    padded = round_up(width, ProductOf<T>::kStep);
  }

  bool is_last() const { return slot == slots; }

  // Moves to the next block. Returns false after the last one.
  bool next() {
    if (is_last()) return false;
    depth = 0;
    count = 0;
    is_ragged = false;
    while (slot < slots && depth < ProductOf<T>::kDepth && count < kMaxSegments) {
      const int64_t length = min_of(padded - f, ProductOf<T>::kDepth - depth);
      const int64_t e = p.indices ? p.indices[b * p.K + slot] : slot;
      segments[count++] = {e * width + f, slot * padded + f, length};
      is_ragged = is_ragged || f + length > width;
      depth += length;
      f += length;
      if (f == padded) {
        f = 0;
        ++slot;
      }
    }
    return true;
  }
};

// Rows [column, column + n) of w_out, n at most kRows, over the columns of a block. Sets `segments` to where the
// columns are: in w_out, or in `copies` if rows had to be copied.
template <class T>
static WeightRows<T> rows_of_columns(const Problem& p, int64_t column, int64_t n, const DepthBlocks<T>& part,
                                     Segment* segments, typename ProductOf<T>::Weight* copies) {
  using Weight = typename ProductOf<T>::Weight;
  constexpr int64_t kHalf = ProductOf<T>::kRows / 2, kStride = ProductOf<T>::kDepth;
  const int64_t H = p.E * p.F;
  const T* w_out = static_cast<const T*>(p.w_out) + column * H;
  __builtin_memcpy(segments, part.segments, sizeof(Segment) * part.count);
  if (ProductOf<T>::kReadsWeightsInPlace && n == ProductOf<T>::kRows && !part.is_ragged)
    return {reinterpret_cast<const Weight*>(w_out), reinterpret_cast<const Weight*>(w_out + kHalf * H), H};
  int64_t at = 0;
  for (int64_t s = 0; s < part.count; ++s) {
    const auto [from, _, length] = part.segments[s];
    const int64_t valid = min_of(length, part.width - from % part.width);
    copy_rows<T>(w_out + from, H, min_of(kHalf, n), valid, length, copies + at, kStride);
    copy_rows<T>(w_out + kHalf * H + from, H, maximum_of<int64_t>(n - kHalf, 0), valid, length,
                 copies + kHalf * kStride + at, kStride);
    segments[s].weight = at;
    at += length;
  }
  return {copies, copies + kHalf * kStride, kStride};
}

// The epilogue of the second product: adds the bias and the residual, if there is one, to the sums (kRows, 16) of some
// panels, and stores them in y.
template <class T>
struct OutputEpilogue {
  using Product = ProductOf<T>;
  static constexpr int kRows = Product::kRows;

  const Problem* p;
  const typename Scratch<T>::A* panel;
  const float* sums;
  int64_t column, columns;
  int64_t count = 0, done = 0;

  OutputEpilogue() = default;
  OutputEpilogue(const Problem& p, const typename Scratch<T>::A* panels, int64_t num_panels, const float* sums,
                 int64_t column, int64_t columns)
      : p(&p), panel(panels), sums(sums), column(column), columns(columns), count(num_panels) {}

  void step() {
    float bias[round_up(kRows, kLanes)];
    for (int r = 0; r < kRows; r += kLanes)
      store(bias + r, load(p->y_bias + panel->b * p->y_bias_stride + column + r, columns - r));
    store_columns(bias);
    ++done;
    ++panel;
    sums += Scratch<T>::kTile;
  }

  void store_columns(const float* bias) {
    const int64_t first = (panel->b * p->L + panel->l) * p->D + column;
    const int64_t tokens = min_of(kPanel, p->L - panel->l);
    T* y = static_cast<T*>(p->y) + first;
    if constexpr (kRows == 32)
      if (!p->residual) return store_tokens_by_pairs(sums, bias, y, p->D, tokens, columns);
    const T* residual = p->residual ? static_cast<const T*>(p->x) + first : nullptr;
    store_tokens<kRows>(sums, bias, y, p->D, tokens, columns, residual);
  }
};

// Computes y = Σ h W_outᵀ + bias, plus x with the residual, for tiles [begin, end) of the columns of y and panels
// [from, to) of the block, whose samples use the same experts.
template <class T>
static void expert_out_of(const Problem& p, const Scratch<T>& scratch, int64_t from, int64_t to, int64_t begin,
                          int64_t end) {
  using Product = ProductOf<T>;
  Interleaved<OutputEpilogue<T>> epilogue;
  for (int64_t first = begin, last; first < end; first = last) {
    last = min_of(first + Product::kGroup, end);
    bool accumulate = false;
    for (DepthBlocks<T> part(p, scratch.active[from].b); part.next(); accumulate = true) {
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t column = tile * Product::kRows, columns = min_of(Product::kRows, p.D - column);
        Segment segments[kMaxSegments];
        const WeightRows<T> rows = rows_of_columns<T>(p, column, columns, part, segments, scratch.weights);
        for (int64_t i = from; i < to; i += Product::kPanels) {
          const int64_t count = min_of(Product::kPanels, to - i);
          float* sums = scratch.sums + ((tile - first) * (to - from) + i - from) * Scratch<T>::kTile;
          multiply_panels<T>(segments, part.count, rows, scratch.active + i, count, sums, accumulate, epilogue);
          if (part.is_last())
            epilogue.start({p, scratch.active + i, count, sums, column, columns}, part.depth, Product::kStep);
        }
      }
    }
    epilogue.finish();
  }
}

// The same for all panels of the block.
template <class T>
static void expert_out(const Problem& p, const Block& block, const Buffers& buffers, int64_t begin, int64_t end) {
  using Product = ProductOf<T>;
  using Activation = typename Product::Activation;
  const int64_t num_panels = block.end - block.begin;
  Scratch<T> scratch(buffers.scratch, num_panels);
  const int64_t hidden_panel = p.K * round_up(p.F, Product::kStep) * kPanel;
  const int64_t panels_per_sample = ceil_div(p.L, kPanel);
  for (int64_t i = 0; i < num_panels; ++i)
    scratch.active[i] = {static_cast<const Activation*>(buffers.hidden) + i * hidden_panel,
                         nullptr,
                         0.0f,
                         (block.begin + i) / panels_per_sample,
                         (block.begin + i) % panels_per_sample * kPanel,
                         0};
  Product::begin();
  for (int64_t first = 0, last; first < num_panels; first = last) {
    for (last = first + 1; last < num_panels && use_same_experts(p, scratch.active[first].b, scratch.active[last].b);)
      ++last;
    expert_out_of<T>(p, scratch, first, last, begin, end);
  }
  Product::end();
}
