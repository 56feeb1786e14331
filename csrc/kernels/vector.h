// Vectors of kLanes float32 numbers in the compiler's vector extension, and how they are loaded from and stored in
// memory. Each level includes this file in its own namespace, where everything has internal linkage (see problem.h).

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Half __attribute__((vector_size(2 * kLanes)));

#if MTU_LANES == 16
#define MTU_LANE_LIST(X) \
  X(0), X(1), X(2), X(3), X(4), X(5), X(6), X(7), X(8), X(9), X(10), X(11), X(12), X(13), X(14), X(15)
#elif MTU_LANES == 8
#define MTU_LANE_LIST(X) X(0), X(1), X(2), X(3), X(4), X(5), X(6), X(7)
#else
#define MTU_LANE_LIST(X) X(0), X(1), X(2), X(3)
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class A, class B>
static constexpr bool is_same = false;
template <class A>
static constexpr bool is_same<A, A> = true;

static constexpr int64_t kPanelVecs = kPanel / kLanes;

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
template <class N>
static inline N maximum_of(N a, N b) {
  return a > b ? a : b;
}
static constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
static inline int64_t ceil_div(int64_t n, int64_t step) { return (n + step - 1) / step; }

static inline Vec broadcast(float value) { return value - Vec{}; }

template <class To, class From>
static inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// If b is NaN, the result is NaN: the instructions return their second operand then.
#if defined(__x86_64__) && MTU_LANES == 16
static inline Vec minimum(Vec a, Vec b) {
  return bit_cast<Vec>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
static inline Vec maximum(Vec a, Vec b) {
  return bit_cast<Vec>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
}
#elif defined(__x86_64__) && MTU_LANES == 8
static inline Vec minimum(Vec a, Vec b) {
  return bit_cast<Vec>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
}
static inline Vec maximum(Vec a, Vec b) {
  return bit_cast<Vec>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
}
#else
static inline Vec minimum(Vec a, Vec b) { return a < b ? a : b; }
static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
#endif

// The sum of a vector: its halves are added until one number is left.
template <int STEP>
static inline float sum_from(Vec v) {
#define MTU_ACROSS(i) ((i) ^ STEP)
  v += __builtin_shufflevector(v, v, MTU_LANE_LIST(MTU_ACROSS));
#undef MTU_ACROSS
  if constexpr (STEP > 1) return sum_from<STEP / 2>(v);
  return v[0];
}

static inline float sum_of(Vec v) { return sum_from<kLanes / 2>(v); }

// float32

static inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
static inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

// bfloat16 is the upper half of a float32, rounded to the nearest, ties to even

// GCC would convert half a vector at a time.
#if defined(__x86_64__) && MTU_LANES == 16
static inline Unsigned to_32_bits(Half h) { return bit_cast<Unsigned>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(h))); }
#elif defined(__x86_64__) && MTU_LANES == 8
static inline Unsigned to_32_bits(Half h) { return bit_cast<Unsigned>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h))); }
#else
static inline Unsigned to_32_bits(Half h) { return __builtin_convertvector(h, Unsigned); }
#endif

static inline Vec widen(Half h) { return bit_cast<Vec>(to_32_bits(h) << 16); }

[[maybe_unused]] static inline Unsigned rounded_bits(Vec v) {
  const Unsigned u = bit_cast<Unsigned>(v);
  const Unsigned rounded = u + 0x7fff + ((u >> 16) & 1);
  // The carry of rounding could turn a NaN into infinity, or change its sign.
  const Unsigned is_nan = bit_cast<Unsigned>(v != v);
  return (rounded & ~is_nan) | ((u | 0x00400000) & is_nan);
}

static inline Vec load(const bfloat16* p) {
  Half h;
  __builtin_memcpy(&h, p, sizeof(h));
  return widen(h);
}
static inline void store(bfloat16* p, Vec v) {
#if defined(MTU_BF16)
  const __m256i h = bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#else
  const Half h = __builtin_convertvector(rounded_bits(v) >> 16, Half);
#endif
  __builtin_memcpy(p, &h, sizeof(h));
}

// float16

#if defined(MTU_F16C)
static inline Vec load(const float16* p) {
#if MTU_LANES == 16
  return bit_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  return bit_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
}
static inline void store(float16* p, Vec v) {
#if MTU_LANES == 16
  const __m256i h = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
#else
  const __m128i h = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
#endif
}
#else
static inline Unsigned choose(Unsigned mask, Unsigned yes, Unsigned no) { return (yes & mask) | (no & ~mask); }

static inline Vec load(const float16* p) {
  Half h;
  __builtin_memcpy(&h, p, sizeof(h));
  const Unsigned bits = to_32_bits(h);
  const Unsigned magnitude = bits & 0x7fff;
  // The exponent biases differ by 112. Multiplication converts subnormal numbers correctly, too.
  const Vec value = bit_cast<Vec>(magnitude << 13) * 0x1p112f;
  const Unsigned is_special = bit_cast<Unsigned>(magnitude >= 0x7c00) & 0x7f800000;
  return bit_cast<Vec>(bit_cast<Unsigned>(value) | is_special | ((bits & 0x8000) << 16));
}
static inline void store(float16* p, Vec v) {
  const Unsigned bits = bit_cast<Unsigned>(v), magnitude = bits & 0x7fffffff;
  const Unsigned normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  // Added to ½, the last bit of a float32 is worth as much as the last bit of a subnormal float16.
  const Unsigned small = bit_cast<Unsigned>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000;
  const Unsigned special = choose(bit_cast<Unsigned>(magnitude > 0x7f800000), Unsigned{} + 0x7e00, Unsigned{} + 0x7c00);
  Unsigned half = choose(bit_cast<Unsigned>(magnitude < 0x38800000), small, normal);
  half = choose(bit_cast<Unsigned>(magnitude >= 0x47800000), special, half) | ((bits >> 16) & 0x8000);
  const Half h = __builtin_convertvector(half, Half);
  __builtin_memcpy(p, &h, sizeof(h));
}
#endif

// Loads the first n numbers and sets the rest to zero; or stores the first n numbers and leaves the rest of memory
// alone.

template <class T>
static inline Vec load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, sizeof(T) * (n > 0 ? n : 0));
  return load(lanes);
}
template <class T>
static inline void store(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  __builtin_memcpy(p, lanes, sizeof(T) * (n > 0 ? n : 0));
}

// Transposes kLanes vectors in log2(kLanes) rounds. Each exchanges blocks of STEP lanes between vectors STEP apart.

template <int STEP>
static inline void exchange(Vec& a, Vec& b) {
#define MTU_LOW(i) ((i & STEP) ? kLanes + i - STEP : i)
#define MTU_HIGH(i) ((i & STEP) ? kLanes + i : i + STEP)
  const Vec low = __builtin_shufflevector(a, b, MTU_LANE_LIST(MTU_LOW));
  const Vec high = __builtin_shufflevector(a, b, MTU_LANE_LIST(MTU_HIGH));
#undef MTU_LOW
#undef MTU_HIGH
  a = low;
  b = high;
}

template <int STEP>
static inline void transpose_from(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & STEP)) exchange<STEP>(rows[i], rows[i + STEP]);
  if constexpr (STEP > 1) transpose_from<STEP / 2>(rows);
}

static inline void transpose(Vec* rows) { transpose_from<kLanes / 2>(rows); }
