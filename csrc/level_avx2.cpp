// The level for x86 processors since 2013.
#include "problem.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define MTU_LEVEL avx2
#define MTU_LEVEL_NAME "avx2"
#define MTU_TABLE kernels_avx2
#define MTU_LANES 8
#define MTU_FLOAT_ROWS 6
#define MTU_FLOAT_PANELS 1
#define MTU_F16C
#include "kernels/level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
