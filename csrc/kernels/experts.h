// Included inside a level's own namespace.
//
// What both products of the experts share: see expert_in.h and expert_out.h.
//
// A tile of weights stays in the L1 cache while all panels of the block pass by it, kDepth steps in k at a time; the same
// steps of the panels stay in the L2 cache for a group of kGroup tiles. When the last part in k is added to the sums of a
// few panels, they are finished (bias, GEGLU and routing weight; or bias and storage of y) in small steps while the next
// few are multiplied: tiles are multiplied beside other instructions, but only beside those that are near.

// What a product needs to know of a panel.
template <class Activation>
struct Active {
  const Activation* input;
  Activation* output;  // of the first product
  float weight;
  int64_t b, l, slot;
};

// Buffers of one thread for blocks of n panels.
template <class T>
struct Scratch {
  using Product = ProductOf<T>;
  using A = Active<typename Product::Activation>;
  static constexpr int64_t kTile = Product::kRows * kPanel;
  static constexpr int64_t kConstant = Product::kRows * Product::kDepth * sizeof(typename Product::Weight);
  static constexpr int64_t kOfPanel = Product::kGroup * kTile * sizeof(float) + sizeof(A);

  static_assert(Product::kGroup >= 2 * Product::kPanels);

  typename Product::Weight* weights;
  float* sums;
  A* active;

  Scratch(void* memory, int64_t panels) {
    char* p = static_cast<char*>(memory);
    weights = reinterpret_cast<typename Product::Weight*>(p);
    sums = reinterpret_cast<float*>(p + kConstant);
    active = reinterpret_cast<A*>(p + kConstant + panels * Product::kGroup * kTile * sizeof(float));
  }
};

template <class T>
static Layout layout_of(const Problem& p) {
  using Product = ProductOf<T>;
  constexpr int64_t row = kPanel * sizeof(typename Product::Activation);
  Layout layout;
  layout.x_hat_panel = (p.expert_norm ? p.K : 1) * round_up(p.D, Product::kStep) * row;
  layout.hidden_panel = p.K * round_up(p.F, Product::kStep) * row;
  layout.scratch = Scratch<T>::kConstant;
  layout.scratch_panel = Scratch<T>::kOfPanel;
  layout.block_panels = Product::kBlockPanels;
  layout.group = Product::kGroup;
  layout.unit_tiles = ceil_div(p.F, Product::kRows / 2);
  layout.column_tiles = ceil_div(p.D, Product::kRows);
  return layout;
}

// Rows of weights as `multiply` reads them: in place, or copied.
template <class T>
struct Rows {
  const typename ProductOf<T>::Weight *upper, *lower;
  int64_t stride;
};

// Rows of weights for `multiply`, in the product's own type: n rows of `valid` numbers, zeros up to `length` and kRows/2.
template <class T>
static void copy_rows(const T* from, int64_t from_stride, int64_t n, int64_t valid, int64_t length,
                      typename ProductOf<T>::Weight* to, int64_t to_stride) {
  using Weight = typename ProductOf<T>::Weight;
  for (int64_t r = 0; r < ProductOf<T>::kRows / 2; ++r) {
    const int64_t given = r < n ? valid : 0;
    Weight* row = to + r * to_stride;
    if constexpr (sizeof(Weight) == sizeof(T)) {
      __builtin_memcpy(row, from + r * from_stride, sizeof(T) * given);
    } else {
      for (int64_t k = 0; k < given; k += kLanes)
        store(row + k, load(from + r * from_stride + k, given - k), given - k);
    }
    __builtin_memset(row + given, 0, sizeof(Weight) * (length - given));
  }
}

// Steps of work on the side: `Work` has the members `count`, `done` and `step()`.
template <class Work>
struct Side : Work {
  int64_t rate = 0;  // steps for each step of the product

  // Takes on new work, to be done within `length` numbers in k.
  void take(const Work& work, int64_t length, int64_t step) {
    static_cast<Work&>(*this) = work;
    rate = ceil_div(work.count, length > step ? length / step : 1);
  }
  inline void some() {
    for (int64_t i = 0; i < rate && this->done < this->count; ++i) this->step();
  }
  inline void rest() {
    while (this->done < this->count) this->step();
  }
};

// Sums of `count` panels, at most kPanels; and all the work on the side.
template <class T, class Work>
static inline void multiply_panels(const Segment* segments, int64_t n, const Rows<T>& rows,
                                   const typename Scratch<T>::A* active, int64_t count, float* sums, bool accumulate,
                                   Side<Work>& side) {
  using Product = ProductOf<T>;
  const typename Product::Activation* panels[Product::kPanels] = {};
  for (int64_t i = 0; i < count; ++i) panels[i] = active[i].input;
  auto multiply = [&]<int P>() {
    Product::template multiply<P>(segments, n, rows.upper, rows.lower, rows.stride, panels, sums, accumulate, side);
  };
  if (count == Product::kPanels) multiply.template operator()<Product::kPanels>();
  else if (count == 2) multiply.template operator()<2 < Product::kPanels ? 2 : 1>();
  else multiply.template operator()<1>();
  side.rest();
}

// Sums (ROWS, 16) of a panel, plus a bias for each row → rows of tokens, `columns` numbers each. A residual, if there is
// one, has rows like those of `out`, and is added before the sums are rounded.
template <int ROWS, class T>
static inline void store_tokens(const float* sums, const float* bias, T* out, int64_t stride, int64_t tokens,
                                int64_t columns, const T* residual = nullptr) {
  for (int r0 = 0; r0 < ROWS; r0 += kLanes) {
    for (int64_t t0 = 0; t0 < tokens; t0 += kLanes) {
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r)
        rows[r] = r0 + r < ROWS ? load(sums + (r0 + r) * kPanel + t0) + bias[r0 + r] : Vec{};
      transpose(rows);
      const int64_t n = min_of(tokens - t0, kLanes), length = min_of(ROWS, columns) - r0;
      for (int64_t t = 0; residual && t < n; ++t) rows[t] += load(residual + (t0 + t) * stride + r0, length);
      for (int64_t t = 0; t < n; ++t) store(out + (t0 + t) * stride + r0, rows[t], length);
    }
  }
}
