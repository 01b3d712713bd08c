// Row functions for x86-64 with AVX2 and FMA. Everything of the standard library is included before the target changes,
// so that no inline function of it is compiled for a machine that may not be there.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define MUMOE_ISA avx2
#define MUMOE_ISA_NAME "avx2"
#define MUMOE_WIDTH 8
#include "rows_of_isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
