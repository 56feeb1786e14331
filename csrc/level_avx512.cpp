// The level for x86 processors with 512-bit vectors.
#include "problem.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define MTU_LEVEL avx512
#define MTU_LEVEL_NAME "avx512"
#define MTU_TABLE kernels_avx512
#define MTU_LANES 16
#define MTU_FLOAT_ROWS 8
#define MTU_FLOAT_PANELS 3
#define MTU_F16C
#include "kernels/level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
