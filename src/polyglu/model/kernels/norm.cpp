// RMSNorm on a CPU, and rotary embedding after it where a row is a head: y = rotate(x / sqrt(mean(x^2) + eps) * weight).
//
// One pass over memory each way. A task is some rows; what it sums over them, the weight's gradient, goes to a place of
// its own, so that the result does not depend on the number of threads.

#include "vectors.h"

#include <vector>

namespace {

constexpr int64_t ROWS = 256;  // of a task

struct Problem {  // as `Problem` in norm.py
  int64_t rows, width, heads;      // `heads` rows share a position
  const void *x, *grad;            // [rows, width]
  const float *weight, *cos, *sin;  // [width], and [positions, width / 2] or absent
  void *y, *d_x;                   // [rows, width]
  float *scale, *d_weight;         // 1 / sqrt(mean(x^2) + eps), [rows]; [tasks, width]
  float eps;
};

inline int within(int64_t count, int64_t at) { return count - at < W ? count - at : W; }

// (first, second) -> (first cos - second sin, second cos + first sin), half by half; backward with -sin.
template <typename from, typename to>
inline void rotate(const from* x, const float* cos, const float* sin, float sign, int64_t half, to* y) {
  for (int64_t i = 0; i < half; i += W) {
    int n = within(half, i);
    vec first = load(x + i, n), second = load(x + half + i, n), c = load(cos + i, n), s = sign * load(sin + i, n);
    store(y + i, first * c - second * s, n);
    store(y + half + i, second * c + first * s, n);
  }
}

template <typename input, typename output>
void forward(const Problem& p) {
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < (p.rows + ROWS - 1) / ROWS; task++) {
    std::vector<float> normed(p.cos ? p.width : 0);
    for (int64_t row = task * ROWS; row < p.rows && row < (task + 1) * ROWS; row++) {
      const input* x = (const input*)p.x + row * p.width;
      output* y = (output*)p.y + row * p.width;
      vec squares{};
      for (int64_t i = 0; i < p.width; i += W) {
        vec value = load(x + i, within(p.width, i));
        squares += value * value;
      }
      float scale = p.scale[row] = 1 / std::sqrt(sum(squares) / p.width + p.eps);
      for (int64_t i = 0; i < p.width; i += W) {
        int n = within(p.width, i);
        vec value = load(x + i, n) * scale * load(p.weight + i, n);
        if (p.cos) store(normed.data() + i, value, n);
        else store(y + i, value, n);
      }
      int64_t half = p.width / 2, angles = row / p.heads * half;
      if (p.cos) rotate(normed.data(), p.cos + angles, p.sin + angles, 1, half, y);
    }
  }
}

// With u = x scale, g = grad weight:  d x = scale (g - u mean(g u)),  d weight = sum over rows of grad u.
template <typename input, typename output>
void backward(const Problem& p) {
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < (p.rows + ROWS - 1) / ROWS; task++) {
    std::vector<float> grad(p.width), d_weight(p.width);
    for (int64_t row = task * ROWS; row < p.rows && row < (task + 1) * ROWS; row++) {
      const input* x = (const input*)p.x + row * p.width;
      const output* d_y = (const output*)p.grad + row * p.width;
      int64_t half = p.width / 2, angles = row / p.heads * half;
      if (p.cos) rotate(d_y, p.cos + angles, p.sin + angles, -1, half, grad.data());
      vec along{};
      float scale = p.scale[row];
      for (int64_t i = 0; i < p.width; i += W) {
        int n = within(p.width, i);
        vec g = p.cos ? load(grad.data() + i, n) : load(d_y + i, n), u = load(x + i, n) * scale;
        store(d_weight.data() + i, load(d_weight.data() + i, n) + g * u, n);
        g *= load(p.weight + i, n);
        along += g * u;
        store(grad.data() + i, g, n);
      }
      float mean = sum(along) / p.width;
      for (int64_t i = 0; i < p.width; i += W) {
        int n = within(p.width, i);
        vec u = load(x + i, n) * scale;
        store((input*)p.d_x + row * p.width + i, scale * (load(grad.data() + i, n) - u * mean), n);
      }
    }
    memcpy(p.d_weight + task * p.width, d_weight.data(), 4 * p.width);
  }
}

}  // namespace

extern "C" {
// `half_in`, `half_out`: x, and y, is bf16; else fp32.
void norm_forward(const Problem* p, int half_in, int half_out) {
  if (half_in) half_out ? forward<uint16_t, uint16_t>(*p) : forward<uint16_t, float>(*p);
  else half_out ? forward<float, uint16_t>(*p) : forward<float, float>(*p);
}
void norm_backward(const Problem* p, int half_in, int half_out) {
  if (half_in) half_out ? backward<uint16_t, uint16_t>(*p) : backward<uint16_t, float>(*p);
  else half_out ? backward<float, uint16_t>(*p) : backward<float, float>(*p);
}
int64_t rows_at_once() { return ROWS; }
}
