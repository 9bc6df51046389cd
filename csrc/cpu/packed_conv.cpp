// Convolutions with packed weights: the operators behind which the library's own algorithms stand.
//
//     y_i = act_i(conv(x_i, w_i * scale_i) + shift_i [+ r_i])      fixed statistics, no gradient
//
// `_pack_conv` folds and packs one convolution's weights once. `_packed_convs` runs residual blocks
// that follow one another, x_i and r_i being the block's input or an earlier y of the block. A
// large batch is taken a few images at a time through a block, so that what one convolution writes
// is still in cache when the next one reads it; only a block's input and output cross memory.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "../common/layout.h"
#include "../common/strings.h"
#include "conv_algorithm.h"
#include "memory_pool.h"
#include "workspace.h"

namespace resnet_fused {
namespace {

constexpr const char* op = "_packed_convs";

// Bytes that one pass through a block may touch: half of a small L3.
constexpr int64_t kChunkBytes = int64_t(16) << 20;

Tensor pack_conv(const Tensor& weight, int64_t stride, int64_t groups,
                 const std::string& algorithm_name, bool pairs) {
  constexpr const char* caller = "_pack_conv";
  const Algorithm algorithm = parse_algorithm(caller, algorithm_name);
  check_packs(caller, algorithm);
  check_weight(caller, weight, groups, algorithm, pairs);
  check_stride(caller, stride, stride, algorithm);
  check(weight.scalar_type() == ScalarType::Double, caller,
        ": weight must be float64, so that folding rounds once, got ",
        dtype_name(weight.scalar_type()));
  const Tensor w = dense(weight, MemoryFormat::Contiguous);
  const int64_t size = packed_words(weight, groups, algorithm, pairs) * (pairs ? 2 : 1);
  Tensor packed = pool_empty({&size, 1}, MemoryFormat::Contiguous,
                             pairs ? ScalarType::BFloat16 : ScalarType::Float);
  algorithm_pack(algorithm, w, stride, groups, pairs, packed.mutable_data_ptr());
  return packed;
}

// Values of a block: 0 is its input, 1 a residual from outside, 2 + i the output of convolution i.
constexpr int64_t kOutside = 2;

struct Step {
  ConvShape shape;
  int64_t input, residual;  // values; residual is -1 if there is none
  Algorithm algorithm;
  Activation act;
  float negative_slope;
  const float* packed;
  bool pairs;
  PlainWeight plain;
  const float* shift;
};

// What one convolution of the argument `steps` says, nine numbers each.
struct StepNumbers {
  int64_t input, residual, stride[2], padding[2], dilation[2], groups;
};
constexpr size_t kStepNumbers = 9;
static_assert(sizeof(StepNumbers) == kStepNumbers * sizeof(int64_t));

using Sizes = std::array<int64_t, 4>;  // N, C, H, W

ConvShape conv_shape(const Sizes& input, const Tensor& weight, const StepNumbers& numbers) {
  check(input[1] == weight.size(1) * numbers.groups, op, ": input must have ",
        weight.size(1) * numbers.groups, " channels, got shape ",
        shape_text({input.data(), input.size()}));
  ConvShape shape{};
  shape.batch = input[0], shape.channels = input[1], shape.height = input[2];
  shape.width = input[3], shape.out_channels = weight.size(0), shape.groups = numbers.groups;
  int64_t out[2];
  for (int i = 0; i < 2; ++i) {
    shape.kernel[i] = weight.size(2 + i);
    out[i] = set_side(op, shape, i, numbers.stride[i], numbers.padding[i], numbers.dilation[i]);
  }
  shape.out_height = out[0], shape.out_width = out[1];
  return shape;
}

const float* check_channels(const char* name, const Tensor& tensor, int64_t channels) {
  check(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 &&
            tensor.size(0) == channels && is_dense(tensor, MemoryFormat::Contiguous),
        op, ": ", name, " must be contiguous float32 of shape [", channels, "], got ",
        dtype_name(tensor.scalar_type()), " ", shape_text(tensor.sizes()));
  check_memory(op, name, tensor);
  return static_cast<const float*>(tensor.const_data_ptr());
}

Sizes check_image(const char* name, const Tensor& tensor) {
  check(tensor.is_cpu() && tensor.dim() == 4 &&
            (tensor.scalar_type() == ScalarType::Float ||
             tensor.scalar_type() == ScalarType::BFloat16),
        op, ": ", name, " must be a float32 or bfloat16 CPU tensor with 4 dimensions, got ",
        dtype_name(tensor.scalar_type()), " ", shape_text(tensor.sizes()));
  check_memory(op, name, tensor);
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

// One block's share of the operator's arguments, checked.
struct Block {
  ScalarType dtype;
  std::vector<Step> steps;
  std::vector<Sizes> values;
  bool needs_dense = false;  // the input, channels innermost

  bool is_bf16() const { return dtype == ScalarType::BFloat16; }
  int64_t element() const { return is_bf16() ? 2 : 4; }
  int64_t image_bytes(size_t value) const {
    const Sizes& s = values[value];
    return s[1] * s[2] * s[3] * element();
  }
};

PlainWeight plain_weight(const Tensor& weight, const float* scale) {
  PlainWeight plain{
      weight.const_data_ptr(), weight.scalar_type() == ScalarType::BFloat16, {}, scale};
  std::copy_n(weight.strides().data(), 4, plain.strides);
  return plain;
}

void run_step(const Step& step, bool is_bf16, int64_t images, const void* input,
              const int64_t* input_strides, const void* residual, void* output) {
  ConvArguments arguments{step.shape, input,      step.packed, step.shift,
                          residual,   output,     step.act,    step.negative_slope,
                          is_bf16,    step.pairs, false,       {}};
  arguments.shape.batch = images;
  algorithm_run(step.algorithm, arguments, input_strides, step.plain);
}

// One convolution's share of the operator's arguments.
struct StepTensors {
  const Tensor& packed;
  const Tensor& weight;
  const Tensor& scale;
  const Tensor& shift;
};

void add_step(Block& block, const StepNumbers& n, const StepTensors& tensors,
              const std::string& algorithm_name, const std::string& act, double negative_slope,
              bool has_residual) {
  const int64_t known = static_cast<int64_t>(block.values.size());
  check(n.input >= 0 && n.input < known && n.input != 1, op,
        ": a convolution's input must be 0 or an earlier one's output, got ", n.input);
  check(n.residual >= -1 && n.residual < known && (n.residual != 1 || has_residual), op,
        ": a convolution's residual must be -1, an outside tensor or an earlier output, got ",
        n.residual);
  const Algorithm algorithm = parse_algorithm(op, algorithm_name);
  check_packs(op, algorithm);
  const Tensor &weight = tensors.weight, &packed = tensors.packed;
  const bool pairs = packed.scalar_type() == ScalarType::BFloat16;
  check_weight(op, weight, n.groups, algorithm, pairs);
  check(weight.scalar_type() == block.dtype, op, ": weight must have the dtype of input, ",
        dtype_name(block.dtype), ", got ", dtype_name(weight.scalar_type()));
  const ConvShape shape = conv_shape(block.values[n.input], weight, n);
  check_geometry(op, shape, algorithm, block.is_bf16());
  const int64_t size = packed_words(weight, n.groups, algorithm, pairs) * (pairs ? 2 : 1);
  check(packed.is_cpu() && (pairs ? block.is_bf16() : packed.scalar_type() == ScalarType::Float) &&
            packed.dim() == 1 && packed.size(0) == size &&
            is_dense(packed, MemoryFormat::Contiguous),
        op, ": packed must be what _pack_conv made of weight for ", algorithm_name, ", got ",
        dtype_name(packed.scalar_type()), " ", shape_text(packed.sizes()));
  check_memory(op, "packed", packed);
  check(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % alignof(float) == 0, op,
        ": packed must be aligned to 4 bytes");
  check(pairs || !block.is_bf16() || algorithm != Algorithm::direct, op,
        ": packed must be bfloat16 for direct beside bfloat16 data");
  const Sizes sizes{shape.batch, shape.out_channels, shape.out_height, shape.out_width};
  check(n.residual < 0 || block.values[n.residual] == sizes, op,
        ": residual must have the shape of the output, ", shape_text({sizes.data(), sizes.size()}));
  block.needs_dense |= (n.input == 0 && algorithm != Algorithm::direct) || n.residual == 0;
  block.steps.push_back(
      {shape, n.input, n.residual, algorithm, parse_activation(op, act),
       static_cast<float>(negative_slope), static_cast<const float*>(packed.const_data_ptr()),
       pairs, plain_weight(weight, check_channels("scale", tensors.scale, shape.out_channels)),
       check_channels("shift", tensors.shift, shape.out_channels)});
  block.values.push_back(sizes);
}

// All convolutions, a few images at a time.
void run_block(const Block& block, const char* input, const int64_t* input_strides,
               const char* residual, char* output) {
  const size_t count = block.steps.size();
  const int64_t batch = block.values.back()[0];
  int64_t touched = 0;
  for (size_t v = 0; v < block.values.size(); ++v) touched += block.image_bytes(v);
  const int64_t fits = std::max<int64_t>(1, kChunkBytes / touched);
  const int64_t passes = count == 1 ? 1 : (batch + fits - 1) / fits;
  const int64_t chunk = (batch + passes - 1) / passes;
  std::vector<int64_t> place;  // of what lies between the convolutions, in bytes
  int64_t between = 0;
  for (size_t i = 0; i + 1 < count; ++i) {
    place.push_back(between);
    between += (block.image_bytes(kOutside + i) * chunk + 63) / 64 * 64;
  }
  const Workspace workspace(static_cast<size_t>(between) / sizeof(float));
  char* const scratch = reinterpret_cast<char*>(workspace.data());
  for (int64_t first = 0; first < batch; first += chunk) {
    const int64_t images = std::min(chunk, batch - first);
    std::vector<const char*> at;
    at.push_back(input + first * input_strides[0] * block.element());
    at.push_back(residual == nullptr ? nullptr : residual + first * block.image_bytes(1));
    for (size_t i = 0; i < count; ++i) {
      const Step& step = block.steps[i];
      char* const to =
          i + 1 == count ? output + first * block.image_bytes(kOutside + i) : scratch + place[i];
      const Sizes& sizes = block.values[step.input];
      const std::vector<int64_t> dense =
          dense_strides({sizes.data(), sizes.size()}, MemoryFormat::ChannelsLast);
      run_step(step, block.is_bf16(), images, at[step.input],
               step.input == 0 ? input_strides : dense.data(),
               step.residual < 0 ? nullptr : at[step.residual], to);
      at.push_back(to);
    }
  }
}

Tensor run(const Block& block, const Tensor& input, const std::optional<Tensor>& residual) {
  const Sizes& sizes = block.values.back();
  Tensor output = pool_empty({sizes.data(), sizes.size()}, MemoryFormat::ChannelsLast, block.dtype);
  if (output.numel() == 0) return output;
  const Tensor x = block.needs_dense ? dense(input, MemoryFormat::ChannelsLast) : input;
  const Tensor r = residual ? dense(*residual, MemoryFormat::ChannelsLast) : x;
  // A dense tensor's strides may say anything where a size is 1.
  const std::vector<int64_t> strides = dense_strides(input.sizes(), MemoryFormat::ChannelsLast);
  run_block(block, static_cast<const char*>(x.const_data_ptr()),
            block.needs_dense ? strides.data() : x.strides().data(),
            residual ? static_cast<const char*>(r.const_data_ptr()) : nullptr,
            static_cast<char*>(output.mutable_data_ptr()));
  return output;
}

Tensor packed_convs(const Tensor& input, const std::optional<Tensor>& residual,
                    const std::vector<Tensor>& packed, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& scales, const std::vector<Tensor>& shifts,
                    const std::vector<int64_t>& numbers, const std::vector<std::string>& algorithms,
                    const std::vector<std::string>& acts,
                    const std::vector<double>& negative_slopes,
                    const std::vector<int64_t>& blocks) {
  const size_t count = weights.size();
  check(count > 0 && packed.size() == count && scales.size() == count && shifts.size() == count &&
            numbers.size() == count * kStepNumbers && algorithms.size() == count &&
            acts.size() == count && negative_slopes.size() == count,
        op,
        ": packed, weights, scales, shifts, steps, algorithms, acts and negative_slopes must "
        "describe the same number of convolutions, one at least");
  size_t left = count;
  for (const int64_t length : blocks) {
    check(length > 0 && static_cast<size_t>(length) <= left, op,
          ": blocks must be positive and add up to ", count, " convolutions");
    left -= static_cast<size_t>(length);
  }
  check(left == 0, op, ": blocks must be positive and add up to ", count, " convolutions");

  // Everything is checked before anything runs.
  std::vector<Block> checked;
  Sizes sizes = check_image("input", input);
  const ScalarType dtype = input.scalar_type();
  size_t i = 0;
  for (const int64_t length : blocks) {
    Block block{dtype, {}, {sizes, {}}};
    const bool adds = residual && checked.empty();
    if (adds) {
      block.values[1] = check_image("residual", *residual);
      check(residual->scalar_type() == dtype, op, ": residual must have the dtype of input, ",
            dtype_name(dtype), ", got ", dtype_name(residual->scalar_type()));
    }
    for (const size_t end = i + static_cast<size_t>(length); i < end; ++i) {
      StepNumbers n;
      std::copy_n(numbers.data() + i * kStepNumbers, kStepNumbers, reinterpret_cast<int64_t*>(&n));
      add_step(block, n, {packed[i], weights[i], scales[i], shifts[i]}, algorithms[i], acts[i],
               negative_slopes[i], adds);
    }
    sizes = block.values.back();
    checked.push_back(std::move(block));
  }
  Tensor output = run(checked[0], input, residual);
  for (size_t b = 1; b < checked.size(); ++b) output = run(checked[b], output, std::nullopt);
  return output;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def("_pack_conv(Tensor weight, int stride, int groups, str algorithm, bool pairs) -> Tensor");
  m.def(
      "_packed_convs(Tensor input, Tensor? residual, Tensor[] packed, Tensor[] weights, "
      "Tensor[] scales, Tensor[] shifts, int[] steps, str[] algorithms, str[] acts, "
      "float[] negative_slopes, int[] blocks) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_pack_conv", TORCH_BOX(&resnet_fused::pack_conv));
  m.impl("_packed_convs", TORCH_BOX(&resnet_fused::packed_convs));
}
