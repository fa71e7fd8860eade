// Every row of a matrix on its own integer grid: its range, then its values, while it is in the first-level cache.
//
// Loops over plain numbers that compilers vectorize: extremes are found among integers in the order of the numbers, so
// that no maximum depends on its order, and a NaN is an extreme.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
    uint16_t bits;
};

inline int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float number(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline int32_t bits_of(bf16 x) { return (int32_t)((uint32_t)x.bits << 16); }

inline void put(float* to, float x) { *to = x; }

// Ties to even. A NaN stays one: what is computed from bf16 has a quiet bit that no carry reaches.
inline void put(bf16* to, float x) {
    uint32_t bits = (uint32_t)bits_of(x);
    to->bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Its own inverse; the order of the integers is that of the numbers.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

struct Grid {
    bool symmetric, clipped;
    float top;  // q_max, or the number of steps
    float clip, smallest, margin;
};

struct Range {
    float scale, low, high;
};

template <class T> Range range_of(const T* x, long n, const Grid& grid) {
    if (grid.symmetric) {
        int32_t largest = 0;
        for (long i = 0; i < n; ++i) {
            int32_t magnitude = bits_of(x[i]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        float scale = grid.clip * number(largest) / grid.top;
        return {scale < grid.smallest ? grid.smallest : scale, -grid.top, grid.top};
    }
    int32_t least = 0, most = 0;
    for (long i = 0; i < n; ++i) {
        int32_t key = ordered(bits_of(x[i]));
        least = key < least ? key : least;
        most = key > most ? key : most;
    }
    // The key of -0 is -1: it is 0 as a number.
    float bottom = number(ordered(least)), span = number(ordered(most)) - bottom;
    float scale = grid.clip * span / grid.top;
    scale = scale < grid.smallest ? grid.smallest : scale;
    float low = rintf(grid.clip * bottom / scale);
    return {scale, low, low + grid.top};
}

template <class T> void quantize_row(const T* x, T* y, uint8_t* mask, long n, const Grid& grid) {
    Range range = range_of(x, n, grid);
    float inverse = 1.0f / range.scale;
    if (mask)
        for (long i = 0; i < n; ++i) {
            float scaled = number(bits_of(x[i])) * inverse;
            mask[i] = (scaled >= range.low - grid.margin) & (scaled <= range.high + grid.margin);
        }
    if (grid.symmetric && !grid.clipped)
        for (long i = 0; i < n; ++i) put(y + i, rintf(number(bits_of(x[i])) * inverse) * range.scale);
    else
        for (long i = 0; i < n; ++i) {
            float level = rintf(number(bits_of(x[i])) * inverse);
            level = level < range.low ? range.low : level;
            put(y + i, (level > range.high ? range.high : level) * range.scale);
        }
}

template <class T>
void quantize(const T* x, T* y, uint8_t* mask, long rows, long n, const Grid& grid, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; ++i) quantize_row(x + i * n, y + i * n, mask ? mask + i * n : nullptr, n, grid);
}

}  // namespace

// x, y: [rows, n]; mask: [rows, n] or null.
#define EXPORT(NAME, T)                                                                                         \
    extern "C" void NAME(const T* x, T* y, uint8_t* mask, long rows, long n, int symmetric, float top,          \
                         float clip, float smallest, float margin, int threads) {                               \
        quantize(x, y, mask, rows, n, Grid{symmetric != 0, clip < 1, top, clip, smallest, margin}, threads);    \
    }

EXPORT(quantize_tokens_fp32, float)
EXPORT(quantize_tokens_bf16, bf16)
