// Products with a sparse matrix S for many tokens: y = x S^T, and of every entry (r, c) the sum over tokens g_r x_c.
//
// A cache line of tokens at a time: their features are turned, in the second-level cache, so that an entry is one
// multiplication of registers that hold one feature of several tokens. Neither the number of threads nor where a group
// of entries begins changes the order of a sum.

#include <cstdlib>
#include <memory>

#include "vector.h"

namespace {

constexpr long LINE = 64;
template <class T> constexpr int TOKENS = LINE / sizeof(T);
template <class T> constexpr int REGISTERS = TOKENS<T> / LANES;

struct Free {
    void operator()(void* memory) const { free(memory); }
};

// `features` lines: a line holds one feature of TOKENS tokens.
template <class T> class Tile {
   public:
    explicit Tile(long features) : lines((T*)aligned_alloc(LINE, LINE * (features ? features : 1))) {}
    T* line(long feature) const { return lines.get() + feature * TOKENS<T>; }

   private:
    std::unique_ptr<T, Free> lines;
};

// Lanes of the pair (a, b), counted on from a to b, in the order of `from`.
INLINE Floats pick(Floats a, Floats b, Ints from) {
#if defined(__clang__)
    Floats picked;
    for (int lane = 0; lane < LANES; ++lane) picked[lane] = from[lane] < LANES ? a[from[lane]] : b[from[lane] - LANES];
    return picked;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// Two by two blocks of H lanes: the first of a and of b, and the second of a and of b.
template <int H> INLINE Floats firsts(Floats a, Floats b) {
    Ints from;
    for (int lane = 0; lane < LANES; ++lane) from[lane] = lane & H ? LANES + (lane & ~H) : lane;
    return pick(a, b, from);
}

template <int H> INLINE Floats seconds(Floats a, Floats b) {
    Ints from;
    for (int lane = 0; lane < LANES; ++lane) from[lane] = lane & H ? LANES + lane : lane | H;
    return pick(a, b, from);
}

// Bit H of the register and bit H of the lane change places.
template <int H> INLINE void exchange(Floats* v) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
        if (!(i & H)) {
            Floats a = v[i], b = v[i + H];
            v[i] = firsts<H>(a, b);
            v[i + H] = seconds<H>(a, b);
        }
}

// v[i][lane] -> v[lane][i]
INLINE void turn(Floats* v) {
    exchange<1>(v);
    exchange<2>(v);
    exchange<4>(v);
    if (LANES == 16) exchange<LANES / 2>(v);
}

// v[i] and v[i + H] become one register: half of the lanes each, summed in pairs.
template <int H> INLINE void fold(Floats* v) {
#pragma GCC unroll 16
    for (int i = 0; i < H; ++i) v[i] = firsts<H>(v[i], v[i + H]) + seconds<H>(v[i], v[i + H]);
}

// Returns the sum over the lanes of v[i] in lane i.
INLINE Floats sums_of(Floats* v) {
    if (LANES == 16) fold<LANES / 2>(v);
    fold<4>(v);
    fold<2>(v);
    fold<1>(v);
    return v[0];
}

template <class T> void store_first(T* to, Floats v, long count) {
    T all[LANES];
    store(all, v);
    for (long i = 0; i < count; ++i) to[i] = all[i];
}

// Features first .. first + features of `count` tokens, x [count, width]; what is missing of a line is zero.
template <class T> void fill(const Tile<T>& tile, const T* x, long width, long count, long first, long features) {
    for (int t = 0; t < TOKENS<T>; t += LANES) {
        long c = 0;
        for (; c + LANES <= features; c += LANES) {
            Floats v[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) v[i] = t + i < count ? load(x + (t + i) * width + first + c) : Floats{};
            turn(v);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) store(tile.line(c + i) + t, v[i]);
        }
        for (; c < features; ++c)
            for (int i = 0; i < LANES; ++i) tile.line(c)[t + i] = t + i < count ? x[(t + i) * width + first + c] : T{};
    }
}

template <class T>
void product_of_tile(const Tile<T>& tile, T* y, long count, const int32_t* starts, const int32_t* columns,
                     const float* weights, long out_features) {
    for (long first = 0; first < out_features; first += LANES) {
        long rows = out_features - first < LANES ? out_features - first : LANES;
        Floats sums[REGISTERS<T>][LANES] = {};
        for (long i = 0; i < rows; ++i) {
            Floats sum[REGISTERS<T>] = {};
            for (int32_t e = starts[first + i]; e < starts[first + i + 1]; ++e) {
                const T* line = tile.line(columns[e]);
                for (int k = 0; k < REGISTERS<T>; ++k) sum[k] += weights[e] * load(line + k * LANES);
            }
            for (int k = 0; k < REGISTERS<T>; ++k) sums[k][i] = sum[k];
        }
        for (int k = 0; k < REGISTERS<T>; ++k) {
            turn(sums[k]);
            for (long t = 0; t < LANES && k * LANES + t < count; ++t) {
                T* to = y + (k * LANES + t) * out_features + first;
                if (rows == LANES)
                    store(to, sums[k][t]);
                else
                    store_first(to, sums[k][t], rows);
            }
        }
    }
}

template <class T>
void product(const T* x, T* y, const int32_t* starts, const int32_t* columns, const float* weights, long tokens,
             long in_features, long out_features, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Tile<T> tile(in_features);
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t += TOKENS<T>) {
            long count = tokens - t < TOKENS<T> ? tokens - t : TOKENS<T>;
            fill(tile, x + t * in_features, in_features, count, 0, in_features);
            product_of_tile(tile, y + t * out_features, count, starts, columns, weights, out_features);
        }
    }
}

template <class T>
void dots_of_tile(const Tile<T>& g, const Tile<T>& x, const int32_t* rows, const int32_t* columns, float* sums,
                  int32_t first_row, long entries) {
    for (long e = 0; e < entries; e += LANES) {
        long count = entries - e < LANES ? entries - e : LANES;
        Floats v[LANES] = {};
        for (long i = 0; i < count; ++i) {
            const T *a = g.line(rows[e + i] - first_row), *b = x.line(columns[e + i]);
            for (int k = 0; k < REGISTERS<T>; ++k) v[i] += load(a + k * LANES) * load(b + k * LANES);
        }
        Floats found = sums_of(v);
        if (count == LANES)
            store(sums + e, load(sums + e) + found);
        else
            for (long i = 0; i < count; ++i) sums[e + i] += found[i];
    }
}

template <class T>
void dots(const T* g, const T* x, const int32_t* rows, const int32_t* columns, float* sums, long entries, long tokens,
          long in_features, long out_features, int threads) {
    // Every thread has entries, and so rows, of its own, and turns x for itself: nobody waits for another.
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part) {
        long begin = entries * part / threads, end = entries * (part + 1) / threads;
        if (begin == end) continue;
        long first_row = rows[begin], height = rows[end - 1] - first_row + 1;
        Tile<T> g_tile(height), x_tile(in_features);
        for (long t = 0; t < tokens; t += TOKENS<T>) {
            long count = tokens - t < TOKENS<T> ? tokens - t : TOKENS<T>;
            fill(g_tile, g + t * out_features, out_features, count, first_row, height);
            fill(x_tile, x + t * in_features, in_features, count, 0, in_features);
            dots_of_tile(g_tile, x_tile, rows + begin, columns + begin, sums + begin, first_row, end - begin);
        }
    }
}

}  // namespace

// x [tokens, in], y [tokens, out]; row r has the entries starts[r] .. starts[r + 1], in starts [out + 1].
// g [tokens, out], rows ascending; sums [entries], to which the sums are added.
#define EXPORT(NAME, T)                                                                                             \
    extern "C" void sparse_product_##NAME(const T* x, T* y, const int32_t* starts, const int32_t* columns,          \
                                          const float* weights, long tokens, long in, long out, int threads) {      \
        product(x, y, starts, columns, weights, tokens, in, out, threads);                                          \
    }                                                                                                               \
    extern "C" void sparse_dots_##NAME(const T* g, const T* x, const int32_t* rows, const int32_t* columns,         \
                                       float* sums, long entries, long tokens, long in, long out, int threads) {    \
        dots(g, x, rows, columns, sums, entries, tokens, in, out, threads);                                         \
    }

EXPORT(fp32, float)
EXPORT(bf16, bf16)
