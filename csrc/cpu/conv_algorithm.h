// The library's convolution algorithms side by side: what each takes, packs and runs.
#pragma once

#include <string>

#include "../common/layout.h"
#include "conv.h"

namespace resnet_fused {

enum class Algorithm {
  winograd4,
  winograd4_late,
  winograd3,
  winograd3_late,
  winograd2,
  winograd2_late,
  direct,
  grouped,
  strassen
};

Algorithm parse_algorithm(const char* caller, const std::string& name);

bool is_winograd(Algorithm algorithm);
int64_t largest_tile(Algorithm algorithm);  // of Winograd's
bool is_late(Algorithm algorithm);          // transforms the weights where they are needed

// These throw where the algorithm does not take the argument; `caller` begins the message.
void check_weight(const char* caller, const Tensor& weight, int64_t groups, Algorithm algorithm,
                  bool pairs);
void check_packs(const char* caller, Algorithm algorithm);  // ahead of the call
void check_stride(const char* caller, int64_t y, int64_t x, Algorithm algorithm);
void check_geometry(const char* caller, const ConvShape& shape, Algorithm algorithm, bool is_bf16);

// 32-bit words that a weight takes when it is packed: float32, or pairs of bfloat16.
int64_t packed_words(const Tensor& weight, int64_t groups, Algorithm algorithm, bool pairs);

// `weight` is contiguous float64, `packed` has packed_words of it.
void algorithm_pack(Algorithm algorithm, const Tensor& weight, int64_t stride, int64_t groups,
                    bool pairs, void* packed);

// Only direct convolution reads `input_strides`; the others take channels innermost.
void algorithm_run(Algorithm algorithm, const ConvArguments& conv, const int64_t* input_strides,
                   const PlainWeight& plain);

}  // namespace resnet_fused
