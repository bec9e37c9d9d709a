// Vectors of fp32 in registers, and fp32 and bf16 in memory. Those of GCC and Clang: any processor they know.

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));

inline vec all(float x) { return vec{} + x; }
inline vec select(ivec mask, vec yes, vec no) { return mask ? yes : no; }
inline vec abs(vec x) { return (vec)((uvec)x & 0x7fffffffu); }
inline vec larger(vec a, vec b) { return select(a > b, a, b); }
inline vec inverse(vec x) {  // of a finite number: an estimate and a step of Newton's, which is faster than a division
#if defined(__AVX512F__)
  vec y = (vec)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  vec y = (vec)_mm256_rcp_ps((__m256)x);
#else
  vec y = 1.0f / x;
#endif
  return y + y * (1.0f - x * y);
}
inline float sum(vec x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
#endif
}

// fp32 and bf16 in memory; fewer than W elements at the end of a row.
inline vec load(const float* p, int n) {
  vec x{};
  if (n == W) memcpy(&x, p, sizeof x);
  else memcpy(&x, p, 4 * n);
  return x;
}
inline void store(float* p, vec x, int n) {
  if (n == W) memcpy(p, &x, sizeof x);
  else memcpy(p, &x, 4 * n);
}
inline vec load(const uint16_t* p, int n) {
  hvec half{};
  if (n == W) memcpy(&half, p, sizeof half);
  else memcpy(&half, p, 2 * n);
  return (vec)(__builtin_convertvector(half, uvec) << 16);
}
inline void store(uint16_t* p, vec x, int n) {
#ifdef __AVX512BF16__
  hvec half = (hvec)_mm512_cvtneps_pbh((__m512)x);
#else
  uvec bits = (uvec)x;
  bits = x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;  // to the nearest, ties to even; NaN stays
  hvec half = __builtin_convertvector(bits >> 16, hvec);
#endif
  if (n == W) memcpy(p, &half, sizeof half);
  else memcpy(p, &half, 2 * n);
}

}  // namespace
