// x -> s x H along an axis, H Sylvester's Hadamard matrix of a power of two: log2(n) stages of (a, b) -> (a + b, a - b).
//
// Four stages at a time run in registers, so that a block of up to 256 numbers is read and written once; larger blocks
// make one more pass over a buffer in the first-level cache per factor of 16. Neither the stages nor their order depend
// on any of this: element by element, sums are those of the reference.

#include "vector.h"

constexpr int RADIX = 16;
constexpr long MAX_SIZE = 1 << 15;

// Stage H within a register: a product with +-1 is exact, fused or not.
template <int H> INLINE Floats lane_stage(Floats v) {
    Floats sign, other;
    for (int i = 0; i < LANES; ++i) {
        sign[i] = i & H ? -1.0f : 1.0f;
        other[i] = v[i ^ H];
    }
    return other + v * sign;
}

INLINE Floats lane_stages(Floats v) {
    v = lane_stage<4>(lane_stage<2>(lane_stage<1>(v)));
    return LANES == 16 ? lane_stage<8>(v) : v;
}

template <int R, class V> INLINE void stages(V* v) {
#pragma GCC unroll 16
    for (int h = 1; h < R; h *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i)
            if (!(i & h)) {
                V a = v[i], b = v[i + h];
                v[i] = a + b;
                v[i + h] = a - b;
            }
}

template <int R, bool FIRST, bool LAST, class In, class Out>
static void sweep(const In* in, Out* out, long size, long stride, float scale) {
    for (long base = 0; base < size; base += R * stride)
        for (long at = base; at < base + stride; at += LANES) {
            Floats v[R];
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) {
                v[i] = load(in + at + i * stride);
                if (FIRST) v[i] = lane_stages(v[i]);
            }
            stages<R>(v);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) store(out + at + i * stride, LAST ? v[i] * scale : v[i]);
        }
}

template <bool FIRST, bool LAST, class In, class Out>
static void sweep_by(long radix, const In* in, Out* out, long size, long stride, float scale) {
    switch (radix) {
        case 16: return sweep<16, FIRST, LAST>(in, out, size, stride, scale);
        case 8: return sweep<8, FIRST, LAST>(in, out, size, stride, scale);
        case 4: return sweep<4, FIRST, LAST>(in, out, size, stride, scale);
        case 2: return sweep<2, FIRST, LAST>(in, out, size, stride, scale);
        default: return sweep<1, FIRST, LAST>(in, out, size, stride, scale);
    }
}

template <class T> static void transform(const T* in, T* out, long size, float scale, float* work) {
    long rest = size / LANES, stride = LANES;
    if (rest <= RADIX) return sweep_by<true, true>(rest, in, out, size, stride, scale);
    sweep_by<true, false>(RADIX, in, work, size, stride, scale);
    for (rest /= RADIX, stride *= RADIX; rest > RADIX; rest /= RADIX, stride *= RADIX)
        sweep_by<false, false>(RADIX, work, work, size, stride, scale);
    sweep_by<false, true>(rest, work, out, size, stride, scale);
}

template <class T> static void rows(const T* in, T* out, long count, long size, float scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        alignas(64) float work[MAX_SIZE];
#pragma omp for schedule(static)
        for (long i = 0; i < count; ++i) transform(in + i * size, out + i * size, size, scale, work);
    }
}

// in, out: [count, size], size a power of two from LANES to MAX_SIZE.
extern "C" void hadamard_rows_fp32(const float* in, float* out, long count, long size, float scale, int threads) {
    rows(in, out, count, size, scale, threads);
}

extern "C" void hadamard_rows_bf16(const bf16* in, bf16* out, long count, long size, float scale, int threads) {
    rows(in, out, count, size, scale, threads);
}

template <int R, class V> INLINE void column_sweep(float* x, long size, long inner, long stride) {
    for (long base = 0; base < size; base += R * stride)
        for (long at = base; at < base + stride; ++at) {
            V v[R];
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) get(x + (at + i * stride) * inner, v[i]);
            stages<R>(v);
#pragma GCC unroll 16
            for (int i = 0; i < R; ++i) store(x + (at + i * stride) * inner, v[i]);
        }
}

template <class V> static void columns(float* x, long size, long inner) {
    long stride = 1, rest = size;
    for (; rest >= RADIX; rest /= RADIX, stride *= RADIX) column_sweep<RADIX, V>(x, size, inner, stride);
    if (rest == 8) column_sweep<8, V>(x, size, inner, stride);
    if (rest == 4) column_sweep<4, V>(x, size, inner, stride);
    if (rest == 2) column_sweep<2, V>(x, size, inner, stride);
}

// x: [count, size, inner], transformed in place along its second axis, not scaled; any power of two.
extern "C" void hadamard_columns_fp32(float* x, long count, long size, long inner, int threads) {
    long tiles = inner / LANES, tail = inner % LANES;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (long i = 0; i < count; ++i)
        for (long tile = 0; tile <= tiles; ++tile) {
            float* from = x + i * size * inner + tile * LANES;
            if (tile < tiles)
                columns<Floats>(from, size, inner);
            else
                for (long j = 0; j < tail; ++j) columns<float>(from + j, size, inner);
        }
}
