#include "conv_algorithm.h"

#include "../common/check.h"
#include "direct_conv.h"
#include "grouped_conv.h"
#include "strassen.h"
#include "winograd.h"

namespace resnet_fused {
namespace {

// What an algorithm takes of a weight, beside the kernel's size.
const char* takes(Algorithm algorithm) {
  if (algorithm == Algorithm::grouped) return kGroupedTakes;
  return algorithm == Algorithm::strassen ? kStrassenTakes : "3 x 3 kernels";
}

bool fits(const Tensor& weight, int64_t groups, Algorithm algorithm) {
  const int64_t size = weight.size(2), k = weight.size(0), c = weight.size(1);
  if (algorithm == Algorithm::direct) return true;
  if (size != weight.size(3) || size != (algorithm == Algorithm::strassen ? 1 : 3)) return false;
  if (algorithm == Algorithm::grouped) return grouped_takes(k, c, groups);
  return algorithm != Algorithm::strassen || strassen_takes(k, c, groups);
}

}  // namespace

bool is_winograd(Algorithm algorithm) {
  return algorithm != Algorithm::direct && algorithm != Algorithm::grouped &&
         algorithm != Algorithm::strassen;
}
int64_t largest_tile(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::winograd2:
    case Algorithm::winograd2_late: return 2;
    case Algorithm::winograd3:
    case Algorithm::winograd3_late: return 3;
    default: return 4;
  }
}
bool is_late(Algorithm algorithm) {
  return algorithm == Algorithm::winograd4_late || algorithm == Algorithm::winograd3_late ||
         algorithm == Algorithm::winograd2_late;
}

Algorithm parse_algorithm(const char* caller, const std::string& name) {
  if (name == "winograd4") return Algorithm::winograd4;
  if (name == "winograd4_late") return Algorithm::winograd4_late;
  if (name == "winograd3") return Algorithm::winograd3;
  if (name == "winograd3_late") return Algorithm::winograd3_late;
  if (name == "winograd2") return Algorithm::winograd2;
  if (name == "winograd2_late") return Algorithm::winograd2_late;
  if (name == "grouped") return Algorithm::grouped;
  if (name == "strassen") return Algorithm::strassen;
  check(name == "direct", caller,
        ": algorithm must be winograd2, winograd3, winograd4, one of these with _late, direct, "
        "grouped or strassen, got '",
        name, "'");
  return Algorithm::direct;
}

void check_weight(const char* caller, const Tensor& weight, int64_t groups, Algorithm algorithm,
                  bool pairs) {
  check(weight.is_cpu() && weight.dim() == 4, caller,
        ": weight must be a CPU tensor with 4 dimensions, got shape ", shape_text(weight.sizes()));
  check(weight.numel() > 0, caller, ": weight must not be empty, got shape ",
        shape_text(weight.sizes()));
  check_memory(caller, "weight", weight);
  check(groups > 0 && weight.size(0) % groups == 0, caller, ": groups must divide weight's ",
        weight.size(0), " output channels, got ", groups);
  check(fits(weight, groups, algorithm), caller, ": this algorithm takes ", takes(algorithm),
        ", got shape ", shape_text(weight.sizes()), " and groups ", groups);
  const bool may_pair = algorithm == Algorithm::direct ||
                        (is_winograd(algorithm) && algorithm != Algorithm::winograd4_late);
  check(!pairs || may_pair, caller, ": this algorithm's packed weights are float32");
  check(pairs || !is_late(algorithm) || largest_tile(algorithm) == 4, caller,
        ": this algorithm multiplies pairs of bfloat16 numbers");
}

void check_packs(const char* caller, Algorithm algorithm) {
  check(!is_late(algorithm) || largest_tile(algorithm) == 4, caller,
        ": this algorithm takes a training step's weights, which are not packed");
}

void check_stride(const char* caller, int64_t y, int64_t x, Algorithm algorithm) {
  check(y > 0 && x > 0, caller, ": stride must be positive, got ", y, " and ", x);
  const bool any = algorithm == Algorithm::direct || algorithm == Algorithm::strassen;
  check(any || (y == x && (y == 1 || y == 2)), caller,
        ": Winograd and grouped take stride 1 or 2, got ", y, " and ", x);
}

void check_geometry(const char* caller, const ConvShape& shape, Algorithm algorithm, bool is_bf16) {
  check_stride(caller, shape.stride[0], shape.stride[1], algorithm);
  const bool dilated = shape.dilation[0] != 1 || shape.dilation[1] != 1;
  check(algorithm == Algorithm::direct || algorithm == Algorithm::strassen || !dilated, caller,
        ": Winograd and grouped take dilation 1");
  const bool padded = shape.padding[0] > 0 || shape.padding[1] > 0;
  check(algorithm != Algorithm::strassen || (!padded && !is_bf16), caller,
        ": strassen takes float32 without padding");
}

int64_t packed_words(const Tensor& weight, int64_t groups, Algorithm algorithm, bool pairs) {
  if (algorithm == Algorithm::grouped) return weight.numel();
  if (algorithm == Algorithm::strassen) {
    return static_cast<int64_t>(strassen_packed_floats(weight.size(0), weight.size(1)));
  }
  const int64_t words = pairs ? (weight.size(1) + 1) / 2 : weight.size(1);
  const size_t size = is_winograd(algorithm)
                          ? winograd_packed_words(weight.size(0), words, groups,
                                                  largest_tile(algorithm), is_late(algorithm))
                          : direct_packed_words(weight.size(0), weight.size(1),
                                                weight.sizes().data() + 2, groups, pairs);
  return static_cast<int64_t>(size);
}

void algorithm_pack(Algorithm algorithm, const Tensor& weight, int64_t stride, int64_t groups,
                    bool pairs, void* packed) {
  const double* data = static_cast<const double*>(weight.const_data_ptr());
  const int64_t outputs = weight.size(0), channels = weight.size(1);
  if (is_winograd(algorithm)) {
    winograd_pack(data, outputs, channels, groups, largest_tile(algorithm), stride, pairs,
                  is_late(algorithm), packed);
  } else if (algorithm == Algorithm::grouped) {
    grouped_pack(data, outputs, channels, static_cast<float*>(packed));
  } else if (algorithm == Algorithm::strassen) {
    strassen_pack(data, outputs, channels, static_cast<float*>(packed));
  } else {
    direct_pack(data, outputs, channels, weight.sizes().data() + 2, groups, pairs, packed);
  }
}

void algorithm_run(Algorithm algorithm, const ConvArguments& conv, const int64_t* input_strides,
                   const PlainWeight& plain) {
  if (is_winograd(algorithm)) {
    winograd_run(conv, plain, largest_tile(algorithm), is_late(algorithm));
  } else if (algorithm == Algorithm::grouped) {
    grouped_run(conv);
  } else if (algorithm == Algorithm::strassen) {
    strassen_run(conv, plain.data, plain.strides, plain.scale);
  } else {
    direct_run(conv, input_strides);
  }
}

}  // namespace resnet_fused
