#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "../common/check.h"

namespace resnet_fused {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if RESNET_FUSED_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = RESNET_FUSED_AVX512 && avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("RESNET_FUSED_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < 4; ++i) {
    if (std::string(wanted) != names[i]) continue;
    check(i <= static_cast<int>(best), "RESNET_FUSED_CPU_ISA: this CPU supports ",
          names[static_cast<int>(best)], " at most, got ", wanted);
    return static_cast<Isa>(i);
  }
  check(false, "RESNET_FUSED_CPU_ISA must be avx512_bf16, avx512, avx2 or baseline, got '", wanted,
        "'");
  return best;
}

std::string isa_name() {
  return names[static_cast<int>(isa())];
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("_cpu_isa() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&resnet_fused::isa_name));
}
