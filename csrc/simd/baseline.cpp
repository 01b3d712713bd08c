// Row functions for any machine: SSE2, NEON or whatever the compiler makes of vectors of four floats.
#include <cmath>
#include <cstdint>
#include <limits>

#include "rows.h"

#define MUMOE_ISA baseline
#define MUMOE_ISA_NAME "baseline"
#define MUMOE_WIDTH 4
#include "rows_of_isa.h"
