// All kernels of one level. The file that includes this one sets the instruction set and defines MTU_LEVEL (the
// namespace), MTU_LEVEL_NAME, MTU_TABLE (the function that returns the table of kernels), MTU_LANES, MTU_FLOAT_ROWS and
// MTU_FLOAT_PANELS. Where the processor has them, it also defines MTU_F16C (float16 conversions), MTU_BF16 (bfloat16
// conversions), MTU_PAIRS (products of bfloat16 pairs) and MTU_TILES (products of bfloat16 tiles).

namespace mtu {
namespace MTU_LEVEL {
namespace {

// The lanes of a vector, and the tile of FloatProduct: rows of weights by panels of activations.
constexpr int kLanes = MTU_LANES;
constexpr int kFloatRows = MTU_FLOAT_ROWS;
constexpr int kFloatPanels = MTU_FLOAT_PANELS;

struct Segment {
  int64_t weight, activation, length;
};

constexpr float kMillsP[] = {1.253314144e+00f, 1.096033152e+00f, 4.573695726e-01f, 1.012008378e-01f, 1.022131302e-02f};
constexpr float kMillsQ[] = {1.000000000e+00f, 1.672392885e+00f, 1.199300067e+00f,
                             4.674349682e-01f, 1.012076468e-01f, 1.022118430e-02f};
constexpr float kCdfLow[] = {3.989338901e-01f, -6.645352247e-02f, 9.925603590e-03f, -1.158377079e-03f,
                             1.056266608e-04f, -7.377939383e-06f, 3.770290373e-07f, -1.309787404e-08f,
                             2.732392347e-10f, -2.562065622e-12f};
constexpr float kExp2[] = {1.000000000e+00f, 6.931471806e-01f, 2.402265070e-01f, 5.550410866e-02f,
                           9.618129108e-03f, 1.333355815e-03f, 1.540353039e-04f, 1.525273380e-05f};

#include "vector.h"
#include "activation.h"
#include "product_float.h"

template <class T>
struct ProductFor {
  using type = FloatProduct<T>;
};
#if defined(MTU_TILES)
#include "pairs.h"
#include "product_tiles.h"
template <>
struct ProductFor<bfloat16> {
  using type = TileProduct;
};
#elif defined(MTU_PAIRS)
#include "pairs.h"
#include "product_pairs.h"
template <>
struct ProductFor<bfloat16> {
  using type = PairProduct;
};
#endif
template <class T>
using ProductOf = typename ProductFor<T>::type;

#include "experts.h"
#include "expert_in.h"
#include "expert_out.h"
#include "geglu_backward.h"
#include "layer_norm.h"

template <class F>
void with_storage(Storage storage, F f) {
  switch (storage) {
    case Storage::float32: return f(float{});
    case Storage::bfloat16: return f(bfloat16{});
    case Storage::float16: return f(float16{});
  }
}

// Calls f with a value of the compute dtype and one of x's dtype, which is the compute dtype or float32.
template <class P, class F>
void with_storages(const P& p, F f) {
  with_storage(p.compute, [&](auto compute) {
    if (p.x_storage == Storage::float32) f(compute, float{});
    else f(compute, compute);
  });
}

constexpr Kernels kTable = {
    .name = MTU_LEVEL_NAME,
    .layout =
        [](const Problem& p) {
          Layout layout{};
          with_storage(p.compute, [&](auto t) { layout = layout_of<decltype(t)>(p); });
          return layout;
        },
    .normalize =
        [](const Problem& p, const Block& block, const Buffers& buffers, int64_t begin, int64_t end) {
          with_storages(
              p, [&](auto t, auto x) { normalize_panels<decltype(t), decltype(x)>(p, block, buffers, begin, end); });
        },
    .expert_in =
        [](const Problem& p, const Block& block, const Buffers& buffers, int64_t begin, int64_t end) {
          with_storage(p.compute, [&](auto t) { expert_in<decltype(t)>(p, block, buffers, begin, end); });
        },
    .expert_out =
        [](const Problem& p, const Block& block, const Buffers& buffers, int64_t begin, int64_t end) {
          with_storage(p.compute, [&](auto t) { expert_out<decltype(t)>(p, block, buffers, begin, end); });
        },
    .geglu_backward =
        [](const GegluBackward& p, int64_t begin, int64_t end) {
          with_storage(p.compute, [&](auto t) { geglu_backward<decltype(t)>(p, begin, end); });
        },
    .norm_backward =
        [](const NormBackward& p, int64_t begin, int64_t end) {
          with_storages(p, [&](auto t, auto x) { norm_backward<decltype(t), decltype(x)>(p, begin, end); });
        },
    .normalize_rows =
        [](const Normalize& p, int64_t begin, int64_t end) {
          with_storages(p, [&](auto t, auto x) { normalize_rows<decltype(t), decltype(x)>(p, begin, end); });
        },
};

}  // namespace
}  // namespace MTU_LEVEL

const Kernels* MTU_TABLE() { return &MTU_LEVEL::kTable; }

}  // namespace mtu
