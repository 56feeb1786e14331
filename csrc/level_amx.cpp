// The level for Intel processors that multiply tiles of bfloat16 (Xeon since Sapphire Rapids).
#include "problem.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                                 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#endif
#define MTU_LEVEL amx
#define MTU_LEVEL_NAME "amx"
#define MTU_TABLE kernels_amx
#define MTU_LANES 16
#define MTU_FLOAT_ROWS 8
#define MTU_FLOAT_PANELS 3
#define MTU_F16C
#define MTU_BF16
#define MTU_TILES
#include "kernels/level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
