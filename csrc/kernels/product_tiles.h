// Products of bfloat16 in AMX tiles. Each level includes this file in its own namespace, after pairs.h.
//
// It multiplies two tiles of weights (16 rows of 32 numbers, not copied) by the tiles of two panels, into four tiles of
// sums. So each tile that is loaded serves two products.

struct TileProduct : PairPanels {
  static constexpr int kRows = 32, kPanels = 2;
  static constexpr int64_t kStep = 32, kDepth = 320, kGroup = 4, kBlockPanels = 16;

  // Sets tiles 0 to 7 to 16 rows of 64 bytes. The compiler's intrinsic declares that it reads 8 bytes only, so GCC may
  // leave the other bytes of a local variable unwritten. This statement declares that it reads the whole constant.
  static void begin() {
    struct Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Config) == 64);
    static constexpr Config config;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  static void end() { _tile_release(); }

  template <int P, class Epilogue>
  static inline void multiply(const Segment* segments, int64_t count, const bfloat16* upper, const bfloat16* lower,
                              int64_t stride, const bfloat16* const* panels, float* c, bool accumulate,
                              Epilogue& epilogue) {
    constexpr int64_t kTile = 16 * kPanel;
    __asm__ volatile("" : : : "memory");  // the intrinsics that load tiles do not declare what they read
    if (accumulate) {
      _tile_loadd(0, c, 64);
      _tile_loadd(1, c + kTile, 64);
      if constexpr (P == 2) {
        _tile_loadd(2, c + 2 * kTile, 64);
        _tile_loadd(3, c + 3 * kTile, 64);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t s = 0; s < count; ++s) {
      const bfloat16* u = upper + segments[s].weight;
      const bfloat16* l = lower + segments[s].weight;
      const bfloat16* b0 = panels[0] + segments[s].activation * kPanel;
      const bfloat16* b1 = panels[P - 1] + segments[s].activation * kPanel;
      for (int64_t k = 0; k < segments[s].length; k += kStep) {
        _tile_loadd(6, b0 + k * kPanel, 64);
        _tile_loadd(4, u + k, 2 * stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, l + k, 2 * stride);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (P == 2) {
          _tile_loadd(7, b1 + k * kPanel, 64);
          _tile_dpbf16ps(2, 4, 7);
          _tile_dpbf16ps(3, 5, 7);
        }
        epilogue.run_some();
      }
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + kTile, 64);
    if constexpr (P == 2) {
      _tile_stored(2, c + 2 * kTile, 64);
      _tile_stored(3, c + 3 * kTile, 64);
    }
  }
};
