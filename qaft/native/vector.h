// A register of fp32 numbers, and how fp32 and bf16 memory is read into it and written from it.
//
// GCC's and Clang's vector extensions: the same source is AVX-512, AVX2, SSE2 or NEON. All arithmetic is IEEE single
// precision, element by element, so that results do not depend on the width.

#pragma once

#include <cstdint>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

// Aligned like their elements: tensors may begin anywhere.
typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

struct bf16 {
    uint16_t bits;
};

INLINE Floats load(const float* from) { return *(const Floats*)from; }

INLINE Floats load(const bf16* from) {
    return (Floats)(__builtin_convertvector(*(const Halves*)from, Words) << 16);
}

// By reference, for code that is written for registers and single numbers alike.
INLINE void get(const float* from, Floats& v) { v = *(const Floats*)from; }
INLINE void get(const float* from, float& v) { v = *from; }

INLINE void store(float* to, Floats v) { *(Floats*)to = v; }
INLINE void store(float* to, float v) { *to = v; }

// Rounded to nearest, ties to even. A NaN stays one: what is computed from bf16 has a quiet bit that no carry reaches.
INLINE void store(bf16* to, Floats v) {
    Words bits = (Words)v;
    *(Halves*)to = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
}
