// GEGLU and its derivative. Included inside a level's own namespace, after vector.h.

// φ(g) = exp(-g²/2) / sqrt(2π). The exponential is 2^y = 2^n · 2^f, where n is the nearest integer, and f in [-½, ½]
// goes through the series of 2^f. The result is exactly 0 where it would be subnormal, so that g·φ(g) is 0 for large g.
static inline Vec normal_pdf(Vec g) {
  const Vec exponent = g * g * -0.7213475204444817f;
  const Vec y = maximum(broadcast(-126.0f), exponent);
  const Vec shifted = y + 12582912.0f;  // adding 1.5 · 2²³ rounds to an integer
  const Vec f = y - (shifted - 12582912.0f);
  Vec power = f * kExp2[7] + kExp2[6];
#pragma GCC unroll 8
  for (int i = 5; i >= 0; --i) power = power * f + kExp2[i];
  const Bits n = bit_cast<Bits>(shifted) << 23;
  const Vec pdf = 0.3989422804014327f * bit_cast<Vec>(bit_cast<Bits>(power) + n);
  return bit_cast<Vec>(bit_cast<Bits>(pdf) & ~(exponent < -126.0f));
}

// Φ(g), the normal distribution function, as precise as the storage dtype can show. Stores φ(g) if pdf is not null.
//
// For bfloat16 it is a polynomial in min(g², c²) with c = 4.25. Its error is at most 1.1e-5 (4.6e-5 for gelu), a
// hundredth of bfloat16's rounding at 1. That bound is absolute: between -5 and -4, where |gelu| < 1.3e-4, few digits
// are right.
//
// For other dtypes Φ(-a) = φ(a) · M(a), where M is Mills' ratio, which is smooth and positive. M is a quotient of
// polynomials of degrees 4 and 5, fitted for the least relative error on [0, 14]: 6e-9, and 3e-7 with float32's
// rounding.
template <class T>
static inline Vec normal_cdf(Vec g, Vec* pdf = nullptr) {
  if constexpr (is_same<T, bfloat16>) {
    if (pdf) *pdf = normal_pdf(g);
    const Vec t = minimum(broadcast(18.0625f), g * g);
    Vec p = t * kCdfLow[9] + kCdfLow[8];
#pragma GCC unroll 8
    for (int i = 7; i >= 0; --i) p = p * t + kCdfLow[i];
    return minimum(broadcast(1.0f), maximum(Vec{}, g * p + 0.5f));
  } else {
    const Vec a = minimum(broadcast(14.0f), maximum(-g, g));
    Vec p = a * kMillsP[4] + kMillsP[3];
    Vec q = a * kMillsQ[5] + kMillsQ[4];
#pragma GCC unroll 4
    for (int i = 2; i >= 0; --i) p = p * a + kMillsP[i];
#pragma GCC unroll 4
    for (int i = 3; i >= 0; --i) q = q * a + kMillsQ[i];
    const Vec density = normal_pdf(a);
    if (pdf) *pdf = density;
    const Vec tail = density * (p / q);
    const Bits is_upper = g > 0.0f;
    return bit_cast<Vec>((bit_cast<Bits>(1.0f - tail) & is_upper) | (bit_cast<Bits>(tail) & ~is_upper));
  }
}

// u · gelu(g)
template <class T>
static inline Vec geglu(Vec u, Vec g) {
  return u * (g * normal_cdf<T>(g));
}
