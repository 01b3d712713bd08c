// Which set of row functions this machine can run, decided once.
#include "rows.h"

#include <cstdlib>
#include <cstring>

namespace mumoe {

namespace baseline {
extern const Rows kRows;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Rows kRows;
}
namespace avx512 {
extern const Rows kRows;
}
#endif

namespace {

const Rows& best() {
#if defined(__x86_64__)
  // As PyTorch's own variable of this name: "default", "avx2" or "avx512" lowers what is used.
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  bool any = limit == nullptr || std::strcmp(limit, "avx512") == 0;
  bool up_to_avx2 = any || std::strcmp(limit, "avx2") == 0;
  __builtin_cpu_init();
  if (any && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::kRows;
  }
  if (up_to_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kRows;
#endif
  return baseline::kRows;
}

}  // namespace

const Rows& rows() {
  static const Rows& chosen = best();
  return chosen;
}

}  // namespace mumoe
