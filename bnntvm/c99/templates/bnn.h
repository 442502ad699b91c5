/* What the kernels of an exported network share: counting bits, and float functions that give the same bits on every machine.
 *
 * C99, nothing but <stdint.h>. Compile with -ffp-contract=off (and never with -ffast-math): a product that is added is rounded first.
 * Bits of channels: channel c is bit c % 32 of word c / 32, unused bits are 0. Bipolar planes: bit 1 is -1, bit 0 is +1.
 */
#ifndef BNN_H
#define BNN_H

#include <stdint.h>

/* Sums and roundings of floats held in more digits than theirs are other numbers. */
#if defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2 || __FLT_EVAL_METHOD__ < 0)
#error "floats are evaluated in a wider type: -msse2 -mfpmath=sse on 32-bit x86, -fexcess-precision=fast on s390x"
#endif

/* Kernels hand memory to one another under different types: nothing may be moved across this. */
#if defined(__GNUC__)
#define BNN_FENCE() __asm__ __volatile__("" ::: "memory")
#else
#define BNN_FENCE() ((void)0)
#endif

/* ---------------------------------------------------------------------------------------------------------------- counting bits */

/* Where the processor counts bits itself, words are counted one by one. Elsewhere three words are added bit by bit to ones and twos, whose
 * counts are left in groups of four bits (12 of at most 15); these are added up to bytes, of which ten rounds fit (240 of at most 255). */
#if defined(__GNUC__) && (defined(__POPCNT__) || defined(__aarch64__) || defined(__riscv_zbb))
#define BNN_HAS_POPCOUNT 1
#else
#define BNN_HAS_POPCOUNT 0
#endif

static inline uint32_t bnn_pairs(uint32_t x)
{
    return x - ((x >> 1) & 0x55555555u);
}

static inline uint32_t bnn_nibbles(uint32_t x)
{
    x = bnn_pairs(x);
    return (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
}

static inline int32_t bnn_popcount(uint32_t x)
{
#if BNN_HAS_POPCOUNT
    return __builtin_popcount(x);
#else
    x = bnn_nibbles(x);
    return (int32_t)((((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
#endif
}

/* Defines NAME: the number of 1 bits in the words WORD of i = 0, ..., n - 1. */
#if BNN_HAS_POPCOUNT
#define BNN_COUNT(NAME, PARAMETERS, WORD)                                                                                              \
    static inline int32_t NAME PARAMETERS                                                                                              \
    {                                                                                                                                  \
        int32_t total = 0;                                                                                                             \
        for (int32_t i = 0; i < n; i++)                                                                                                \
            total += __builtin_popcount(WORD);                                                                                         \
        return total;                                                                                                                  \
    }
#else
#define BNN_COUNT(NAME, PARAMETERS, WORD)                                                                                              \
    static inline int32_t NAME PARAMETERS                                                                                              \
    {                                                                                                                                  \
        const int32_t threes = n - n % 3;                                                                                              \
        int32_t total = 0, i = 0;                                                                                                      \
        while (i < threes) {                                                                                                           \
            const int32_t stop = threes - i > 30 ? i + 30 : threes;                                                                    \
            uint32_t bytes = 0;                                                                                                        \
            while (i < stop) {                                                                                                         \
                const uint32_t first = WORD, second = (i++, WORD), third = (i++, WORD), odd = first ^ second;                          \
                const uint32_t sum = bnn_nibbles(odd ^ third) + 2 * bnn_nibbles((first & second) | (odd & third));                     \
                i++;                                                                                                                   \
                bytes += (sum & 0x0f0f0f0fu) + ((sum >> 4) & 0x0f0f0f0fu);                                                             \
            }                                                                                                                          \
            bytes = (bytes & 0x00ff00ffu) + ((bytes >> 8) & 0x00ff00ffu);                                                              \
            total += (int32_t)((bytes + (bytes >> 16)) & 0xffffu);                                                                     \
        }                                                                                                                              \
        for (; i < n; i++)                                                                                                             \
            total += bnn_popcount(WORD);                                                                                               \
        return total;                                                                                                                  \
    }
#endif

/* a, b: planes of data and weights; s, m: signs and mask of ternary weights; z: where data are 0. */
BNN_COUNT(bnn_count, (const uint32_t *a, int32_t n), a[i])
BNN_COUNT(bnn_count_xor, (const uint32_t *a, const uint32_t *b, int32_t n), a[i] ^ b[i])
BNN_COUNT(bnn_count_and, (const uint32_t *a, const uint32_t *b, int32_t n), a[i] & b[i])
BNN_COUNT(bnn_count_and_not, (const uint32_t *a, const uint32_t *z, int32_t n), a[i] & ~z[i])
BNN_COUNT(bnn_count_xor_not, (const uint32_t *a, const uint32_t *b, const uint32_t *z, int32_t n), (a[i] ^ b[i]) & ~z[i])
BNN_COUNT(bnn_count_and_and_not, (const uint32_t *a, const uint32_t *b, const uint32_t *z, int32_t n), a[i] & b[i] & ~z[i])
BNN_COUNT(bnn_count_xor_and, (const uint32_t *a, const uint32_t *s, const uint32_t *m, int32_t n), (a[i] ^ s[i]) & m[i])
BNN_COUNT(bnn_count_xor_and_not, (const uint32_t *a, const uint32_t *s, const uint32_t *m, const uint32_t *z, int32_t n),
          (a[i] ^ s[i]) & m[i] & ~z[i])

/* --------------------------------------------------------------------------------------------------------------------- windows */

/* First tap of a window that lies inside an axis, the window beginning at start, which may be negative. */
static inline int32_t bnn_first(int32_t start, int32_t dilation, int32_t taps)
{
    const int32_t first = start >= 0 ? 0 : (dilation - 1 - start) / dilation;
    return first < taps ? first : taps;
}

/* One past the last tap of a window that lies inside an axis of that size; not below first. */
static inline int32_t bnn_last(int32_t start, int32_t dilation, int32_t taps, int32_t size, int32_t first)
{
    const int32_t last = size <= start ? 0 : (size - start + dilation - 1) / dilation;
    return last < first ? first : last < taps ? last : taps;
}

/* ---------------------------------------------------------------------------------------------------------------------- floats */

typedef union {
    float value;
    uint32_t bits;
} bnn_float_bits;

static inline float bnn_float(uint32_t bits)
{
    bnn_float_bits both;
    both.bits = bits;
    return both.value;
}

static inline uint32_t bnn_bits(float value)
{
    bnn_float_bits both;
    both.value = value;
    return both.bits;
}

#define BNN_INFINITY bnn_float(0x7f800000u)
#define BNN_NAN bnn_float(0x7fc00000u)

static inline float bnn_abs(float x)
{
    return bnn_float(bnn_bits(x) & 0x7fffffffu);
}

static inline float bnn_copysign(float magnitude, float sign)
{
    return bnn_float((bnn_bits(magnitude) & 0x7fffffffu) | (bnn_bits(sign) & 0x80000000u));
}

/* The greater; NaN if either is. */
static inline float bnn_max(float a, float b)
{
    return a > b || a != a ? a : b;
}

/* The less; NaN if either is. */
static inline float bnn_min(float a, float b)
{
    return a < b || a != a ? a : b;
}

static inline float bnn_sign(float x)
{
    return x != x ? x : (float)((x > 0.0f) - (x < 0.0f));
}

/* To the nearest integer, ties to even: from 2^23 on every float is one. */
static inline float bnn_round(float x)
{
    const float size = bnn_abs(x);
    return size < 8388608.0f ? bnn_copysign((size + 8388608.0f) - 8388608.0f, x) : x;
}

static inline float bnn_floor(float x)
{
    const float near = bnn_round(x);
    return near > x ? near - 1.0f : near;
}

static inline float bnn_ceil(float x)
{
    return -bnn_floor(-x);
}

static inline float bnn_trunc(float x)
{
    return bnn_copysign(bnn_floor(bnn_abs(x)), x);
}

/* Towards zero; what does not fit, and NaN, becomes the least or greatest integer. */
static inline int32_t bnn_int32(float x)
{
    return x >= -2147483648.0f ? (x < 2147483648.0f ? (int32_t)x : INT32_MAX) : INT32_MIN;
}

static inline int64_t bnn_int64(float x)
{
    return x >= -9223372036854775808.0f ? (x < 9223372036854775808.0f ? (int64_t)x : INT64_MAX) : INT64_MIN;
}

/* Correctly rounded, bit by bit: 24 bits of the root and one for rounding. */
static inline float bnn_sqrt(float x)
{
    uint32_t bits = bnn_bits(x), root = 0;
    int32_t exponent;
    uint64_t rest;
    if (!(x > 0.0f))
        return x == 0.0f ? x : BNN_NAN;
    if (bits >= 0x7f800000u)
        return x;
    exponent = (int32_t)(bits >> 23);
    bits &= 0x7fffffu;
    if (exponent)
        bits |= 0x800000u;
    else
        for (exponent = 1; bits < 0x800000u; exponent--)
            bits <<= 1;
    exponent -= 150; /* x = bits * 2^exponent */
    rest = (uint64_t)bits << ((exponent & 1) ? 25 : 26);
    exponent = (exponent & 1) ? exponent - 25 : exponent - 26; /* x = rest * 2^exponent, rest from 2^48 to 2^50, the exponent even */
    for (uint32_t bit = 1u << 24; bit; bit >>= 1) {
        const uint64_t trial = (uint64_t)(root | bit) * (root | bit);
        if (trial <= rest)
            root |= bit;
    }
    root = (root >> 1) + (root & 1u); /* a root of 25 bits is never exactly in the middle: that square would have 50 bits */
    return bnn_float((root - 0x800000u) + ((uint32_t)(exponent / 2 + 1 + 150) << 23));
}

/* The functions below are polynomials; their relative errors are below 4e-7. */

/* 2^n for n from -126 to 127. */
static inline float bnn_power_of_two(int32_t n)
{
    return bnn_float((uint32_t)(n + 127) << 23);
}

/* x = n ln 2 + r, Taylor's series for e^r, and two steps to scale by 2^n so that neither overflows early. */
static inline float bnn_exp(float x)
{
    float n, r, series;
    int32_t whole, half;
    if (x != x)
        return x;
    x = bnn_min(89.0f, bnn_max(-105.0f, x));
    n = bnn_round(x * 1.44269504f);
    r = x - n * 0.693359375f - n * -2.12194440e-4f; /* ln 2 in two parts, the first of nine bits: its product is exact */
    series = 1.98412698e-4f;
    series = series * r + 1.38888889e-3f;
    series = series * r + 8.33333333e-3f;
    series = series * r + 4.16666667e-2f;
    series = series * r + 1.66666667e-1f;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    whole = (int32_t)n;
    half = whole >= 0 ? whole / 2 : -((1 - whole) / 2);
    return series * bnn_power_of_two(half) * bnn_power_of_two(whole - half);
}

/* x = 2^e * m with m from sqrt(1/2) to sqrt(2), and log m = 2 artanh s by its series, s = (m - 1) / (m + 1). */
static inline float bnn_log(float x)
{
    float exponent, f, s, z, series;
    uint32_t bits;
    int32_t e;
    if (!(x > 0.0f))
        return x == 0.0f ? -BNN_INFINITY : BNN_NAN;
    if (x == BNN_INFINITY)
        return x;
    exponent = 0.0f;
    if (x < 1.17549435e-38f) { /* subnormal */
        x *= 8388608.0f;
        exponent = -23.0f;
    }
    bits = bnn_bits(x);
    e = ((int32_t)bits - 0x3f3504f3 + (127 << 23)) / (1 << 23) - 127; /* rounded down: the dividend is not negative */
    exponent += (float)e;
    f = bnn_float((uint32_t)((int32_t)bits - e * (1 << 23))) - 1.0f;
    s = f / (f + 2.0f);
    z = s * s;
    series = 2.22222222e-1f;
    series = series * z + 2.85714286e-1f;
    series = series * z + 0.4f;
    series = series * z + 6.66666667e-1f;
    series *= z;
    return exponent * 0.693359375f + (f - (s * (f - series) - exponent * -2.12194440e-4f));
}

/* 0 where the result is subnormal. */
static inline float bnn_sigmoid(float x)
{
    return 1.0f / (1.0f + bnn_exp(-x));
}

/* A polynomial near 0, 1 - 2 / (e^2|x| + 1) elsewhere. */
static inline float bnn_tanh(float x)
{
    const float size = bnn_abs(x), z = x * x;
    float series = 0.002292937907f;
    if (!(size < 0.625f))
        return x != x ? x : bnn_copysign(1.0f - 2.0f / (bnn_exp(size + size) + 1.0f), x);
    series = series * z - 0.008344145473f;
    series = series * z + 0.02176899309f;
    series = series * z - 0.05395927148f;
    series = series * z + 0.1333330363f;
    series = series * z - 0.3333333317f;
    return x + x * (z * series);
}

/* A polynomial up to 1, 1 - e^-p(|x|) beyond, where p approximates -log erfc; 1 from 4 on. */
static inline float bnn_erf(float x)
{
    const float size = bnn_min(4.0f, bnn_abs(x)), z = x * x;
    float p;
    if (size < 1.0f) {
        p = 7.853857651e-05f;
        p = p * z - 0.000801019250f;
        p = p * z + 0.00518832755820f;
        p = p * z - 0.0268538118681f;
        p = p * z + 0.112835851470f;
        p = p * z - 0.376126258241f;
        p = p * z + 1.12837916573f;
        return x * p;
    }
    if (x != x)
        return x;
    p = -1.5998191542e-06f;
    p = p * size + 4.5298092342e-05f;
    p = p * size - 0.00059020318430f;
    p = p * size + 0.0047276880285f;
    p = p * size - 0.0263275220979f;
    p = p * size + 0.109909727017f;
    p = p * size + 0.632013443558f;
    p = p * size + 1.13011971543f;
    p = p * size - 0.000291025418217f;
    return bnn_copysign(1.0f - bnn_exp(-p), x);
}

/* x^y: by repeated multiplication where y is a small integer, else through exp and log (x > 0). */
static inline float bnn_power(float x, float y)
{
    if (y == bnn_round(y) && bnn_abs(y) <= 64.0f) {
        float result = 1.0f, factor = x;
        for (int32_t n = (int32_t)bnn_abs(y); n; n >>= 1) {
            if (n & 1)
                result *= factor;
            factor *= factor;
        }
        return y < 0.0f ? 1.0f / result : result;
    }
    return x == 0.0f ? (y < 0.0f ? BNN_INFINITY : 0.0f) : bnn_exp(y * bnn_log(x));
}

#endif
