#include "levels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mtu {

const Kernels* kernels_portable();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();
#endif

namespace {

#if defined(__x86_64__)
struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

bool has(unsigned word, int bit) { return (word >> bit) & 1; }

bool is_amd() {
  const Registers vendor = cpuid(0, 0);
  return vendor.b == 0x68747541 && vendor.d == 0x69746e65 && vendor.c == 0x444d4163;  // "AuthenticAMD"
}

// The register states that the operating system saves, as bits of XCR0.
unsigned saved_states() {
  if (!has(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux saves the 8 KiB of tile registers only for processes that ask for it.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Levels {
  const Kernels* found[6] = {};

  Levels() {
    int n = 0;
#if defined(__x86_64__)
    const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
    const unsigned states = saved_states();
    const bool avx2 = (states & 0x6) == 0x6 && has(extended.b, 5) && has(basic.c, 12) && has(basic.c, 29);
    const bool avx512 = avx2 && (states & 0xe6) == 0xe6 && has(extended.b, 16) && has(extended.b, 17) &&
                        has(extended.b, 30) && has(extended.b, 31);
    const bool avx512_bf16 = avx512 && has(more.a, 5);
    const bool amx = avx512_bf16 && (states & 0x60000) == 0x60000 && has(extended.d, 22) && has(extended.d, 24);
    // On Intel processors, multiplying 512-bit pairs of bfloat16 is slower than multiplying float32 copies of them.
    // This was measured with AMX turned off.
    const bool pairs_are_fast = avx512_bf16 && is_amd();
    if (amx && may_use_tiles()) found[n++] = kernels_amx();
    if (pairs_are_fast) found[n++] = kernels_avx512_bf16();
    if (avx512) found[n++] = kernels_avx512();
    if (avx512_bf16 && !pairs_are_fast) found[n++] = kernels_avx512_bf16();
    if (avx2) found[n++] = kernels_avx2();
#endif
    found[n++] = kernels_portable();
  }
};

}  // namespace

const Kernels* level(int64_t i) {
  static const Levels levels;
  return i < 0 || i >= 6 ? nullptr : levels.found[i];
}

}  // namespace mtu
