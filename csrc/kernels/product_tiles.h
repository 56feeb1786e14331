// Products of bfloat16 by AMX tiles. Included inside a level's own namespace, after pairs.h.
//
// Two tiles of weights (16 rows of 32 numbers, read where they are) by two panels' tiles of activations: four tiles of
// sums, so that each tile that is loaded serves two products.

struct TileProduct : PairPanels {
  static constexpr int kRows = 32;
  static constexpr int kPanels = 2;
  static constexpr int64_t kStep = 32;
  static constexpr int64_t kDepth = 320;
  static constexpr int64_t kGroup = 4;
  static constexpr int64_t kBlockPanels = 16;

  // Tiles 0 to 7: 16 rows of 64 bytes. The compiler's intrinsic says of the first 8 bytes only that it reads them, so that
  // GCC leaves the others of a local variable unwritten; this reads all of a constant.
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

  template <int P, class Side>
  static inline void multiply(const Segment* segments, int64_t count, const bfloat16* upper, const bfloat16* lower,
                              int64_t stride, const bfloat16* const* panels, float* c, bool accumulate, Side& side) {
    constexpr int64_t kTile = 16 * kPanel;
    __asm__ volatile("" : : : "memory");  // nor do those that load tiles say what they read
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
        side.some();
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
