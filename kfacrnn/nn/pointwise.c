/* The point-wise part of one step of an LSTM, with or without layer normalisation, or of a GRU, for
 * kfacrnn/nn/pointwise.py.
 *
 *     c_t = σ(f) c_{t−1} + σ(i) tanh(g)     h_t = σ(o) tanh(c_t)
 *     s_t = gates_t + product               or, with norms, gates_t + LN(product), and h_t = σ(o) tanh(LN(c_t))
 *
 *     h_t = (1 − z) n + z h_{t−1}     (r, z) = σ(gates_t + product)     n = tanh(gates_t + r u)     u = product + bias_hn
 *
 * Rows are cases; gates stand in the order i, f, g, o, or r, z, n, and are then 3H. Everything is float32 but the pointers to void, which are bfloat16
 * when `narrow`. No fast-math: NaN and infinity go where arithmetic takes them. */

#define real float
#include "exponential.h"

#define INLINE static inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")
#define EPSILON 1e-5f
#define SMALL 8192 /* elements; below, waking threads costs more than they save */

typedef struct {
    int64_t steps, cases, hidden, threads, narrow;
    void *inputs;                                 /* [T, B, 4H], bfloat16; if absent, gates hold them */
    float *gates, *cells, *squashed;              /* [T, B, 4H], [T + 1, B, H], [T, B, H]: tanh(c_t) or tanh(LN(c_t)) */
    void *output, *product;                       /* [T, B, H]; forward [B, 4H], backward [B, H] */
    void *d_output, *rounded;                     /* [T, B, H], [T, B, 4H]: what the product takes, if not float32 */
    float *d_gates, *d_cell;                      /* [T, B, 4H], [B, H] */
    float *recurrent, *norms;                     /* [T, B, 4H], [4, T, B]: mean and scale of W_hh h, then of c; u of a
                                                     GRU, [T, B, H] */
    float *gain_hh, *gain_c, *bias_c;             /* [4H], [H], [H] or absent */
    float *d_recurrent, *d_normed;                /* [T, B, 4H], [T, B, H] */
    void *initial;                                /* h_0, [B, H], of a GRU */
    float *bias_hn;                               /* [H] */
} Steps;

INLINE float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
INLINE uint32_t to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

INLINE float load(const void *p, int64_t j, int narrow) {
    return narrow ? from_bits((uint32_t)((const uint16_t *)p)[j] << 16) : ((const float *)p)[j];
}

INLINE void store(void *p, int64_t j, float x, int narrow) {
    uint32_t bits = to_bits(x);
    uint32_t nearest_even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    if (narrow) ((uint16_t *)p)[j] = (uint16_t)(x == x ? nearest_even : 0x7fc0);
    else ((float *)p)[j] = x;
}

INLINE void moments(const float *restrict z, int64_t n, float *mean, float *scale) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += z[j];
    float m = sum / n;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < n; j++) squares += (z[j] - m) * (z[j] - m);
    *mean = m;
    *scale = 1.0f / __builtin_sqrtf(squares / n + EPSILON);
}

/* Adds to `dz`, or sets it to, the gradient of z, where d is that of gain ⊙ (z − mean) scale. */
INLINE void norm_backward(const float *restrict d, const float *restrict z, const float *restrict gain, int64_t n,
                          float mean, float scale, int add, float *restrict dz) {
    float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
    for (int64_t j = 0; j < n; j++) {
        sum += d[j] * gain[j];
        along += d[j] * gain[j] * (z[j] - mean);
    }
    float offset = sum / n, slope = along * scale * scale / n;
    SIMD for (int64_t j = 0; j < n; j++)
        dz[j] = (add ? dz[j] : 0) + scale * (d[j] * gain[j] - offset - slope * (z[j] - mean));
}

INLINE void lstm_advance_row(const Steps *p, int64_t t, int64_t b, int narrow) {
    const int64_t H = p->hidden, row = t * p->cases + b, rows = p->steps * p->cases;
    float *restrict s = p->gates + row * 4 * H, *restrict y = p->squashed + row * H;
    const float *restrict c_previous = p->cells + row * H;
    float *restrict c = p->cells + (row + p->cases) * H;
    if (p->inputs) SIMD for (int64_t j = 0; j < 4 * H; j++) s[j] = load(p->inputs, row * 4 * H + j, 1);
    if (p->norms) {
        float *restrict r = p->recurrent + row * 4 * H, *norm = p->norms + row;
        const float *restrict gain = p->gain_hh;
        SIMD for (int64_t j = 0; j < 4 * H; j++) r[j] = load(p->product, b * 4 * H + j, narrow);
        moments(r, 4 * H, norm, norm + rows);
        float mean = norm[0], scale = norm[rows];
        SIMD for (int64_t j = 0; j < 4 * H; j++) s[j] += (r[j] - mean) * scale * gain[j];
    } else
        SIMD for (int64_t j = 0; j < 4 * H; j++) s[j] += load(p->product, b * 4 * H + j, narrow);
    SIMD for (int64_t j = 0; j < H; j++) {
        float i = sigmoid(s[j]), f = sigmoid(s[H + j]), g = hyperbolic_tangent(s[2 * H + j]), o = sigmoid(s[3 * H + j]);
        s[j] = i, s[H + j] = f, s[2 * H + j] = g, s[3 * H + j] = o;
        y[j] = c[j] = f * c_previous[j] + i * g;
    }
    if (p->norms) {
        float *norm = p->norms + 2 * rows + row;
        const float *restrict gain = p->gain_c, *restrict bias = p->bias_c;
        moments(c, H, norm, norm + rows);
        float mean = norm[0], scale = norm[rows];
        SIMD for (int64_t j = 0; j < H; j++) y[j] = (c[j] - mean) * scale * gain[j];
        if (bias) SIMD for (int64_t j = 0; j < H; j++) y[j] += bias[j];
    }
    SIMD for (int64_t j = 0; j < H; j++) {
        y[j] = hyperbolic_tangent(y[j]);
        store(p->output, row * H + j, s[3 * H + j] * y[j], narrow);
    }
}

INLINE void lstm_retreat_row(const Steps *p, int64_t t, int64_t b, int narrow) {
    const int64_t H = p->hidden, row = t * p->cases + b, rows = p->steps * p->cases;
    const float *restrict s = p->gates + row * 4 * H, *restrict y = p->squashed + row * H;
    const float *restrict c_previous = p->cells + row * H;
    float *restrict ds = p->d_gates + row * 4 * H, *restrict dc = p->d_cell + b * H;
    float *dn = p->norms ? p->d_normed + row * H : dc;
    SIMD for (int64_t j = 0; j < H; j++) {
        float o = s[3 * H + j], dh = load(p->d_output, row * H + j, narrow) + load(p->product, b * H + j, narrow);
        float dy = dh * o * (1.0f - y[j] * y[j]);
        dn[j] = p->norms ? dy : dn[j] + dy;
        ds[3 * H + j] = dh * y[j] * o * (1.0f - o);
    }
    if (p->norms) {
        const float *norm = p->norms + 2 * rows + row;
        norm_backward(dn, p->cells + (row + p->cases) * H, p->gain_c, H, norm[0], norm[rows], 1, dc);
    }
    SIMD for (int64_t j = 0; j < H; j++) {
        float i = s[j], f = s[H + j], g = s[2 * H + j], d = dc[j];
        ds[j] = d * g * i * (1.0f - i);
        ds[H + j] = d * c_previous[j] * f * (1.0f - f);
        ds[2 * H + j] = d * i * (1.0f - g * g);
        dc[j] = d * f;
    }
    const float *out = ds;
    if (p->norms) {
        const float *norm = p->norms + row;
        float *dr = p->d_recurrent + row * 4 * H;
        norm_backward(ds, p->recurrent + row * 4 * H, p->gain_hh, 4 * H, norm[0], norm[rows], 0, dr);
        out = dr;
    }
    if (narrow) SIMD for (int64_t j = 0; j < 4 * H; j++) store(p->rounded, row * 4 * H + j, out[j], 1);
}

INLINE void gru_advance_row(const Steps *p, int64_t t, int64_t b, int narrow) {
    const int64_t H = p->hidden, row = t * p->cases + b, previous = t ? (row - p->cases) * H : b * H;
    const void *h = t ? p->output : p->initial;
    float *restrict s = p->gates + row * 3 * H, *restrict u = p->recurrent + row * H;
    const float *restrict bias = p->bias_hn;
    if (p->inputs) SIMD for (int64_t j = 0; j < 3 * H; j++) s[j] = load(p->inputs, row * 3 * H + j, 1);
    SIMD for (int64_t j = 0; j < 2 * H; j++) s[j] = sigmoid(s[j] + load(p->product, b * 3 * H + j, narrow));
    SIMD for (int64_t j = 0; j < H; j++) {
        u[j] = load(p->product, b * 3 * H + 2 * H + j, narrow) + bias[j];
        float n = s[2 * H + j] = hyperbolic_tangent(s[2 * H + j] + s[j] * u[j]);
        store(p->output, row * H + j, n + s[H + j] * (load(h, previous + j, narrow) - n), narrow);
    }
}

INLINE void gru_retreat_row(const Steps *p, int64_t t, int64_t b, int narrow) {
    const int64_t H = p->hidden, row = t * p->cases + b, previous = t ? (row - p->cases) * H : b * H;
    const void *h = t ? p->output : p->initial;
    const float *restrict s = p->gates + row * 3 * H, *restrict u = p->recurrent + row * H;
    float *restrict ds = p->d_gates + row * 3 * H, *restrict dr = p->d_recurrent + row * 3 * H;
    float *restrict dc = p->d_cell + b * H;
    SIMD for (int64_t j = 0; j < H; j++) {
        float r = s[j], z = s[H + j], n = s[2 * H + j];
        float dh = load(p->d_output, row * H + j, narrow) + load(p->product, b * H + j, narrow) + dc[j];
        float dn = dh * (1.0f - z) * (1.0f - n * n);
        ds[j] = dr[j] = dn * u[j] * r * (1.0f - r);
        ds[H + j] = dr[H + j] = dh * (load(h, previous + j, narrow) - n) * z * (1.0f - z);
        ds[2 * H + j] = dn;
        dr[2 * H + j] = dn * r;
        dc[j] = dh * z;
    }
    if (narrow) SIMD for (int64_t j = 0; j < 3 * H; j++) store(p->rounded, row * 3 * H + j, dr[j], 1);
}

#define OVER_ROWS(row, narrow)                                                                            \
    _Pragma("omp parallel for num_threads(p->threads) if (p->threads > 1 && p->cases * p->hidden >= SMALL)") \
    for (int64_t b = 0; b < p->cases; b++) row(p, t, b, narrow)

#define OVER_CASES(name)                       \
    void name(const Steps *p, int64_t t) {     \
        if (p->narrow) { OVER_ROWS(name##_row, 1); } \
        else { OVER_ROWS(name##_row, 0); }     \
    }

OVER_CASES(lstm_advance)
OVER_CASES(lstm_retreat)
OVER_CASES(gru_advance)
OVER_CASES(gru_retreat)
