/* One time-step of the Differentiable Neural Computer, forward and backward: what lies between its matrix products.

Built and called by dnc_kernel.py; the same equations as dnc.py, whose names and order this file keeps. Everything is
row-major and of type `real`, which the compiler is told (-Dreal=float). Gradients lie in a Record of their own, `d`, in
which those of the state are carried from step to step; the order of the backward functions is that of the chain rule.

    B cases, N slots, W word size, R read heads, K write heads, H hidden units
*/

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <tgmath.h>

#include "exponential.h"

#define EPSILON ((real)1e-6)

typedef struct {
    int64_t cases, hidden, slots, word, read_heads, write_heads, threads;
} Sizes;

typedef struct { /* the interface in the order of its rows: after activation, or the gradient before it */
    real *write_vectors, *erase_vectors, *free_gate, *allocation_gate, *write_gate, *read_mode;
    real *write_keys, *write_strengths, *read_keys, *read_strengths, *end;
} Interface;

typedef struct { /* of content addressing, for every head */
    real *word_squares, *cosines, *weights;
} Content;

typedef struct { /* what one step of one case leaves behind; zero before the first */
    real *memory, *usage, *write_weights, *precedence, *link, *read_weights; /* the state */
    Interface interface;
    real *unfreed;    /* [R, N]: the usage before each read head frees */
    real *claimed;    /* [K, N]: the usage that each write head allocates by */
    real *order;      /* [K, N]: slots, the freest first */
    real *allocation; /* [K, N] */
    real *unerased;   /* [K, N, W]: the memory before each write head erases */
    Content write, read;
    real *end;
} Record;

static Interface interface_at(const Sizes *z, real *at)
{
    const int64_t W = z->word, R = z->read_heads, K = z->write_heads;
    Interface i;
    i.write_vectors = at, at += K * W;
    i.erase_vectors = at, at += K * W;
    i.free_gate = at, at += R;
    i.allocation_gate = at, at += K;
    i.write_gate = at, at += K;
    i.read_mode = at, at += R * (1 + 2 * K);
    i.write_keys = at, at += K * W;
    i.write_strengths = at, at += K;
    i.read_keys = at, at += R * W;
    i.read_strengths = at, at += R;
    i.end = at;
    return i;
}

static Record record_at(const Sizes *z, real *at)
{
    const int64_t N = z->slots, W = z->word, R = z->read_heads, K = z->write_heads;
    Record s;
    s.memory = at, at += N * W;
    s.usage = at, at += N;
    s.write_weights = at, at += K * N;
    s.precedence = at, at += K * N;
    s.link = at, at += K * N * N;
    s.read_weights = at, at += R * N;
    s.interface = interface_at(z, at), at = s.interface.end;
    s.unfreed = at, at += R * N;
    s.claimed = at, at += K * N;
    s.order = at, at += K * N;
    s.allocation = at, at += K * N;
    s.unerased = at, at += K * N * W;
    s.write.word_squares = at, at += N;
    s.write.cosines = at, at += K * N;
    s.write.weights = at, at += K * N;
    s.read.word_squares = at, at += N;
    s.read.cosines = at, at += R * N;
    s.read.weights = at, at += R * N;
    s.end = at;
    return s;
}

static int64_t interface_size(const Sizes *z) { return interface_at(z, NULL).end - (real *)NULL; }

int64_t record_size(const Sizes *z) { return record_at(z, NULL).end - (real *)NULL; }

/* Vectors */

static inline real dot(int64_t n, const real *x, const real *y)
{
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

static inline real total(int64_t n, const real *x)
{
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

static inline void add(int64_t n, real factor, const real *x, real *y)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];
}

static inline void scale(int64_t n, real factor, const real *x, real *y)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = factor * x[i];
}

static inline real softplus(real x) { return x > 20 ? x : log1p(exp(x)); } /* as torch */

static void softmax(int64_t n, real *x)
{
    real largest = x[0], sum = 0;
    for (int64_t i = 1; i < n; i++) largest = x[i] > largest ? x[i] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        x[i] = exponential(x[i] - largest, 0);
        sum += x[i];
    }
    scale(n, 1 / sum, x, x);
}

/* Controller: gates [B, 4H] in torch's order i, f, g, o; h, in rows `stride` apart, and c are clamped */

void controller_forward(const Sizes *z, double limit, const real *previous_cell, real *gates, real *cell,
                        real *tanh_cell, real *hidden, int64_t stride)
{
    const int64_t H = z->hidden;
    const real clip = limit;
#pragma omp parallel for num_threads(z->threads) if (z->cases > 1)
    for (int64_t b = 0; b < z->cases; b++)
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
            const int64_t at = b * H + j;
            real *gate = gates + b * 4 * H + j;
            const real i = sigmoid(gate[0]), f = sigmoid(gate[H]), o = sigmoid(gate[3 * H]);
            const real g = hyperbolic_tangent(gate[2 * H]), c = f * previous_cell[at] + i * g;
            const real t = hyperbolic_tangent(c), h = o * t;
            gate[0] = i, gate[H] = f, gate[2 * H] = g, gate[3 * H] = o;
            tanh_cell[at] = t;
            cell[at] = c < -clip ? -clip : c > clip ? clip : c;
            hidden[b * stride + j] = h < -clip ? -clip : h > clip ? clip : h;
        }
}

/* d_gates are before activation; d_cell is carried to the step before. */
void controller_backward(const Sizes *z, double limit, const real *previous_cell, const real *gates, const real *cell,
                         const real *tanh_cell, const real *d_hidden, int64_t stride, real *d_cell, real *d_gates)
{
    const int64_t H = z->hidden;
    const real clip = limit;
#pragma omp parallel for num_threads(z->threads) if (z->cases > 1)
    for (int64_t b = 0; b < z->cases; b++)
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
            const int64_t at = b * H + j;
            const real *gate = gates + b * 4 * H + j;
            const real i = gate[0], f = gate[H], g = gate[2 * H], o = gate[3 * H], t = tanh_cell[at];
            const real dh = fabs(o * t) < clip ? d_hidden[b * stride + j] : 0;
            const real dc = (fabs(cell[at]) < clip ? d_cell[at] : 0) + dh * o * (1 - t * t);
            real *d_gate = d_gates + b * 4 * H + j;
            d_gate[0] = dc * g * i * (1 - i);
            d_gate[H] = dc * previous_cell[at] * f * (1 - f);
            d_gate[2 * H] = dc * i * (1 - g * g);
            d_gate[3 * H] = dh * t * o * (1 - o);
            d_cell[at] = dc * f;
        }
}

/* Content addressing: softmax over the slots of strength * cosine(key, word) */

static void content_forward(const Sizes *z, int64_t heads, const real *memory, const real *keys, const real *strengths,
                            Content s)
{
    const int64_t N = z->slots, W = z->word;
    for (int64_t n = 0; n < N; n++) s.word_squares[n] = dot(W, memory + n * W, memory + n * W) + EPSILON;
    for (int64_t h = 0; h < heads; h++, keys += W, s.cosines += N, s.weights += N) {
        const real key_square = dot(W, keys, keys) + EPSILON;
        for (int64_t n = 0; n < N; n++) {
            const real norms = sqrt(key_square * s.word_squares[n]) + EPSILON;
            s.cosines[n] = dot(W, keys, memory + n * W) / norms;
            s.weights[n] = strengths[h] * s.cosines[n];
        }
        softmax(N, s.weights);
    }
}

/* From the gradient of the weights to those of memory (added), keys and strengths (set). */
static void content_backward(const Sizes *z, int64_t heads, const real *memory, const real *keys, const real *strengths,
                             Content s, const real *weights, real *d_memory, real *d_keys, real *d_strengths)
{
    const int64_t N = z->slots, W = z->word;
    for (int64_t h = 0; h < heads; h++, keys += W, d_keys += W, s.cosines += N, s.weights += N, weights += N) {
        const real key_square = dot(W, keys, keys) + EPSILON, mean = dot(N, weights, s.weights);
        real d_strength = 0, d_key_square = 0;
        memset(d_keys, 0, W * sizeof(real));
        for (int64_t n = 0; n < N; n++) {
            const real d_score = s.weights[n] * (weights[n] - mean);
            const real root = sqrt(key_square * s.word_squares[n]);
            const real d_dot = d_score * strengths[h] / (root + EPSILON), d_root = -d_dot * s.cosines[n];
            d_strength += d_score * s.cosines[n];
            d_key_square += d_root * root / key_square; /* twice it, as is the next: the derivative of a square */
            add(W, d_dot, memory + n * W, d_keys);
            add(W, d_dot, keys, d_memory + n * W);
            add(W, d_root * root / s.word_squares[n], memory + n * W, d_memory + n * W);
        }
        add(W, d_key_square, keys, d_keys);
        d_strengths[h] = d_strength;
    }
}

/* Interface: activations */

static void interface_forward(const Sizes *z, const real *preactivations, Interface y)
{
    const int64_t K = z->write_heads;
    memcpy(y.write_vectors, preactivations, (y.end - y.write_vectors) * sizeof(real));
    const int64_t sigmoids = y.read_mode - y.erase_vectors;
#pragma omp simd
    for (int64_t i = 0; i < sigmoids; i++) y.erase_vectors[i] = sigmoid(y.erase_vectors[i]);
    for (real *x = y.read_mode; x < y.write_keys; x += 1 + 2 * K) softmax(1 + 2 * K, x);
    for (real *x = y.write_strengths; x < y.read_keys; x++) *x = softplus(*x);
    for (real *x = y.read_strengths; x < y.end; x++) *x = softplus(*x);
}

static void interface_backward(const Sizes *z, Interface y, Interface d)
{
    const int64_t modes = 1 + 2 * z->write_heads;
    const real *x = y.erase_vectors;
    for (real *g = d.erase_vectors; g < d.read_mode; g++, x++) *g *= *x * (1 - *x);
    for (real *g = d.read_mode; g < d.write_keys; g += modes, x += modes) {
        const real mean = dot(modes, g, x);
        for (int64_t m = 0; m < modes; m++) g[m] = x[m] * (g[m] - mean);
    }
    x = y.write_strengths; /* the sigmoid of b is 1 - exp(-softplus(b)) */
    for (real *g = d.write_strengths; g < d.read_keys; g++, x++) *g *= -expm1(-*x);
    x = y.read_strengths;
    for (real *g = d.read_strengths; g < d.end; g++, x++) *g *= -expm1(-*x);
}

/* Usage and allocation */

static void usage_forward(const Sizes *z, Record old, Record s)
{
    const int64_t N = z->slots, R = z->read_heads, K = z->write_heads;
    for (int64_t n = 0; n < N; n++) {
        real untouched = 1;
        for (int64_t k = 0; k < K; k++) untouched *= 1 - old.write_weights[k * N + n];
        real usage = 1 - untouched + old.usage[n] * untouched;
        for (int64_t r = 0; r < R; r++) {
            s.unfreed[r * N + n] = usage;
            usage *= 1 - s.interface.free_gate[r] * old.read_weights[r * N + n];
        }
        s.usage[n] = usage;
    }
}

/* Past write weights are constants. The gradient of the past read weights is added to. */
static void usage_backward(const Sizes *z, Record old, Record s, Record d)
{
    const int64_t N = z->slots, R = z->read_heads, K = z->write_heads;
    for (int64_t r = R - 1; r >= 0; r--) {
        const real gate = s.interface.free_gate[r], *weights = old.read_weights + r * N;
        real d_gate = 0;
        for (int64_t n = 0; n < N; n++) {
            const real d_freed = -d.usage[n] * s.unfreed[r * N + n];
            d_gate += d_freed * weights[n];
            d.read_weights[r * N + n] += d_freed * gate;
            d.usage[n] *= 1 - gate * weights[n];
        }
        d.interface.free_gate[r] = d_gate;
    }
    for (int64_t k = 0; k < K; k++)
        for (int64_t n = 0; n < N; n++) d.usage[n] *= 1 - old.write_weights[k * N + n];
}

static void allocate_forward(int64_t N, const real *usage, real *order, real *allocation)
{
    for (int64_t n = 0; n < N; n++) { /* insertion keeps the lower index first on ties */
        const real free = (1 - EPSILON) * (1 - usage[n]);
        int64_t at = n;
        for (; at > 0 && free > (1 - EPSILON) * (1 - usage[(int64_t)order[at - 1]]); at--) order[at] = order[at - 1];
        order[at] = n;
    }
    real all_before_used = 1;
    for (int64_t i = 0; i < N; i++) {
        const int64_t n = order[i];
        const real free = (1 - EPSILON) * (1 - usage[n]);
        allocation[n] = free * all_before_used;
        all_before_used *= 1 - free;
    }
}

/* Adds to d_usage. `used` is a place for N numbers. */
static void allocate_backward(int64_t N, const real *usage, const real *order, const real *allocation, real *used,
                              real *d_usage)
{
    real all_before_used = 1, d_used = 0;
    for (int64_t i = 0; i < N; i++) {
        used[i] = all_before_used;
        all_before_used *= 1 - (1 - EPSILON) * (1 - usage[(int64_t)order[i]]);
    }
    for (int64_t i = N - 1; i >= 0; i--) {
        const int64_t n = order[i];
        const real free = (1 - EPSILON) * (1 - usage[n]);
        d_usage[n] -= (1 - EPSILON) * used[i] * (allocation[n] - d_used);
        d_used = allocation[n] * free + d_used * (1 - free);
    }
}

/* Write */

static void write_forward(const Sizes *z, Record old, Record s)
{
    const int64_t N = z->slots, W = z->word, K = z->write_heads;
    const Interface y = s.interface;
    content_forward(z, K, old.memory, y.write_keys, y.write_strengths, s.write);
    memcpy(s.claimed, s.usage, N * sizeof(real));
    for (int64_t k = 0; k < K; k++) {
        const real *claimed = s.claimed + k * N, *content = s.write.weights + k * N;
        real *allocation = s.allocation + k * N;
        allocate_forward(N, claimed, s.order + k * N, allocation);
        for (int64_t n = 0; n < N; n++) {
            const real mixed = content[n] + y.allocation_gate[k] * (allocation[n] - content[n]);
            s.write_weights[k * N + n] = y.write_gate[k] * mixed;
        }
        if (k + 1 < K)
            for (int64_t n = 0; n < N; n++)
                s.claimed[(k + 1) * N + n] =
                    claimed[n] + (1 - claimed[n]) * y.allocation_gate[k] * y.write_gate[k] * allocation[n];
    }
    memcpy(s.memory, old.memory, N * W * sizeof(real));
    for (int64_t k = 0; k < K; k++) {
        memcpy(s.unerased + k * N * W, s.memory, N * W * sizeof(real));
        for (int64_t n = 0; n < N; n++)
            for (int64_t w = 0; w < W; w++)
                s.memory[n * W + w] *= 1 - s.write_weights[k * N + n] * y.erase_vectors[k * W + w];
    }
    for (int64_t k = 0; k < K; k++)
        for (int64_t n = 0; n < N; n++)
            add(W, s.write_weights[k * N + n], y.write_vectors + k * W, s.memory + n * W);
}

/* The gradient of the write weights, to which their links have given, and of the memory: before the write, now. */
static void written_backward(const Sizes *z, Record s, Record d)
{
    const int64_t N = z->slots, W = z->word, K = z->write_heads;
    memset(d.interface.write_vectors, 0, 2 * K * W * sizeof(real)); /* and the erase vectors */
    for (int64_t k = K - 1; k >= 0; k--)
        for (int64_t n = 0; n < N; n++) {
            const real weight = s.write_weights[k * N + n], *word = d.memory + n * W;
            add(W, weight, word, d.interface.write_vectors + k * W);
            d.write_weights[k * N + n] += dot(W, word, s.interface.write_vectors + k * W);
        }
    for (int64_t k = K - 1; k >= 0; k--)
        for (int64_t n = 0; n < N; n++) {
            const real weight = s.write_weights[k * N + n], *erase = s.interface.erase_vectors + k * W;
            const real *unerased = s.unerased + (k * N + n) * W;
            real *word = d.memory + n * W, *d_erase = d.interface.erase_vectors + k * W, d_weight = 0;
#pragma omp simd reduction(+ : d_weight)
            for (int64_t w = 0; w < W; w++) {
                const real d_erased = -word[w] * unerased[w];
                d_weight += d_erased * erase[w];
                d_erase[w] += d_erased * weight;
                word[w] *= 1 - weight * erase[w];
            }
            d.write_weights[k * N + n] += d_weight;
        }
}

static void write_backward(const Sizes *z, Record old, Record s, Record d)
{
    const int64_t N = z->slots, K = z->write_heads;
    const Interface y = s.interface;
    written_backward(z, s, d);
    memset(d.claimed, 0, K * N * sizeof(real));
    for (int64_t k = K - 1; k >= 0; k--) {
        const real *claimed = s.claimed + k * N, *allocation = s.allocation + k * N, *content = s.write.weights + k * N;
        real *d_claimed = d.claimed + k * N, *d_allocation = d.allocation + k * N, *d_content = d.write.weights + k * N;
        const real gate = y.write_gate[k], share = y.allocation_gate[k];
        real d_gate = 0, d_share = 0;
        for (int64_t n = 0; n < N; n++) {
            const real d_weight = d.write_weights[k * N + n], difference = allocation[n] - content[n];
            d_gate += d_weight * (content[n] + share * difference);
            d_share += d_weight * gate * difference;
            d_allocation[n] = d_weight * gate * share;
            d_content[n] = d_weight * gate * (1 - share);
        }
        if (k + 1 < K) { /* claims of the heads after this one */
            const real *later = d_claimed + N;
            real d_claim = 0;
            for (int64_t n = 0; n < N; n++) {
                d_claim += later[n] * (1 - claimed[n]) * allocation[n];
                d_allocation[n] += later[n] * (1 - claimed[n]) * gate * share;
                d_claimed[n] = later[n] * (1 - gate * share * allocation[n]);
            }
            d_gate += d_claim * share;
            d_share += d_claim * gate;
        }
        allocate_backward(N, claimed, s.order + k * N, d_allocation, d.order, d_claimed);
        d.interface.write_gate[k] = d_gate;
        d.interface.allocation_gate[k] = d_share;
    }
    add(N, 1, d.claimed, d.usage);
    content_backward(z, K, old.memory, y.write_keys, y.write_strengths, s.write, d.write.weights, d.memory,
                     d.interface.write_keys, d.interface.write_strengths);
}

/* Link and precedence */

static void link_forward(const Sizes *z, Record old, Record s)
{
    const int64_t N = z->slots, K = z->write_heads;
    for (int64_t k = 0; k < K; k++) {
        const real *weights = s.write_weights + k * N, *precedence = old.precedence + k * N;
        for (int64_t i = 0; i < N; i++) {
            const real *before = old.link + (k * N + i) * N, later = weights[i];
            real *link = s.link + (k * N + i) * N;
#pragma omp simd
            for (int64_t j = 0; j < N; j++)
                link[j] = (1 - later - weights[j]) * before[j] + later * precedence[j];
            link[i] = 0;
        }
        scale(N, 1 - total(N, weights), precedence, s.precedence + k * N);
        add(N, 1, weights, s.precedence + k * N);
    }
}

/* Sets the gradient of the write weights; those of link and precedence are of the step before, now. */
static void link_backward(const Sizes *z, Record old, Record s, Record d)
{
    const int64_t N = z->slots, K = z->write_heads;
    for (int64_t k = 0; k < K; k++) {
        const real *weights = s.write_weights + k * N, *precedence = old.precedence + k * N;
        real *d_weights = d.write_weights + k * N, *d_precedence = d.precedence + k * N;
        const real d_total = dot(N, d_precedence, precedence), kept = 1 - total(N, weights);
        for (int64_t n = 0; n < N; n++) {
            d_weights[n] = d_precedence[n] - d_total;
            d_precedence[n] *= kept;
        }
        for (int64_t i = 0; i < N; i++) {
            const real *before = old.link + (k * N + i) * N, later = weights[i];
            real *link = d.link + (k * N + i) * N, d_later = 0;
            link[i] = 0;
#pragma omp simd reduction(+ : d_later)
            for (int64_t j = 0; j < N; j++) {
                const real faded = link[j] * before[j];
                d_later += link[j] * precedence[j] - faded;
                d_weights[j] -= faded;
                d_precedence[j] += link[j] * later;
                link[j] *= 1 - later - weights[j];
            }
            d_weights[i] += d_later;
        }
    }
}

/* Read: each head moves backward or forward along every write head's links, or to the content */

static void read_forward(const Sizes *z, Record old, Record s, real *words)
{
    const int64_t N = z->slots, W = z->word, R = z->read_heads, K = z->write_heads;
    content_forward(z, R, s.memory, s.interface.read_keys, s.interface.read_strengths, s.read);
    memset(words, 0, R * W * sizeof(real));
    for (int64_t r = 0; r < R; r++, words += W) {
        const real *mode = s.interface.read_mode + r * (1 + 2 * K), *previous = old.read_weights + r * N;
        real *weights = s.read_weights + r * N;
        scale(N, mode[2 * K], s.read.weights + r * N, weights);
        for (int64_t k = 0; k < K; k++)
            for (int64_t i = 0; i < N; i++) {
                const real *link = s.link + (k * N + i) * N;
                add(N, mode[k] * previous[i], link, weights);
                weights[i] += mode[K + k] * dot(N, link, previous);
            }
        for (int64_t n = 0; n < N; n++) add(W, weights[n], s.memory + n * W, words);
    }
}

static void read_backward(const Sizes *z, Record old, Record s, const real *words, Record d)
{
    const int64_t N = z->slots, W = z->word, R = z->read_heads, K = z->write_heads;
    for (int64_t r = 0; r < R; r++, words += W) {
        const real *mode = s.interface.read_mode + r * (1 + 2 * K), *previous = old.read_weights + r * N;
        real *d_mode = d.interface.read_mode + r * (1 + 2 * K), *d_previous = d.read_weights + r * N;
        real *weights = d.unfreed + r * N; /* a place for the gradient of this step's read weights */
        for (int64_t n = 0; n < N; n++) {
            add(W, s.read_weights[r * N + n], words, d.memory + n * W);
            weights[n] = d_previous[n] + dot(W, words, s.memory + n * W);
        }
        d_mode[2 * K] = dot(N, weights, s.read.weights + r * N);
        scale(N, mode[2 * K], weights, d.read.weights + r * N);
        memset(d_previous, 0, N * sizeof(real));
        for (int64_t k = 0; k < K; k++) {
            const real backward = mode[k], forward = mode[K + k];
            real d_backward = 0, d_forward = 0;
            for (int64_t i = 0; i < N; i++) {
                const real *link = s.link + (k * N + i) * N;
                real *d_link = d.link + (k * N + i) * N;
                const real onto = dot(N, link, weights), from = dot(N, link, previous);
                d_backward += previous[i] * onto;
                d_forward += weights[i] * from;
                d_previous[i] += backward * onto;
                add(N, forward * weights[i], link, d_previous);
                add(N, backward * previous[i], weights, d_link);
                add(N, forward * weights[i], previous, d_link);
            }
            d_mode[k] = d_backward;
            d_mode[K + k] = d_forward;
        }
    }
    content_backward(z, R, s.memory, s.interface.read_keys, s.interface.read_strengths, s.read, d.read.weights,
                     d.memory, d.interface.read_keys, d.interface.read_strengths);
}

/* Memory: from the interface's pre-activations [B, rows] to the words read, in rows `stride` apart */

void memory_forward(const Sizes *z, const real *preactivations, const real *previous, real *records, real *words,
                    int64_t stride)
{
    const int64_t size = record_size(z), rows = interface_size(z);
#pragma omp parallel for num_threads(z->threads) if (z->cases > 1)
    for (int64_t b = 0; b < z->cases; b++) {
        const Record old = record_at(z, (real *)previous + b * size), s = record_at(z, records + b * size);
        interface_forward(z, preactivations + b * rows, s.interface);
        usage_forward(z, old, s);
        write_forward(z, old, s);
        link_forward(z, old, s);
        read_forward(z, old, s, words + b * stride);
    }
}

/* `words` and `preactivations` are gradients; so are `d_records`, which must be zero before the last step. */
void memory_backward(const Sizes *z, const real *previous, const real *records, const real *words, int64_t stride,
                     real *d_records, real *preactivations)
{
    const int64_t size = record_size(z), rows = interface_size(z);
#pragma omp parallel for num_threads(z->threads) if (z->cases > 1)
    for (int64_t b = 0; b < z->cases; b++) {
        const Record old = record_at(z, (real *)previous + b * size), s = record_at(z, (real *)records + b * size);
        Record d = record_at(z, d_records + b * size);
        d.interface = interface_at(z, preactivations + b * rows);
        read_backward(z, old, s, words + b * stride, d);
        link_backward(z, old, s, d);
        write_backward(z, old, s, d);
        usage_backward(z, old, s, d);
        interface_backward(z, s.interface, d.interface);
    }
}
