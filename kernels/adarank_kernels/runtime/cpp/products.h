// Products of a wide matrix with a few ranks, for one element type and one instruction set. Included
// several times by adarank.cpp, each time in a namespace of its own: ELEMENT_BF16 is 1 or 0, LANES the
// number of 32-bit lanes of a vector.
//
// X is [N, features], S is [N, width], rows in order. A factor is a low-rank matrix [rank, features] of
// any strides, in the element type or float32, whose ranks meet the columns of S from `first` on. In
// bfloat16 `first` is even, and a column of zeros in S follows an odd rank. With several factors F side
// by side in S:
//
//   shrink   S = X (scaling F)^T      expand   X += S (scaling F) + bias      outer   F = scaling S^T X
//
// Sums run in float32, in an order that depends neither on the threads nor on the tiles. scaling F is
// rounded to the element type, as is what is stored. A *unit* is what one lane multiplies at once: two
// neighbours of a sum in bfloat16, one number in float32. One operand is packed as units [terms of the
// sum][lanes]; units of the other are broadcast straight from memory.

#if ELEMENT_BF16
typedef uint16_t element;
typedef uint32_t unit;
typedef __m512 vec;
typedef __m512i units;
constexpr int PAIR = 2;

INLINE float widened(float x) { return x; }

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
INLINE vec zero() { return _mm512_setzero_ps(); }
INLINE vec plus(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE __m512i sixteen(const element *x)
{
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
}
INLINE vec load(const element *x) { return _mm512_castsi512_ps(_mm512_slli_epi32(sixteen(x), 16)); }
INLINE void store(element *x, vec v)
{
    _mm256_storeu_si256((__m256i *)x, (__m256i)_mm512_cvtneps_pbh(v));
}
INLINE vec floats(const float *x) { return _mm512_loadu_ps(x); }
INLINE void store_floats(float *x, vec v) { _mm512_storeu_ps(x, v); }
INLINE units load_units(const unit *p) { return _mm512_loadu_si512(p); }
// Two rows, term by term; `next` may be the row itself where its factor is zero.
INLINE units two_rows(const element *x, const element *next)
{
    return _mm512_or_si512(sixteen(x), _mm512_slli_epi32(sixteen(next), 16));
}
INLINE units broadcast(unit x) { return _mm512_set1_epi32((int)x); }
INLINE units broadcast_two(const element *x)
{
    int64_t two;
    memcpy(&two, x, sizeof two);
    return _mm512_set1_epi64(two);
}
INLINE vec products(vec sum, units p, units x)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)p, (__m512bh)x);
}
#else
typedef float element, unit;
constexpr int PAIR = 1;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef vec units;

INLINE float widened(element x) { return x; }
INLINE element rounded(float x) { return x; }
INLINE unit joined(element low, element) { return low; }
INLINE vec zero() { return vec{0}; }
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
INLINE units two_rows(const element *x, const element *) { return load(x); }
INLINE units broadcast(unit x) { return zero() + x; }
INLINE units broadcast_two(const element *x)
{
    typedef int64_t pairs __attribute__((vector_size(4 * LANES)));
    int64_t two;
    memcpy(&two, x, sizeof two);
    return (units)(pairs{} + two);
}
INLINE vec products(vec sum, units p, units x) { return sum + p * x; }
#endif

INLINE unit unit_at(const element *x, int64_t u)
{
    unit found;
    memcpy(&found, x + PAIR * u, sizeof found);
    return found;
}

INLINE int64_t units_of(int64_t terms) { return (terms + PAIR - 1) / PAIR; }
INLINE int64_t lanes_of(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE float number(const Factor &f, int64_t rank, int64_t feature)
{
    int64_t at = rank * f.of_rank + feature * f.of_feature;
    return f.is_float ? ((const float *)f.data)[at] : widened(((const element *)f.data)[at]);
}

INLINE element entry(const Factor &f, int64_t rank, int64_t feature, float scaling)
{
    return rounded(number(f, rank, feature) * scaling);
}

// A few rows: the factors are read once and not packed.

// A row of X with one rank: along the features, lane by lane.
INLINE float dot(const element *x, const Factor &f, int64_t rank, int64_t features)
{
    constexpr int64_t STEP = 4 * LANES;
    float sum[LANES] = {0};
    const char *row = (const char *)f.data + rank * f.of_rank * (f.is_float ? 4 : sizeof(element));
    int64_t k = 0;
    if (f.of_feature == 1) {
        vec sums[4] = {zero(), zero(), zero(), zero()};
        for (; k + STEP <= features; k += STEP)
            for (int v = 0; v < 4; v++) {
                vec a = f.is_float ? floats((const float *)row + k + v * LANES)
                                   : load((const element *)row + k + v * LANES);
                sums[v] += load(x + k + v * LANES) * a;
            }
        store_floats(sum, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            sum[i] += sum[i + half];
    for (; k < features; k++)
        sum[0] += widened(x[k]) * number(f, rank, k);
    return sum[0];
}

constexpr int TOGETHER = 8; // sums that do not wait for each other

// out[j] += x . F[:, j] where the ranks of a feature lie side by side; short sums, since a long one rounds more.
template <typename T>
INLINE void add_features(const element *x, const T *F, int64_t stride, int64_t rank, int64_t features,
                         float *__restrict out)
{
    constexpr int STEP = 4 * TOGETHER;
    int64_t first = 0;
    for (; first + STEP <= features; first += STEP)
        for (int64_t j = 0; j < rank; j++) {
            float sums[TOGETHER] = {0};
            for (int i = 0; i < STEP; i++)
                sums[i % TOGETHER] += widened(x[first + i]) * widened(F[(first + i) * stride + j]);
            out[j] += ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        }
    for (; first < features; first++)
        for (int64_t j = 0; j < rank; j++)
            out[j] += widened(x[first]) * widened(F[first * stride + j]);
}

void shrink_few(const element *X, int64_t ldx, int64_t N, int64_t features, element *S, int64_t lds,
                const std::vector<Factor> &factors, float scaling)
{
    std::vector<float> sums;
    for (const Factor &f : factors)
        for (int64_t n = 0; n < N; n++) {
            const element *x = X + n * ldx;
            sums.assign(f.rank, 0);
            if (f.of_rank == 1 && f.is_float)
                add_features(x, (const float *)f.data, f.of_feature, f.rank, features, sums.data());
            else if (f.of_rank == 1)
                add_features(x, (const element *)f.data, f.of_feature, f.rank, features, sums.data());
            else
                for (int64_t j = 0; j < f.rank; j++)
                    sums[j] = dot(x, f, j, features);
            for (int64_t j = 0; j < f.rank; j++)
                S[n * lds + f.first + j] = rounded(sums[j] * scaling);
        }
}

// out[k] += scaling s . F[k] where the ranks of a feature lie side by side: lora_B.
template <typename T>
INLINE void add_ranks(const element *s, const T *F, int64_t stride, int64_t rank, int64_t features, float scaling,
                      float *__restrict out)
{
    int64_t first = 0;
    for (; first + TOGETHER <= features; first += TOGETHER) {
        float sums[TOGETHER] = {0};
        const T *row = F + first * stride;
        for (int64_t j = 0; j < rank; j++)
            for (int i = 0; i < TOGETHER; i++)
                sums[i] += widened(s[j]) * widened(row[i * stride + j]);
        for (int i = 0; i < TOGETHER; i++)
            out[first + i] += sums[i] * scaling;
    }
    for (; first < features; first++) {
        float sum = 0;
        for (int64_t j = 0; j < rank; j++)
            sum += widened(s[j]) * widened(F[first * stride + j]);
        out[first] += sum * scaling;
    }
}

// out += factor F, numbers side by side.
template <typename T>
INLINE void add_row(float factor, const T *F, int64_t features, float *__restrict out)
{
    for (int64_t k = 0; k < features; k++)
        out[k] += factor * widened(F[k]);
}

void expand_few(element *X, int64_t ldx, int64_t N, int64_t features, const element *S, int64_t lds,
                const std::vector<Factor> &factors, float scaling, const element *bias)
{
    std::vector<float> sums(features);
    for (int64_t n = 0; n < N; n++) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (const Factor &f : factors) {
            const element *s = S + n * lds + f.first;
            auto low = (const element *)f.data;
            auto high = (const float *)f.data;
            if (f.of_rank == 1 && f.is_float)
                add_ranks(s, high, f.of_feature, f.rank, features, scaling, sums.data());
            else if (f.of_rank == 1)
                add_ranks(s, low, f.of_feature, f.rank, features, scaling, sums.data());
            else
                for (int64_t j = 0; j < f.rank; j++) {
                    float factor = widened(s[j]) * scaling;
                    if (f.of_feature == 1 && f.is_float)
                        add_row(factor, high + j * f.of_rank, features, sums.data());
                    else if (f.of_feature == 1)
                        add_row(factor, low + j * f.of_rank, features, sums.data());
                    else
                        for (int64_t k = 0; k < features; k++)
                            sums[k] += factor * number(f, j, k);
                }
        }
        for (int64_t k = 0; k < features; k++)
            X[n * ldx + k] = rounded(widened(X[n * ldx + k]) + (bias ? sums[k] + widened(bias[k]) : sums[k]));
    }
}

// out [R][V vectors]: sums over every `step`th of `terms` units of a row of X times the packed P.
template <int R, int V, int step = 1>
INLINE void tile(vec (&sum)[R][V], const element *X, int64_t ldx, const unit *P, int64_t lanes,
                 int64_t terms)
{
    for (int64_t u = 0; u < terms; u += step) {
        units p[V];
        for (int v = 0; v < V; v++)
            p[v] = load_units(P + u * lanes + v * LANES);
        for (int i = 0; i < R; i++) {
            units x = broadcast(unit_at(X + i * ldx, u));
            for (int v = 0; v < V; v++)
                sum[i][v] = products(sum[i][v], p[v], x);
        }
    }
}

// A sum over the features is the sum over the even units plus that over the odd ones, each of short sums,
// since a long one rounds more. So a rank's result does not depend on the tile that it falls into: where half
// a vector of ranks is left, one lane takes the even units and its neighbour the odd ones.
constexpr int64_t SHORT = 32; // units

template <int R, int V>
INLINE void shrink_tile(const element *X, int64_t ldx, int64_t features, const unit *P, int64_t lanes,
                        element *S, int64_t lds, int64_t columns)
{
    vec total[2][R][V];
    int64_t paired = features / (2 * PAIR) * 2;
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < R; i++)
            for (int v = 0; v < V; v++)
                total[h][i][v] = zero();
    for (int64_t u = 0; u < paired; u += SHORT)
        for (int h = 0; h < 2; h++) {
            vec sum[R][V];
            for (int i = 0; i < R; i++)
                for (int v = 0; v < V; v++)
                    sum[i][v] = zero();
            tile<R, V, 2>(sum, X + PAIR * (u + h), ldx, P + (u + h) * lanes, lanes,
                          std::min<int64_t>(SHORT, paired - u) - h);
            for (int i = 0; i < R; i++)
                for (int v = 0; v < V; v++)
                    total[h][i][v] = plus(total[h][i][v], sum[i][v]);
        }
    for (int64_t u = paired; PAIR * u < features; u++) // the rest of a row
        for (int i = 0; i < R; i++) {
            element rest[PAIR] = {0};
            memcpy(rest, X + i * ldx + PAIR * u, std::min<int64_t>(PAIR, features - PAIR * u) * sizeof(element));
            units x = broadcast(unit_at(rest, 0));
            for (int v = 0; v < V; v++)
                total[u % 2][i][v] = products(total[u % 2][i][v], load_units(P + u * lanes + v * LANES), x);
        }
    for (int i = 0; i < R; i++) {
        element row[V * LANES];
        for (int v = 0; v < V; v++)
            store(row + v * LANES, plus(total[0][i][v], total[1][i][v]));
        memcpy(S + i * lds, row, std::min<int64_t>(columns, V * LANES) * sizeof(element));
    }
}

// Half a vector of ranks; P is packed [pairs of units][rank, even or odd].
template <int R>
INLINE void half_tile(const element *X, int64_t ldx, int64_t features, const unit *P, element *S, int64_t lds,
                      int64_t columns)
{
    vec total[R];
    int64_t both = features / (2 * PAIR);
    for (int i = 0; i < R; i++)
        total[i] = zero();
    for (int64_t u = 0; u < both; u += SHORT / 2) {
        vec sum[R];
        for (int i = 0; i < R; i++)
            sum[i] = zero();
        for (int64_t k = u; k < std::min<int64_t>(u + SHORT / 2, both); k++) {
            units p = load_units(P + k * LANES);
            for (int i = 0; i < R; i++)
                sum[i] = products(sum[i], p, broadcast_two(X + i * ldx + 2 * PAIR * k));
        }
        for (int i = 0; i < R; i++)
            total[i] = plus(total[i], sum[i]);
    }
    if (2 * PAIR * both < features) { // the rest of a row
        units p = load_units(P + both * LANES);
        for (int i = 0; i < R; i++) {
            element rest[2 * PAIR] = {0};
            memcpy(rest, X + i * ldx + 2 * PAIR * both, (features - 2 * PAIR * both) * sizeof(element));
            total[i] = products(total[i], p, broadcast_two(rest));
        }
    }
    for (int i = 0; i < R; i++) {
        float lanes[LANES], sums[LANES] = {0};
        element row[LANES];
        store_floats(lanes, total[i]);
        for (int j = 0; j < LANES / 2; j++)
            sums[j] = lanes[2 * j] + lanes[2 * j + 1];
        store(row, floats(sums));
        memcpy(S + i * lds, row, columns * sizeof(element));
    }
}

template <int R>
INLINE void shrink_row(const element *X, int64_t ldx, int64_t features, const unit *P, int64_t lanes,
                       const unit *half, element *S, int64_t lds, int64_t width, int64_t whole)
{
    int64_t j = 0;
    for (; j + 2 * LANES < whole; j += 3 * LANES)
        shrink_tile<R, 3>(X, ldx, features, P + j, lanes, S + j, lds, whole - j);
    for (; j + LANES < whole; j += 2 * LANES)
        shrink_tile<R, 2>(X, ldx, features, P + j, lanes, S + j, lds, whole - j);
    for (; j < whole; j += LANES)
        shrink_tile<R, 1>(X, ldx, features, P + j, lanes, S + j, lds, whole - j);
    if (whole < width)
        half_tile<R>(X, ldx, features, half, S + whole, lds, width - whole);
}

// Factors as units [pairs of features][ranks]; those from rank `whole` on as half_tile reads them.
INLINE void pack_features(const std::vector<Factor> &factors, unit *P, int64_t lanes, unit *half, int64_t whole,
                          int64_t from, int64_t to, int64_t features, float scaling)
{
    memset(P + from * lanes, 0, (to - from) * lanes * sizeof(unit));
    memset(half + from / 2 * LANES, 0, (to + 1 - from) / 2 * LANES * sizeof(unit));
    for (const Factor &f : factors)
        for (int64_t j = 0; j < f.rank; j++)
            for (int64_t u = from; u < to; u++) {
                element high = 0;
                if (PAIR == 2 && 2 * u + 1 < features)
                    high = entry(f, j, 2 * u + 1, scaling);
                unit found = joined(entry(f, j, PAIR * u, scaling), high);
                int64_t column = f.first + j;
                if (column < whole)
                    P[u * lanes + column] = found;
                else
                    half[u / 2 * LANES + 2 * (column - whole) + u % 2] = found;
            }
}

void shrink(const element *X, int64_t ldx, int64_t N, int64_t features, element *S, int64_t lds,
            int64_t width, const std::vector<Factor> &factors, float scaling, int threads)
{
    int64_t left = width % LANES, whole = left && left <= LANES / 2 ? width - left : width;
    int64_t terms = units_of(features), lanes = lanes_of(whole); // tiles read whole vectors
    Buffer<unit> P(terms * lanes), half((terms + 1) / 2 * LANES);
    threads = alone(N * features * width) ? 1 : threads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t u = 0; u < terms; u += 64)
            pack_features(factors, P.data, lanes, half.data, whole, u, std::min<int64_t>(u + 64, terms), features,
                          scaling);
#pragma omp for
        for (int64_t n = 0; n < N; n += 8) {
            const element *x = X + n * ldx;
            element *s = S + n * lds;
            if (n + 8 <= N)
                shrink_row<8>(x, ldx, features, P.data, lanes, half.data, s, lds, width, whole);
            else
                for (int64_t i = 0; i < N - n; i++)
                    shrink_row<1>(x + i * ldx, ldx, features, P.data, lanes, half.data, s + i * lds, lds, width,
                                  whole);
            for (const Factor &f : factors)
                if (PAIR == 2 && f.rank % 2) // a column that nobody asked for: zero, whatever X holds
                    for (int64_t i = 0; i < std::min<int64_t>(8, N - n); i++)
                        s[i * lds + f.first + f.rank] = 0;
        }
    }
}

// Ranks as units [pairs of ranks][features].
INLINE void pack_ranks(const std::vector<Factor> &factors, unit *P, int64_t lanes, int64_t terms,
                       int64_t from, int64_t features, float scaling)
{
    int64_t columns = std::min<int64_t>(LANES, features - from);
    for (int64_t u = 0; u < terms; u++)
        memset(P + u * lanes + from, 0, LANES * sizeof(unit));
    for (const Factor &f : factors)
        for (int64_t j = 0; j < f.rank; j += PAIR) {
            unit *p = P + (f.first + j) / PAIR * lanes + from;
            bool two = PAIR == 2 && j + 1 < f.rank;
            for (int64_t k = 0; k < columns; k++)
                p[k] = joined(entry(f, j, from + k, scaling),
                              two ? entry(f, j + 1, from + k, scaling) : (element)0);
        }
}

template <int R, int V>
INLINE void expand_tile(element *X, int64_t ldx, const element *S, int64_t lds, int64_t terms,
                        const unit *P, int64_t lanes, const float *bias)
{
    vec total[R][V];
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++)
            total[i][v] = zero();
    for (int64_t u = 0; u < terms; u += SHORT) {
        vec sum[R][V];
        for (int i = 0; i < R; i++)
            for (int v = 0; v < V; v++)
                sum[i][v] = zero();
        tile<R, V>(sum, S + PAIR * u, lds, P + u * lanes, lanes, std::min<int64_t>(SHORT, terms - u));
        for (int i = 0; i < R; i++)
            for (int v = 0; v < V; v++)
                total[i][v] = plus(total[i][v], sum[i][v]);
    }
    for (int i = 0; i < R; i++)
        for (int v = 0; v < V; v++) { // bias and X last: they are larger than the terms
            element *x = X + i * ldx + v * LANES;
            vec low = bias ? plus(total[i][v], floats(bias + v * LANES)) : total[i][v];
            store(x, plus(load(x), low));
        }
}

template <int R>
INLINE void expand_row(element *X, int64_t ldx, int64_t features, const element *S, int64_t lds,
                       int64_t terms, const unit *P, int64_t lanes, const float *bias)
{
    int64_t c = 0;
    for (; c + 2 * LANES <= features; c += 2 * LANES)
        expand_tile<R, 2>(X + c, ldx, S, lds, terms, P + c, lanes, bias ? bias + c : nullptr);
    for (; c < features; c += LANES) {
        int64_t columns = std::min<int64_t>(LANES, features - c);
        element part[R * LANES] = {0};
        for (int i = 0; i < R; i++)
            memcpy(part + i * LANES, X + i * ldx + c, columns * sizeof(element));
        expand_tile<R, 1>(part, LANES, S, lds, terms, P + c, lanes, bias ? bias + c : nullptr);
        for (int i = 0; i < R; i++)
            memcpy(X + i * ldx + c, part + i * LANES, columns * sizeof(element));
    }
}

void expand(element *X, int64_t ldx, int64_t N, int64_t features, const element *S, int64_t lds,
            int64_t width, const std::vector<Factor> &factors, float scaling, const element *bias,
            int threads)
{
    int64_t terms = units_of(width), lanes = lanes_of(features);
    Buffer<unit> P(terms * lanes);
    Buffer<float> wide_bias(bias ? lanes : 0);
    threads = alone(N * features * width) ? 1 : threads;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t c = 0; c < lanes; c += LANES) {
            pack_ranks(factors, P.data, lanes, terms, c, features, scaling);
            for (int64_t k = c; bias && k < c + LANES; k++)
                wide_bias.data[k] = k < features ? widened(bias[k]) : 0;
        }
        const float *b = bias ? wide_bias.data : nullptr;
#pragma omp for
        for (int64_t n = 0; n < N; n += 8) {
            if (n + 8 <= N)
                expand_row<8>(X + n * ldx, ldx, features, S + n * lds, lds, terms, P.data, lanes, b);
            else
                for (int64_t i = n; i < N; i++)
                    expand_row<1>(X + i * ldx, ldx, features, S + i * lds, lds, terms, P.data, lanes, b);
        }
    }
}

constexpr int STRIP = 2 * LANES; // features of an outer product's tile
constexpr int OUTER_RANKS = 12;
constexpr int RUN = 32;          // rows summed before they join the total
constexpr int AHEAD = 8;         // rows from a row to the one that is fetched meanwhile

// Ranks of Q [pairs of rows][width] times `rows` of X, STRIP features: added to G [ranks][STRIP].
template <int R>
INLINE void outer_tile(const element *X, int64_t ldx, int64_t rows, const unit *Q, int64_t width, float *G)
{
    constexpr int V = STRIP / LANES;
    vec sum[R][V];
    for (int j = 0; j < R; j++)
        for (int v = 0; v < V; v++)
            sum[j][v] = zero();
    for (int64_t n = 0; n < rows; n += PAIR) {
        const element *x = X + n * ldx, *next = n + PAIR <= rows ? x + (PAIR - 1) * ldx : x;
        units p[V];
        for (int ahead = 0; ahead < PAIR; ahead++)
            __builtin_prefetch((const char *)(x + (AHEAD + ahead) * ldx));
        for (int v = 0; v < V; v++)
            p[v] = two_rows(x + v * LANES, next + v * LANES);
        for (int j = 0; j < R; j++) {
            units q = broadcast(Q[n / PAIR * width + j]);
            for (int v = 0; v < V; v++)
                sum[j][v] = products(sum[j][v], p[v], q);
        }
    }
    for (int j = 0; j < R; j++)
        for (int v = 0; v < V; v++) {
            float *g = G + j * STRIP + v * LANES;
            store_floats(g, plus(floats(g), sum[j][v]));
        }
}

INLINE void outer_ranks(int64_t ranks, const element *X, int64_t ldx, int64_t rows, const unit *Q,
                        int64_t width, float *G)
{
    int64_t j = 0;
    for (; j + OUTER_RANKS <= ranks; j += OUTER_RANKS)
        outer_tile<OUTER_RANKS>(X, ldx, rows, Q + j, width, G + j * STRIP);
    for (; j + 4 <= ranks; j += 4)
        outer_tile<4>(X, ldx, rows, Q + j, width, G + j * STRIP);
    for (; j < ranks; j++)
        outer_tile<1>(X, ldx, rows, Q + j, width, G + j * STRIP);
}

// Features [c, c + columns) of every factor, from sums G [width][STRIP].
INLINE void write_factors(const std::vector<Factor> &factors, const float *G, int64_t c, int64_t columns,
                          float scaling)
{
    for (const Factor &f : factors)
        for (int64_t j = 0; j < f.rank; j++)
            for (int64_t k = 0; k < columns; k++) {
                float value = G[(f.first + j) * STRIP + k] * scaling;
                int64_t at = j * f.of_rank + (c + k) * f.of_feature;
                if (f.is_float)
                    ((float *)f.data)[at] = value;
                else
                    ((element *)f.data)[at] = rounded(value);
            }
}

void outer(const element *X, int64_t ldx, int64_t N, int64_t features, const element *S, int64_t lds,
           int64_t width, const std::vector<Factor> &factors, float scaling, int threads)
{
    int64_t terms = units_of(N);
    Buffer<unit> Q(terms * width);
    threads = alone(N * features * width) ? 1 : threads;
    Buffer<float> sums((int64_t)threads * width * STRIP);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t u = 0; u < terms; u++) {
            const element *s = S + PAIR * u * lds;
            bool two = PAIR * u + 1 < N;
            for (int64_t j = 0; j < width; j++)
                Q.data[u * width + j] = joined(s[j], PAIR == 2 && two ? s[lds + j] : (element)0);
        }
        float *G = sums.data + omp_get_thread_num() * width * STRIP;
#pragma omp for schedule(static)
        for (int64_t c = 0; c < features; c += STRIP) {
            int64_t columns = std::min<int64_t>(STRIP, features - c);
            memset(G, 0, width * STRIP * sizeof(float));
            for (int64_t n = 0; n < N; n += RUN) {
                element edge[RUN * STRIP];
                const element *x = X + n * ldx + c;
                int64_t rows = std::min<int64_t>(RUN, N - n), ld = ldx;
                if (columns < STRIP) { // through a copy
                    memset(edge, 0, sizeof edge);
                    for (int64_t i = 0; i < rows; i++)
                        memcpy(edge + i * STRIP, x + i * ldx, columns * sizeof(element));
                    x = edge, ld = STRIP;
                }
                outer_ranks(width, x, ld, rows, Q.data + n / PAIR * width, width, G);
            }
            write_factors(factors, G, c, columns, scaling);
        }
    }
}

// Y = X, or Y += X, where the mask of dropout.py keeps an element; Y = 0, or as it was, elsewhere.
void drop(const element *X, int64_t ldx, int64_t N, int64_t features, uint64_t key, int dropped,
          element *Y, int64_t ldy, bool add, int threads)
{
#pragma omp parallel for num_threads(alone(N * features * 8) ? 1 : threads)
    for (int64_t n = 0; n < N; n++)
        for (int64_t c = 0; c < features; c += 8 * COUNTERS) {
            uint32_t drawn[4 * COUNTERS];
            uint16_t halves[8 * COUNTERS];
            int64_t columns = std::min<int64_t>(8 * COUNTERS, features - c);
            const element *x = X + n * ldx + c;
            element *y = Y + n * ldy + c;
            philox_words(key, (uint32_t)n, (uint32_t)(c / 8), drawn);
            memcpy(halves, drawn, sizeof halves); // little-endian: low halves first
            for (int64_t k = 0; add && k < columns; k++)
                y[k] = halves[k] >= dropped ? rounded(widened(y[k]) + widened(x[k])) : y[k];
            for (int64_t k = 0; !add && k < columns; k++)
                y[k] = halves[k] >= dropped ? x[k] : (element)0;
        }
}

const Products table = {
    [](const Matrix &x, const Matrix &s, const std::vector<Factor> &factors, float scaling, int threads) {
        auto X = (const element *)x.data;
        auto S = (element *)s.data;
        if (x.rows >= FEW)
            return shrink(X, x.ld, x.rows, x.columns, S, s.ld, s.columns, factors, scaling, threads);
        for (int64_t n = 0; n < x.rows; n++)
            memset(S + n * s.ld, 0, s.columns * sizeof(element));
        shrink_few(X, x.ld, x.rows, x.columns, S, s.ld, factors, scaling);
    },
    [](const Matrix &x, const Matrix &s, const std::vector<Factor> &factors, float scaling, const void *bias,
       int threads) {
        auto X = (element *)x.data;
        auto S = (const element *)s.data;
        auto b = (const element *)bias;
        if (x.rows >= FEW)
            return expand(X, x.ld, x.rows, x.columns, S, s.ld, s.columns, factors, scaling, b, threads);
        expand_few(X, x.ld, x.rows, x.columns, S, s.ld, factors, scaling, b);
    },
    [](const Matrix &x, const Matrix &s, const std::vector<Factor> &factors, float scaling, int threads) {
        outer((const element *)x.data, x.ld, x.rows, x.columns, (const element *)s.data, s.ld, s.columns,
              factors, scaling, threads);
    },
    [](const Matrix &x, const Matrix &y, uint64_t key, int dropped, bool add, int threads) {
        drop((const element *)x.data, x.ld, x.rows, x.columns, key, dropped, (element *)y.data, y.ld, add,
             threads);
    },
};
