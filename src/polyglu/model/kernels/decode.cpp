// What a decoding step does on a CPU, in fp32: products with few rows, norms, attention to the cache, routing.
//
// Each row has one new token. A task is a row, or a key head of one; no result depends on another row.
// Shapes: B rows, D width, H query heads, G key heads, d head width, P positions of a slot, R router width, K activations.

#include "vectors.h"

#include <vector>

namespace {

inline int within(int64_t count, int64_t at) { return count - at < W ? count - at : W; }

inline float dot(const float* a, const float* b, int64_t width) {
  vec total{};
  for (int64_t i = 0; i < width; i += W) {
    int n = within(width, i);
    total += load(a + i, n) * load(b + i, n);
  }
  return sum(total);
}

// y = x / sqrt(mean(x^2) + eps) * weight
inline void norm(const float* x, const float* weight, float eps, int64_t width, float* y) {
  float scale = 1 / std::sqrt(dot(x, x, width) / width + eps);
  for (int64_t i = 0; i < width; i += W) {
    int n = within(width, i);
    store(y + i, load(x + i, n) * scale * load(weight + i, n), n);
  }
}

// (first, second) -> (first cos - second sin, second cos + first sin), in place, half by half
inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += W) {
    int n = within(half, i);
    vec first = load(x + i, n), second = load(x + half + i, n), c = load(cos + i, n), s = load(sin + i, n);
    store(x + i, first * c - second * s, n);
    store(x + half + i, second * c + first * s, n);
  }
}

constexpr int OUTPUTS = 4;      // at a time: their weights are as many streams from memory
constexpr int AHEAD = 8192;     // bytes: so far in front the weights are asked for, for memory is what this waits for

// y[n, o] = sum_i x[n, i] w[o, i] for N rows, so few that the weights are read once and every row uses them.
template <int N>
void products(const float* x, const float* w, int64_t outputs, int64_t width, float* y) {
#pragma omp parallel for schedule(static)
  for (int64_t o = 0; o < outputs; o += OUTPUTS) {
    vec sums[OUTPUTS][N]{};
    for (int64_t i = 0; i < width; i += W) {
      vec weight[OUTPUTS];
      for (int k = 0; k < OUTPUTS; k++) {
        const float* at = w + (o + k) * width + i;
        __builtin_prefetch((const char*)at + AHEAD, 0, 2);
        weight[k] = load(at, W);
      }
      for (int n = 0; n < N; n++) {
        vec value = load(x + n * width + i, W);
        for (int k = 0; k < OUTPUTS; k++) sums[k][n] += weight[k] * value;
      }
    }
    for (int k = 0; k < OUTPUTS; k++)
      for (int n = 0; n < N; n++) y[n * outputs + o + k] = sum(sums[k][n]);
  }
}

struct Attention {  // as `Attention` in decode.py
  int64_t rows, query_heads, key_heads, width, longest;
  const float *q, *k, *v;                       // [B, H d], [B, G d], [B, G d], as projected
  const float *q_weight, *k_weight, *cos, *sin;  // [d], [d]; [positions, d / 2]
  const int64_t* positions;                     // [B]
  float *keys, *values, *out;                   // [slots, P, G, d], twice; [B, H d]
  float eps;
};

void attend(const Attention& p) {
  int64_t d = p.width, stride = p.key_heads * d, shares = p.query_heads / p.key_heads;
#pragma omp parallel for collapse(2) schedule(dynamic)
  for (int64_t row = 0; row < p.rows; row++)
    for (int64_t head = 0; head < p.key_heads; head++) {
      int64_t last = p.positions[row], own = row * stride + head * d, slot = row * p.longest * stride + head * d;
      const float *cos = p.cos + last * (d / 2), *sin = p.sin + last * (d / 2);
      float *keys = p.keys + slot, *values = p.values + slot;
      norm(p.k + own, p.k_weight, p.eps, d, keys + last * stride);
      rotate(keys + last * stride, cos, sin, d / 2);
      memcpy(values + last * stride, p.v + own, d * sizeof(float));
      std::vector<float> query(d), weights(last + 1);
      for (int64_t share = 0; share < shares; share++) {
        int64_t at = (row * p.query_heads + head * shares + share) * d;
        norm(p.q + at, p.q_weight, p.eps, d, query.data());
        rotate(query.data(), cos, sin, d / 2);
        float most = -INFINITY, total = 0;
        for (int64_t t = 0; t <= last; t++) {
          weights[t] = dot(query.data(), keys + t * stride, d) / std::sqrt((float)d);
          most = weights[t] > most ? weights[t] : most;
        }
        for (int64_t t = 0; t <= last; t++) total += weights[t] = std::exp(weights[t] - most);
        for (int64_t i = 0; i < d; i += W) {
          int n = within(d, i);
          vec mixed{};
          for (int64_t t = 0; t <= last; t++) mixed += weights[t] * load(values + t * stride + i, n);
          store(p.out + at + i, mixed / total, n);
        }
      }
    }
}

struct Route {  // as `Route` in decode.py
  int64_t rows, width, activations;
  const float *projected, *count;                 // [B, R]; [B], positions in the sum
  const float *hidden_bias, *weight, *bias, *beta;  // [R], [K, R], [K], [K]
  float *total, *token;                           // [B, R], the running sum; [K, B]
  float tau;
  int64_t add;  // whether the new token enters the sum
};

void route(const Route& p) {
  std::vector<float> hidden(p.width);
  for (int64_t row = 0; row < p.rows; row++) {
    float *total = p.total + row * p.width, count = p.count[row] + p.add;
    for (int64_t i = 0; i < p.width; i++) {
      if (p.add) total[i] += p.projected[row * p.width + i];
      float x = total[i] / count + p.hidden_bias[i];
      hidden[i] = x <= 0 ? 0 : x;  // NaN stays
    }
    for (int64_t k = 0; k < p.activations; k++)
      p.token[k * p.rows + row] = p.beta[k] * (dot(hidden.data(), p.weight + k * p.width, p.width) + p.bias[k]) / p.tau;
  }
}

}  // namespace

extern "C" {
void decode_norm(const float* x, const float* weight, float eps, int64_t rows, int64_t width, float* y) {
  for (int64_t row = 0; row < rows; row++) norm(x + row * width, weight, eps, width, y + row * width);
}
void decode_products(const float* x, const float* w, int64_t rows, int64_t outputs, int64_t width, float* y) {
  using Products = void (*)(const float*, const float*, int64_t, int64_t, float*);
  constexpr Products of_rows[] = {products<1>, products<2>, products<3>, products<4>,
                                  products<5>, products<6>, products<7>, products<8>};
  of_rows[rows - 1](x, w, outputs, width, y);
}
void decode_attention(const Attention* problem) { attend(*problem); }
void decode_route(const Route* problem) { route(*problem); }
}
