// Row functions for x86-64 with AVX-512 (F, BW, DQ, VL). Everything of the standard library is included before the target
// changes, so that no inline function of it is compiled for a machine that may not be there.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define MUMOE_ISA avx512
#define MUMOE_ISA_NAME "avx512"
#define MUMOE_WIDTH 16
#include "rows_of_isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
