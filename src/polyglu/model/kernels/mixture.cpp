// The gated mixture of a PolyGLU layer on a CPU: h = (sum_k w_k activation_k(gate)) * up, w = softmax_k(logits).
//
// One pass over memory each way: the branches live in registers. A task is a block of neurons of some positions of a
// row; what it sums over positions (neurons' logits) or neurons (positions' logits) goes to a place of its own, so that
// the result does not depend on the number of threads.
//
// Shapes: B rows, T positions, F neurons, S = T or 1; K activations, a macro: ACTIVATIONS. Row-major, the last one dense.

#include "vectors.h"

namespace {

constexpr int NEURONS = 512;    // of a task: its sums stay in the first-level cache
constexpr int POSITIONS = 512;  // of a task

// exp(x) for x <= 0 (below -87 it is 0, NaN stays NaN): 2^n * e^r with |r| <= ln(2) / 2.
inline vec exp_of_negative(vec x) {
  vec shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer, in the low bits
  vec n = shifted - 12582912.0f;
  vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
  vec p = all(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vec scale = (vec)(((uvec)shifted << 23) + 0x3f800000u);
  return select(x < -87.0f, vec{}, p * scale);
}

// Sine and cosine after Cephes: x less a multiple of pi / 2, whose three parts leave no rounding, then polynomials.
inline void sine_cosine(vec x, vec* sine, vec* cosine) {
  if (sum(select(abs(x) <= 8192.0f, vec{}, all(1))) > 0) {  // too many multiples, or not finite
    for (int i = 0; i < W; i++) {
      (*sine)[i] = std::sin(x[i]);
      (*cosine)[i] = std::cos(x[i]);
    }
    return;
  }
  vec shifted = x * 0.636619772f + 12582912.0f;  // rounds to an integer, in the low bits
  vec n = shifted - 12582912.0f;
  vec r = x - n * 1.5703125f - n * 4.837512969970703125e-4f - n * 7.54978995489188216e-8f, r2 = r * r;
  vec s = all(-1.9515295891e-4f);
  s = s * r2 + 8.3321608736e-3f;
  s = s * r2 - 1.6666654611e-1f;
  s = s * r2 * r + r;
  vec c = all(2.443315711809948e-5f);
  c = c * r2 - 1.388731625493765e-3f;
  c = c * r2 + 4.166664568298827e-2f;
  c = c * r2 * r2 - 0.5f * r2 + 1.0f;
  uvec quarter = (uvec)shifted;
  ivec odd = (quarter & 1u) != 0u;
  *sine = (vec)((uvec)select(odd, c, s) ^ ((quarter & 2u) << 30));
  *cosine = (vec)((uvec)select(odd, s, c) ^ (((quarter + 1u) & 2u) << 30));
}

// Of each activation its value, and its derivative if asked for. K = 1: ReLU, then Tanh, SiLU, GELU, Sine, Gaussian.
template <int K, bool DERIVATIVE>
inline void activate(vec x, vec* value, vec* slope) {
  vec zero{}, size = abs(x);
  value[0] = select(x <= zero, zero, x);
  if (DERIVATIVE) slope[0] = select(x <= zero, zero, all(1));
  if constexpr (K > 1) {
    vec e = exp_of_negative(-size), e2 = e * e;  // shared by tanh and sigmoid, as is the inverse
    vec both = inverse((1.0f + e) * (1.0f + e2));
    vec x2 = x * x, p = all(-5.70498872745e-3f);  // near 0, where 1 - e^2 cancels: an odd polynomial (Cephes)
    p = p * x2 + 2.06390887954e-2f;
    p = p * x2 - 5.37397155531e-2f;
    p = p * x2 + 1.33314422036e-1f;
    p = p * x2 - 3.33332819422e-1f;
    vec far = (1.0f - e2) * both * (1.0f + e);
    value[1] = select(size < 0.625f, x + x * x2 * p, select(x < zero, -far, far));
    if (DERIVATIVE) slope[1] = 1.0f - value[1] * value[1];
    if constexpr (K > 2) {
      vec high = both * (1.0f + e2), low = high * e;  // sigmoid(|x|), sigmoid(-|x|)
      vec sigmoid = select(x < zero, low, high);
      value[2] = x * sigmoid;
      if (DERIVATIVE) slope[2] = sigmoid * (1.0f + x * select(x < zero, high, low));
    }
  }
  if constexpr (K > 3) {
    vec density = exp_of_negative(-0.5f * x * x);  // erf after Abramowitz and Stegun 7.1.26: within 1.5e-7
    vec t = inverse(1.0f + 0.3275911f * 0.70710678f * select(size < 20.0f, size, all(20)));  // no larger: 0 by then
    vec p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec tail = 0.5f * p * t * density;
    vec normal = select(x < zero, tail, 1.0f - tail);  // the normal distribution up to x
    value[3] = x * normal;
    if (DERIVATIVE) slope[3] = normal + x * density * 0.39894228f;
    if constexpr (K > 4) {
      vec cosine;
      sine_cosine(x, &value[4], &cosine);
      if (DERIVATIVE) slope[4] = cosine;
    }
    if constexpr (K > 5) {
      value[5] = density * density;
      if (DERIVATIVE) slope[5] = -2.0f * x * value[5];
    }
  }
}

// Weights of one block of neurons. `neuron` holds their logits, of one row.
template <int K>
struct Block {
  vec logit[K][NEURONS / W];  // less the neuron's largest; weights where a row has one mean
  vec power[K][NEURONS / W];  // its exponential
  int n_vectors;
  bool safe;  // no neuron's logits are far apart

  // Products of exponentials e^(neuron) e^(token) make a softmax without one exponential per element. Both factors are
  // at most 1 and one of each K is 1, so unless both sides are far apart the products do not all vanish.
  static constexpr float FAR = 60;

  Block(const float* neuron, int64_t stride, int count, const float* shared) {
    n_vectors = (count + W - 1) / W;
    float widest = 0;
    for (int v = 0; v < n_vectors; v++) {
      int n = count - v * W < W ? count - v * W : W;
      vec most = all(-INFINITY), least = all(INFINITY);
      for (int k = 0; k < K; k++) {
        logit[k][v] = load(neuron + k * stride + v * W, n) + (shared ? shared[k] : 0.0f);
        most = larger(logit[k][v], most);
        least = -larger(-logit[k][v], -least);
      }
      vec total{};
      for (int k = 0; k < K; k++) {
        logit[k][v] -= most;
        power[k][v] = exp_of_negative(logit[k][v]);
        total += power[k][v];
      }
      if (shared)
        for (int k = 0; k < K; k++) power[k][v] /= total;
      for (int i = 0; i < n; i++) widest = widest > most[i] - least[i] ? widest : most[i] - least[i];
    }
    safe = widest <= FAR;
  }
};

// Logits of a position, less its largest, and their exponentials.
template <int K>
struct Token {
  float logit[K], power[K];
  bool safe;
  Token(const float* logits, int64_t stride) {
    float most = -INFINITY, least = INFINITY;
    for (int k = 0; k < K; k++) {
      logit[k] = logits[k * stride];
      most = logit[k] > most ? logit[k] : most;
      least = logit[k] < least ? logit[k] : least;
    }
    for (int k = 0; k < K; k++) power[k] = std::exp(logit[k] -= most);
    safe = most - least <= Block<K>::FAR;
  }
};

template <int K>
inline void weigh(const Block<K>& block, const Token<K>& token, int v, vec* weight) {
  vec total{};
  if (block.safe || token.safe) {
    for (int k = 0; k < K; k++) total += weight[k] = block.power[k][v] * token.power[k];
  } else {
    vec most = block.logit[0][v] + token.logit[0];
    for (int k = 1; k < K; k++) most = larger(block.logit[k][v] + token.logit[k], most);
    for (int k = 0; k < K; k++)
      total += weight[k] = exp_of_negative(block.logit[k][v] + token.logit[k] - most);
  }
  vec scale = K == 1 ? 1.0f / total : inverse(total);  // exactly 1
  for (int k = 0; k < K; k++) weight[k] *= scale;
}

struct Problem {  // as `Problem` in native.py
  int64_t B, T, F, S, neuron_rows;
  int64_t gate_stride, up_stride, grad_stride;  // between positions
  const void *gate, *up, *grad;                 // [B, T, F], in fp32 or bf16 as all that have this shape
  const float *neuron, *token;                  // [K, 1 or B, F], [K, B, S]
  void *hidden, *d_gate, *d_up;                 // [B, T, F]; hidden may be absent in backward
  float *d_neuron, *d_token;                    // [B, blocks of positions, K, F], [blocks of neurons, K, B, T]
};

template <int K, bool PER_TOKEN, bool BACKWARD, typename number>
void run(const Problem& p) {
  int64_t position_blocks = (p.T + POSITIONS - 1) / POSITIONS, neuron_blocks = (p.F + NEURONS - 1) / NEURONS;
  int64_t tasks = p.B * position_blocks * neuron_blocks;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < tasks; task++) {
    int64_t neurons = task % neuron_blocks, positions = task / neuron_blocks % position_blocks;
    int64_t row = task / neuron_blocks / position_blocks, first = neurons * NEURONS;
    int count = p.F - first < NEURONS ? p.F - first : NEURONS;
    float shared[K];
    if (!PER_TOKEN)
      for (int k = 0; k < K; k++) shared[k] = p.token[k * p.B + row];
    const float* logits = p.neuron + (p.neuron_rows > 1 ? row * p.F : 0) + first;
    Block<K> block(logits, p.neuron_rows * p.F, count, PER_TOKEN ? nullptr : shared);
    vec d_neuron[BACKWARD ? K : 1][NEURONS / W];
    if (BACKWARD) memset(d_neuron, 0, sizeof d_neuron);
    int64_t end = (positions + 1) * POSITIONS < p.T ? (positions + 1) * POSITIONS : p.T;
    for (int64_t t = positions * POSITIONS; t < end; t++) {
      int64_t at = row * p.T + t, out = at * p.F + first;
      const number* gate = (const number*)p.gate + at * p.gate_stride + first;
      const number* up = (const number*)p.up + at * p.up_stride + first;
      const number* grad = (const number*)p.grad + at * p.grad_stride + first;
      Token<K> token(PER_TOKEN ? p.token + row * p.T + t : shared, PER_TOKEN ? p.B * p.T : 1);
      vec d_token[K]{};
      for (int v = 0; v < block.n_vectors; v++) {
        int n = count - v * W < W ? count - v * W : W;
        vec weight[K], value[K], slope[K];
        if (PER_TOKEN) weigh(block, token, v, weight);
        else
          for (int k = 0; k < K; k++) weight[k] = block.power[k][v];
        activate<K, BACKWARD>(load(gate + v * W, n), value, slope);
        vec mixed{}, u = load(up + v * W, n);
        for (int k = 0; k < K; k++) mixed += weight[k] * value[k];
        if (p.hidden) store((number*)p.hidden + out + v * W, mixed * u, n);
        if (BACKWARD) {
          vec d_hidden = load(grad + v * W, n), d_mixed = d_hidden * u, d_gate{};
          store((number*)p.d_up + out + v * W, d_hidden * mixed, n);
          for (int k = 0; k < K; k++) {
            vec d_branch = d_mixed * weight[k], d_logit = d_branch * (value[k] - mixed);
            d_gate += d_branch * slope[k];
            d_neuron[k][v] += d_logit;
            if (PER_TOKEN) d_token[k] += d_logit;
          }
          store((number*)p.d_gate + out + v * W, d_gate, n);
        }
      }
      if (BACKWARD && PER_TOKEN)
        for (int k = 0; k < K; k++) p.d_token[((neurons * K + k) * p.B + row) * p.T + t] = sum(d_token[k]);
    }
    if (BACKWARD) {
      float* sums = p.d_neuron + (row * position_blocks + positions) * K * p.F + first;
      for (int k = 0; k < K; k++)
        for (int v = 0; v < block.n_vectors; v++)
          store(sums + k * p.F + v * W, d_neuron[k][v], count - v * W < W ? count - v * W : W);
    }
  }
}

template <bool BACKWARD>
void choose(const Problem& p, bool half) {
  constexpr int K = ACTIVATIONS;
  if (p.S == p.T) half ? run<K, true, BACKWARD, uint16_t>(p) : run<K, true, BACKWARD, float>(p);
  else half ? run<K, false, BACKWARD, uint16_t>(p) : run<K, false, BACKWARD, float>(p);
}

}  // namespace

extern "C" {
void mixture_forward(const Problem* problem, int half) { choose<false>(*problem, half); }
void mixture_backward(const Problem* problem, int half) { choose<true>(*problem, half); }
int64_t neurons_at_once() { return NEURONS; }
int64_t positions_at_once() { return POSITIONS; }
}
