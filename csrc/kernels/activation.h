// GEGLU and its derivative. Included inside a level's own namespace, after vector.h.

// Φ(g), the normal distribution's function, as precise as the storage can show.
//
// float32: ½ + g · P(t) / Q(t) with t = min(g², c²), P and Q of degree 5 fitted for the least maximal error on [0, c],
// c = 5.5, where Φ is 2e-8 away from 0 or 1. The fit's error is 7e-9; evaluated in float32 it is 1.7e-7, three ulps of ½.
template <class T>
static inline Vec normal_cdf(Vec g) {
  if constexpr (sizeof(T) == 4) {
    const Vec c = broadcast(5.5f);
    g = minimum(c, maximum(-c, g));
    const Vec t = g * g;
    Vec p = t * kCdfP[5] + kCdfP[4];
    Vec q = t * kCdfQ[5] + kCdfQ[4];
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) {
      p = p * t + kCdfP[i];
      q = q * t + kCdfQ[i];
    }
    const Vec cdf = 0.5f + g * (p / q);
    return bit_cast<Vec>(bit_cast<Bits>(cdf) & (g > -c));  // exactly 0 there: however large, g leaves nothing
  } else {
    // 16 bits hide errors below 2e-4: a polynomial in min(g², c²), c = 4.25, whose error is at most 1.1e-5.
    const Vec t = minimum(broadcast(18.0625f), g * g);
    Vec p = t * kCdfLow[9] + kCdfLow[8];
#pragma GCC unroll 8
    for (int i = 7; i >= 0; --i) p = p * t + kCdfLow[i];
    return minimum(broadcast(1.0f), maximum(Vec{}, g * p + 0.5f));
  }
}

// u · gelu(g)
template <class T>
static inline Vec geglu(Vec u, Vec g) {
  return u * (g * normal_cdf<T>(g));
}

// φ(g) = exp(-g²/2) / sqrt(2π): 2^y = 2^n · 2^f with n the nearest integer and f in [-½, ½], by the series of 2^f.
static inline Vec normal_pdf(Vec g) {
  const Vec y = maximum(broadcast(-126.0f), g * g * -0.7213475204444817f);
  const Vec shifted = y + 12582912.0f;  // 1.5 · 2²³: the sum has no bits left below 1
  const Vec f = y - (shifted - 12582912.0f);
  Vec power = f * kExp2[7] + kExp2[6];
#pragma GCC unroll 8
  for (int i = 5; i >= 0; --i) power = power * f + kExp2[i];
  const Bits n = bit_cast<Bits>(shifted) << 23;
  return 0.3989422804014327f * bit_cast<Vec>(bit_cast<Bits>(power) + n);
}
