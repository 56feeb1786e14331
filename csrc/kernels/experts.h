// The parts that both products of the experts share: expert_in.h and expert_out.h use them. Each level includes this
// file in its own namespace.
//
// Products go through the depth k in blocks of kDepth numbers. For one block, a tile of weights stays in the L1 cache
// while it is multiplied by all panels, and the panels stay in the L2 cache for a group of kGroup tiles.
//
// After the last block, the sums of a few panels are complete and go through an epilogue: bias, GEGLU and routing
// weight for the first product, bias and storage for the second. The epilogue is cut into small steps, which run
// between the multiplications of the next few panels. A processor multiplies tiles and runs other instructions at the
// same time only if both are close together in the program.

// One panel as a product reads it.
template <class Activation>
struct PanelInput {
  const Activation* input;
  Activation* output;  // written by the first product only
  float weight;
  int64_t b, l, slot;
};

// The scratch memory of one thread, for blocks of up to `panels` panels.
template <class T>
struct Scratch {
  using Product = ProductOf<T>;
  using A = PanelInput<typename Product::Activation>;
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

// Two halves of a tile's rows of weights, in the tensor or in a copy.
template <class T>
struct WeightRows {
  const typename ProductOf<T>::Weight *upper, *lower;
  int64_t stride;
};

// Copies n rows of `valid` weights in the type that the product reads, padded with zeros to kRows/2 rows of `length`.
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

// An epilogue that runs in steps between the steps of a product. `Work` has the members `count`, `done` and `step()`.
template <class Work>
struct Interleaved : Work {
  int64_t rate = 0;  // steps of the epilogue for each step of the product

  // Starts the epilogue of other panels. It ends before a product of depth `length` does.
  void start(const Work& work, int64_t length, int64_t step) {
    static_cast<Work&>(*this) = work;
    rate = ceil_div(work.count, length > step ? length / step : 1);
  }
  inline void run_some() {
    for (int64_t i = 0; i < rate && this->done < this->count; ++i) this->step();
  }
  inline void finish() {
    while (this->done < this->count) this->step();
  }
};

// Multiplies `count` panels, at most kPanels, and finishes the epilogue that was started.
template <class T, class Work>
static inline void multiply_panels(const Segment* segments, int64_t n, const WeightRows<T>& rows,
                                   const typename Scratch<T>::A* active, int64_t count, float* sums, bool accumulate,
                                   Interleaved<Work>& epilogue) {
  using Product = ProductOf<T>;
  const typename Product::Activation* panels[Product::kPanels] = {};
  for (int64_t i = 0; i < count; ++i) panels[i] = active[i].input;
  auto multiply = [&]<int P>() {
    Product::template multiply<P>(segments, n, rows.upper, rows.lower, rows.stride, panels, sums, accumulate, epilogue);
  };
  if (count == Product::kPanels) multiply.template operator()<Product::kPanels>();
  else if (count == 2) multiply.template operator()<2 < Product::kPanels ? 2 : 1>();
  else multiply.template operator()<1>();
  epilogue.finish();
}

// Stores the sums (ROWS, 16) of a panel, plus a bias for each row, as rows of tokens with `columns` numbers each. A
// residual has rows like those of `out`. It is added before the sums are rounded.
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
