/* Products of a wide matrix with a few ranks, for one element type: float, or bfloat16 with -DBF16.

   X is [N, features], S is [N, width], rows in order. A factor is a low-rank matrix [rank, features]
   of any strides, in the element type or float32, whose ranks meet the columns of S from `first`
   on; `first` is even, and S has a column of zeros after an odd rank. With several
   factors F, side by side in S:

     narrow   S = X (scale F)^T         wide   X += S (scale F) + bias        outer   F = scale S^T X

   drop leaves elements out by the mask of _dropout.py, which the Triton kernels draw too.

   Sums run in float32 in an order that depends neither on the threads nor on the tiles; scale F is
   rounded to the element type, as is what is stored. In bfloat16 a *unit* is two neighbours of a
   sum, which one instruction multiplies and adds; in float32 it is one. Factors are packed as units
   [terms of the sum][lanes], the other operand's units are broadcast straight from memory. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef BF16
#include <immintrin.h>
typedef uint16_t element;
typedef uint32_t unit;
typedef __m512 vec;
#define PAIR 2
#define LANES 16

INLINE float widened(element x)
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

INLINE element rounded(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x)
        return (element)(bits >> 16 | 0x40);
    return (element)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE unit joined(element low, element high) { return (uint32_t)high << 16 | low; }
INLINE vec zero(void) { return _mm512_setzero_ps(); }
INLINE vec plus(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE __m512i sixteen(const element *x)
{
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)x));
}
INLINE vec load(const element *x) { return _mm512_castsi512_ps(_mm512_slli_epi32(sixteen(x), 16)); }
INLINE void store(element *x, vec v)
{
    _mm256_storeu_si256((void *)x, (__m256i)_mm512_cvtneps_pbh(v));
}
INLINE vec floats(const float *x) { return _mm512_loadu_ps(x); }
INLINE void store_floats(float *x, vec v) { _mm512_storeu_ps(x, v); }
typedef __m512i units;
INLINE units load_units(const unit *p) { return _mm512_loadu_si512(p); }
/* Two rows, term by term; `next` may be the row itself where its factor is zero. */
INLINE units two_rows(const element *x, const element *next)
{
    return _mm512_or_si512(sixteen(x), _mm512_slli_epi32(sixteen(next), 16));
}
INLINE vec products(vec sum, units p, units x)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)p, (__m512bh)x);
}
INLINE vec multiplied(vec sum, units p, unit x)
{
    return products(sum, p, _mm512_set1_epi32((int)x));
}
INLINE float total(vec v) { return _mm512_reduce_add_ps(v); }
#else
typedef float element, unit;
#define PAIR 1
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef vec units;

INLINE float widened(element x) { return x; }
INLINE element rounded(float x) { return x; }
INLINE unit joined(element low, element high) { return (void)high, low; }
INLINE vec zero(void) { return (vec){0}; }
INLINE vec plus(vec a, vec b) { return a + b; }
INLINE vec load(const element *x)
{
    vec v;
    memcpy(&v, x, sizeof v);
    return v;
}
INLINE void store(element *x, vec v) { memcpy(x, &v, sizeof v); }
INLINE vec floats(const float *x) { return load(x); }
INLINE void store_floats(float *x, vec v) { store(x, v); }
INLINE units load_units(const unit *p) { return load(p); }
INLINE units two_rows(const element *x, const element *next) { return (void)next, load(x); }
INLINE vec products(vec sum, units p, units x) { return sum + p * x; }
INLINE vec multiplied(vec sum, units p, unit x) { return sum + p * x; }
INLINE float total(vec v)
{
    float x[LANES];
    memcpy(x, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] += x[i + half];
    return x[0];
}
#endif

INLINE unit unit_at(const element *x, int64_t u)
{
    unit found;
    memcpy(&found, x + PAIR * u, sizeof found);
    return found;
}

#define STRIDE (PAIR * LANES)       /* elements of a vector of units */
#define ROWS 8                     /* of a tile */
#define MOST 2                     /* vectors of a tile's row */
#define RANKS 8
#define STRIP (4 * LANES)          /* features of an outer product's tile */
#define AHEAD 8                    /* rows from a row to the one that is fetched meanwhile */
#define PACKED 256                 /* features that a thread packs at a time */
#define RUN 256                    /* units summed before they join the total */
#define SMALL (1 << 16)            /* multiplications that are not worth a second thread */

typedef struct {
    void *data;
    int64_t of_rank, of_feature;   /* strides, in elements of its own type */
    int64_t rank, first;
    int64_t is_float;
} factor;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t units_of(int64_t terms) { return (terms + PAIR - 1) / PAIR; }
INLINE int64_t lanes_of(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE element entry(const factor *f, int64_t rank, int64_t feature, float scale)
{
    int64_t at = rank * f->of_rank + feature * f->of_feature;
    return f->is_float ? rounded(((const float *)f->data)[at] * scale)
                       : rounded(widened(((const element *)f->data)[at]) * scale);
}

static int alone(int64_t rows, int64_t features, int64_t width, int threads)
{
    return rows * features * width < SMALL ? 1 : threads;
}

/* S [rows][ranks]: rows of X, whole vectors and a `rest` padded with zeros, times rows of P. */
INLINE void narrow_tile(const int ranks, const int rows, const element *X, int64_t ldx,
                        int64_t whole, const element *rest, const element *P, int64_t ldp,
                        element *S, int64_t lds)
{
    vec sum[3][RANKS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < ranks; j++)
            sum[i][j] = zero();
    for (int64_t k = 0; k < whole; k += STRIDE) {
        units x[3];
        for (int i = 0; i < rows; i++)
            x[i] = load_units((const unit *)(X + i * ldx + k));
        for (int j = 0; j < ranks; j++) {
            units p = load_units((const unit *)(P + j * ldp + k));
            for (int i = 0; i < rows; i++)
                sum[i][j] = products(sum[i][j], p, x[i]);
        }
    }
    for (int j = 0; rest && j < ranks; j++) {
        units p = load_units((const unit *)(P + j * ldp + whole));
        for (int i = 0; i < rows; i++)
            sum[i][j] = products(sum[i][j], p, load_units((const unit *)(rest + i * STRIDE)));
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < ranks; j++)
            S[i * lds + j] = rounded(total(sum[i][j]));
}

/* X rows [start, start + rows), `vectors` vectors of features. */
INLINE void wide_tile(const int rows, const int vectors, element *X, int64_t ldx, const element *S,
                      int64_t lds, int64_t terms, const unit *P, int64_t lanes, const float *bias)
{
    vec sum[ROWS][MOST];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++)
            sum[i][v] = bias ? floats(bias + v * LANES) : zero();
    for (int64_t u = 0; u < terms; u++) {
        units p[MOST];
        for (int v = 0; v < vectors; v++)
            p[v] = load_units(P + u * lanes + v * LANES);
        for (int i = 0; i < rows; i++) {
            unit s = unit_at(S + i * lds, u);
            for (int v = 0; v < vectors; v++)
                sum[i][v] = multiplied(sum[i][v], p[v], s);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) { /* last: X is large, its terms are small */
            element *x = X + i * ldx + v * LANES;
            store(x, plus(load(x), sum[i][v]));
        }
}

/* Ranks of Q [terms][width] times rows of X, `STRIP` features: added to G [ranks][STRIP]. */
INLINE void outer_tile(const int ranks, const int vectors, const element *X, int64_t ldx,
                       int64_t rows, const unit *Q, int64_t width, float *G)
{
    vec sum[ROWS][STRIP / LANES];
    for (int j = 0; j < ranks; j++)
        for (int v = 0; v < vectors; v++)
            sum[j][v] = zero();
    for (int64_t n = 0; n < rows; n += PAIR) {
        const element *x = X + n * ldx, *next = n + PAIR <= rows ? x + (PAIR - 1) * ldx : x;
        units p[STRIP / LANES];
        for (int64_t ahead = 0; ahead < PAIR; ahead++)
            for (int64_t line = 0; line < STRIP * (int64_t)sizeof(element); line += 64)
                __builtin_prefetch((const char *)(x + (AHEAD + ahead) * ldx) + line);
        for (int v = 0; v < vectors; v++)
            p[v] = two_rows(x + v * LANES, next + v * LANES);
        for (int j = 0; j < ranks; j++)
            for (int v = 0; v < vectors; v++)
                sum[j][v] = multiplied(sum[j][v], p[v], Q[n / PAIR * width + j]);
    }
    for (int j = 0; j < ranks; j++)
        for (int v = 0; v < vectors; v++) {
            float *g = G + j * STRIP + v * LANES;
            store_floats(g, plus(floats(g), sum[j][v]));
        }
}

/* A tile of `n` rows or ranks, its size known to the compiler. */
#define WITH(n, vectors, tile, ...)                                                                \
    switch (n) {                                                                                   \
    case 1: tile(1, vectors, __VA_ARGS__); break;                                                  \
    case 2: tile(2, vectors, __VA_ARGS__); break;                                                  \
    case 3: tile(3, vectors, __VA_ARGS__); break;                                                  \
    case 4: tile(4, vectors, __VA_ARGS__); break;                                                  \
    case 5: tile(5, vectors, __VA_ARGS__); break;                                                  \
    case 6: tile(6, vectors, __VA_ARGS__); break;                                                  \
    case 7: tile(7, vectors, __VA_ARGS__); break;                                                  \
    default: tile(8, vectors, __VA_ARGS__);                                                        \
    }

int narrow(const element *X, int64_t ldx, int64_t N, int64_t features, element *S, int64_t lds,
           int64_t width, const factor *factors, int64_t count, float scale, int threads)
{
    int64_t whole = features / STRIDE * STRIDE, ldp = whole + (features > whole) * STRIDE;
    element *P = aligned_alloc(64, (width * ldp * sizeof(element) + 63) / 64 * 64);
    if (!P)
        return 1;
#pragma omp parallel num_threads(alone(N, features, width, threads))
    {
#pragma omp for
        for (int64_t begin = 0; begin < ldp; begin += PACKED) {
            int64_t end = least(begin + PACKED, ldp), stop = least(end, features);
            for (int64_t j = 0; j < width; j++)
                memset(P + j * ldp + begin, 0, (end - begin) * sizeof(element));
            for (const factor *f = factors; f < factors + count; f++)
                for (int64_t j = 0; j < f->rank; j++)
                    for (int64_t k = begin; k < stop; k++)
                        P[(f->first + j) * ldp + k] = entry(f, j, k, scale);
        }
#pragma omp for
        for (int64_t n = 0; n < N; n += 3) {
            int rows = (int)least(3, N - n);
            const element *x = X + n * ldx;
            element padded[3 * STRIDE], *rest = features > whole ? padded : 0;
            for (int i = 0; rest && i < rows; i++) {
                memset(rest + i * STRIDE, 0, STRIDE * sizeof(element));
                memcpy(rest + i * STRIDE, x + i * ldx + whole, (features - whole) * sizeof(element));
            }
            for (int64_t j = 0; j < width; j += RANKS) {
                int ranks = (int)least(RANKS, width - j);
                const element *p = P + j * ldp;
                element *s = S + n * lds + j;
                if (rows == 3) {
                    WITH(ranks, 3, narrow_tile, x, ldx, whole, rest, p, ldp, s, lds)
                } else {
                    for (int i = 0; i < rows; i++)
                        WITH(ranks, 1, narrow_tile, x + i * ldx, ldx, whole,
                             rest ? rest + i * STRIDE : 0, p, ldp, s + i * lds, lds)
                }
            }
            for (const factor *f = factors; f < factors + count; f++)
                if (f->rank % 2)       /* a column nobody asked for: 0, whatever X holds */
                    for (int i = 0; i < rows; i++)
                        S[(n + i) * lds + f->first + f->rank] = 0;
        }
    }
    free(P);
    return 0;
}

int wide(element *X, int64_t ldx, int64_t N, int64_t features, const element *S, int64_t lds,
         int64_t width, const factor *factors, int64_t count, float scale, const element *bias,
         int threads)
{
    int64_t terms = units_of(width), lanes = lanes_of(features);
    unit *P = aligned_alloc(64, ((terms + 1) * lanes + 16) / 16 * 64);
    if (!P)
        return 1;
    float *wide_bias = bias ? (float *)(P + terms * lanes) : 0;
#pragma omp parallel num_threads(alone(N, features, width, threads))
    {
#pragma omp for
        for (int64_t c = 0; c < lanes; c += LANES) {
            int64_t columns = least(LANES, features - c);
            for (int64_t u = 0; u < terms; u++)
                memset(P + u * lanes + c, 0, LANES * sizeof(unit));
            for (const factor *f = factors; f < factors + count; f++)
                for (int64_t j = 0; j < f->rank; j += PAIR) {
                    unit *p = P + (f->first + j) / PAIR * lanes + c;
                    for (int64_t k = 0; k < columns; k++) {
                        element low = entry(f, j, c + k, scale), high = 0;
                        if (PAIR == 2 && j + 1 < f->rank)
                            high = entry(f, j + 1, c + k, scale);
                        p[k] = joined(low, high);
                    }
                }
            for (int64_t k = 0; bias && k < LANES; k++)
                wide_bias[c + k] = k < columns ? widened(bias[c + k]) : 0;
        }
#pragma omp for
        for (int64_t n = 0; n < N; n += ROWS) {
            int rows = (int)least(ROWS, N - n);
            const element *s = S + n * lds;
            int64_t c = 0;
            for (; c + 2 * LANES <= features; c += 2 * LANES)
                WITH(rows, 2, wide_tile, X + n * ldx + c, ldx, s, lds, terms, P + c, lanes,
                     bias ? wide_bias + c : 0)
            for (; c < features; c += LANES) {
                int64_t columns = least(LANES, features - c);
                element tile[ROWS * LANES] = {0};
                for (int i = 0; i < rows; i++)
                    memcpy(tile + i * LANES, X + (n + i) * ldx + c, columns * sizeof(element));
                WITH(rows, 1, wide_tile, tile, LANES, s, lds, terms, P + c, lanes,
                     bias ? wide_bias + c : 0)
                for (int i = 0; i < rows; i++)
                    memcpy(X + (n + i) * ldx + c, tile + i * LANES, columns * sizeof(element));
            }
        }
    }
    free(P);
    return 0;
}

/* Features [c, c + columns) of every factor, from sums G [width][STRIP]. */
INLINE void write_factors(const factor *factors, int64_t count, const float *G, int64_t c,
                          int64_t columns, float scale)
{
    for (const factor *f = factors; f < factors + count; f++)
        for (int64_t j = 0; j < f->rank; j++)
            for (int64_t k = 0; k < columns; k++) {
                float value = G[(f->first + j) * STRIP + k] * scale;
                int64_t at = j * f->of_rank + (c + k) * f->of_feature;
                if (f->is_float)
                    ((float *)f->data)[at] = value;
                else
                    ((element *)f->data)[at] = rounded(value);
            }
}

int outer(const element *X, int64_t ldx, int64_t N, int64_t features, const element *S, int64_t lds,
          int64_t width, const factor *factors, int64_t count, float scale, int threads)
{
    int64_t terms = units_of(N);
    unit *Q = aligned_alloc(64, (terms * width + 16) / 16 * 64);
    if (!Q)
        return 1;
    int failed = 0;
#pragma omp parallel num_threads(alone(N, features, width, threads))
    {
#pragma omp for
        for (int64_t u = 0; u < terms; u++) {
            const element *s = S + PAIR * u * lds;
            int two = PAIR * u + 1 < N;
            for (int64_t j = 0; j < width; j++)
                Q[u * width + j] = joined(s[j], PAIR == 2 && two ? s[lds + j] : 0);
        }
        float *G = aligned_alloc(64, width * STRIP * sizeof(float));
        if (!G) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < features; c += STRIP) {
            if (!G)
                continue;
            int64_t columns = least(STRIP, features - c);
            memset(G, 0, width * STRIP * sizeof(float));
            for (int64_t n = 0; n < N; n += RUN) {
                element edge[RUN * STRIP];
                const element *x = X + n * ldx + c;
                int64_t rows = least(RUN, N - n), ld = ldx;
                if (columns < STRIP) { /* through a copy */
                    memset(edge, 0, sizeof edge);
                    for (int64_t i = 0; i < rows; i++)
                        memcpy(edge + i * STRIP, x + i * ldx, columns * sizeof(element));
                    x = edge, ld = STRIP;
                }
                for (int64_t j = 0; j < width; j += 6) {
                    int ranks = (int)least(6, width - j);
                    WITH(ranks, STRIP / LANES, outer_tile, x, ld, rows, Q + n / PAIR * width + j,
                         width, G + j * STRIP)
                }
            }
            write_factors(factors, count, G, c, columns, scale);
        }
        free(G);
    }
    free(Q);
    return failed;
}

/* Philox4x32-10 with counters (first + i, row, 0, 0), i < COUNTERS: words in the order of i. */
#define COUNTERS 16
INLINE void words(uint64_t key, uint32_t row, uint32_t first, uint32_t *out)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0[COUNTERS], c1[COUNTERS], c2[COUNTERS], c3[COUNTERS];
    for (int i = 0; i < COUNTERS; i++)
        c0[i] = first + i, c1[i] = row, c2[i] = 0, c3[i] = 0;
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < COUNTERS; i++) {
            uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0, c1[i] = (uint32_t)p1;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1, c3[i] = (uint32_t)p0;
        }
    for (int i = 0; i < COUNTERS; i++)
        out[4 * i] = c0[i], out[4 * i + 1] = c1[i], out[4 * i + 2] = c2[i], out[4 * i + 3] = c3[i];
}

/* Y = X, or Y += X, where _dropout.py's mask keeps an element; Y = 0, or as it was, elsewhere. */
void drop(const element *X, int64_t ldx, int64_t N, int64_t features, uint64_t key, int dropped,
          element *Y, int64_t ldy, int add, int threads)
{
#pragma omp parallel for num_threads(alone(N, features, 8, threads))
    for (int64_t n = 0; n < N; n++)
        for (int64_t c = 0; c < features; c += 8 * COUNTERS) {
            uint32_t drawn[4 * COUNTERS];
            uint16_t halves[8 * COUNTERS];
            int64_t columns = least(8 * COUNTERS, features - c);
            const element *x = X + n * ldx + c;
            element *y = Y + n * ldy + c;
            words(key, (uint32_t)n, (uint32_t)(c / 8), drawn);
            memcpy(halves, drawn, sizeof halves); /* little-endian: low halves first */
            for (int64_t k = 0; add && k < columns; k++)
                y[k] = halves[k] >= dropped ? rounded(widened(y[k]) + widened(x[k])) : y[k];
            for (int64_t k = 0; !add && k < columns; k++)
                y[k] = halves[k] >= dropped ? x[k] : 0;
        }
}
