// A residual block in training, one call each way: ops/train_block.py step by step without Python
// in between, for blocks whose convolutions all run in the library's own kernels. Between two
// kernels Python's memory is cold, so that a step of it costs as much as a small convolution.
//
// Values: 0 is the block's input, 2 + i what follows convolution i; the last one is the output. A
// value that a residual was added to exists as a tensor, as do those that are added and the output.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "../common/strings.h"
#include "bn_act.h"
#include "memory_pool.h"
#include "train_conv.h"

namespace resnet_fused {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kOutside = 2;

// A convolution, its batch norm and activation. In `numbers` of the operators: input, residual,
// stride, padding, dilation, and bits for which of its parameters there are and what its backward
// reads the activation's derivative from.
struct Step {
  static constexpr size_t kNumbers = 9;
  enum Bits { bias = 1, norm_weight = 2, norm_bias = 4, mask_output = 8, mask_residual = 16 };
  static constexpr int64_t masks = mask_output | mask_residual;
  static constexpr int64_t all_bits = masks | bias | norm_weight | norm_bias;

  int64_t input, residual;  // values; -1 for none
  std::vector<int64_t> geometry;
  int64_t bits;
  double eps, negative_slope;
  std::string act, output_algorithm, input_algorithm, weight_algorithm;
  Tensor weight;
  OptionalTensor conv_bias, bn_weight, bn_bias;

  bool has(Bits bit) const { return (bits & bit) != 0; }
  bool adds() const { return residual >= 0; }
};

struct Block {
  std::vector<Step> steps;

  Block(const char* op, const std::vector<Tensor>& parameters, const std::vector<int64_t>& numbers,
        const std::vector<double>& scalars, const std::vector<std::string>& names) {
    const size_t count = names.size() / 4;
    check(count > 0 && names.size() == 4 * count && numbers.size() == Step::kNumbers * count &&
              scalars.size() == 2 * count,
          op, ": numbers, scalars and names must have 9, 2 and 4 for each convolution, got ",
          numbers.size(), ", ", scalars.size(), " and ", names.size());
    size_t next = 0;
    const auto parameter = [&](bool is_there) {
      check(!is_there || next < parameters.size(), op, ": parameters are missing");
      return is_there ? OptionalTensor(parameters[next++]) : OptionalTensor();
    };
    for (size_t i = 0; i < count; ++i) {
      const int64_t* const n = numbers.data() + Step::kNumbers * i;
      const int64_t values = kOutside + static_cast<int64_t>(i);
      check((n[8] & ~Step::all_bits) == 0 && (n[1] >= 0 || (n[8] & Step::masks) == 0), op,
            ": bits must say what there is, and read a mask beside a residual only, got ", n[8]);
      check(n[0] >= 0 && n[0] != 1 && n[0] < values && n[1] >= -1 && n[1] != 1 && n[1] < values, op,
            ": a convolution reads the input or what is before it, got ", n[0], " and ", n[1]);
      OptionalTensor weight = parameter(true);
      OptionalTensor bias = parameter((n[8] & Step::bias) != 0);
      OptionalTensor bn_weight = parameter((n[8] & Step::norm_weight) != 0);
      OptionalTensor bn_bias = parameter((n[8] & Step::norm_bias) != 0);
      steps.push_back({n[0],
                       n[1],
                       {n + 2, n + 8},
                       n[8],
                       scalars[2 * i],
                       scalars[2 * i + 1],
                       names[4 * i],
                       names[4 * i + 1],
                       names[4 * i + 2],
                       names[4 * i + 3],
                       *std::move(weight),
                       std::move(bias),
                       std::move(bn_weight),
                       std::move(bn_bias)});
    }
    check(next == parameters.size(), op, ": there are ", parameters.size() - next,
          " parameters too many");
  }

  int64_t size() const { return static_cast<int64_t>(steps.size()); }
  const Step& operator[](int64_t i) const { return steps[static_cast<size_t>(i)]; }
  // Whether a value exists as a tensor.
  bool is_materialised(int64_t value) const {
    if (value == kOutside + size() - 1 || (value >= kOutside && (*this)[value - kOutside].adds())) {
      return true;
    }
    return std::any_of(steps.begin(), steps.end(),
                       [&](const Step& step) { return step.residual == value; });
  }
};

// The values as the convolutions read them, in forward and again in backward.
struct Values {
  const Block& block;
  std::vector<OptionalTensor> tensors;                    // of each value, where there is one
  std::vector<OptionalTensor> outputs, means, variances;  // of each convolution

  Values(const Block& b, const Tensor* input)
      : block(b),
        tensors(b.steps.size() + kOutside),
        outputs(b.steps.size()),
        means(b.steps.size()),
        variances(b.steps.size()) {
    if (input != nullptr) tensors[0] = *input;
  }

  const Tensor& tensor(const char* op, int64_t value) const {
    const OptionalTensor& found = tensors[static_cast<size_t>(value)];
    check(found.has_value(), op, ": value ", value, " is missing");
    return *found;
  }

  // A value as a convolution reads it: a tensor, or one that is still to be normalised.
  struct Source {
    const Tensor& data;
    std::vector<Tensor> vectors;
    double eps;
    std::string act;
    double negative_slope;
  };
  Source source(const char* op, int64_t value) const {
    if (value < kOutside || block[value - kOutside].adds()) {
      return {tensor(op, value), {}, 0, "none", 0};
    }
    const int64_t i = value - kOutside;
    const Step& step = block[i];
    return {*outputs[static_cast<size_t>(i)], vectors(i), step.eps, step.act, step.negative_slope};
  }
  std::vector<Tensor> vectors(int64_t i) const {
    const Step& step = block[i];
    const Tensor& mean = *means[static_cast<size_t>(i)];
    const int64_t none = 0;
    const auto or_empty = [&](const OptionalTensor& vector) {
      return vector ? *vector
                    : pool_empty({&none, 1}, MemoryFormat::Contiguous, mean.scalar_type());
    };
    return {mean, *variances[static_cast<size_t>(i)], or_empty(step.bn_weight),
            or_empty(step.bn_bias)};
  }

  std::tuple<Tensor, Tensor, Tensor> convolve(const char* op, int64_t i) const {
    const Step& step = block[i];
    const Source from = source(op, step.input);
    return train_conv(from.data, from.vectors, from.eps, from.act, from.negative_slope, step.weight,
                      step.conv_bias, step.geometry, step.output_algorithm);
  }
};

// Convolutions' outputs, their means and variances in turn, and what else exists as a tensor.
std::vector<Tensor> train_block(const Tensor& input, const std::vector<Tensor>& parameters,
                                const std::vector<int64_t>& numbers,
                                const std::vector<double>& scalars,
                                const std::vector<std::string>& names) {
  constexpr const char* op = "_train_block";
  const Block block(op, parameters, numbers, scalars, names);
  Values values(block, &input);
  std::vector<Tensor> outputs, statistics, tensors;
  for (int64_t i = 0; i < block.size(); ++i) {
    const Step& step = block[i];
    const size_t at = static_cast<size_t>(i);
    auto [z, mean, var] = values.convolve(op, i);
    values.outputs[at] = z, values.means[at] = mean, values.variances[at] = var;
    outputs.push_back(z);
    statistics.push_back(mean);
    statistics.push_back(var);
    if (!block.is_materialised(kOutside + i)) continue;
    const OptionalTensor residual =
        step.adds() ? OptionalTensor(values.tensor(op, step.residual)) : OptionalTensor();
    tensors.push_back(normalize_act_op(z, residual, mean, var, step.bn_weight, step.bn_bias,
                                       step.eps, step.act, step.negative_slope));
    values.tensors[at + kOutside] = tensors.back();
  }
  outputs.insert(outputs.end(), statistics.begin(), statistics.end());
  outputs.insert(outputs.end(), tensors.begin(), tensors.end());
  return outputs;
}

// The gradient of the input, and of each convolution's weight and its batch norm's weight and bias;
// empty what is not needed. Nothing at all where a weight's gradient is not finite: NaN and
// infinities have to be PyTorch's. Without the last convolution's output it is computed again.
std::vector<Tensor> train_block_backward(
    const Tensor& grad_output, const std::vector<Tensor>& outputs,
    const std::vector<Tensor>& statistics, const std::vector<Tensor>& kept,
    const std::vector<int64_t>& kept_values, const std::vector<int64_t>& needs,
    const std::vector<Tensor>& parameters, const std::vector<int64_t>& numbers,
    const std::vector<double>& scalars, const std::vector<std::string>& names) {
  constexpr const char* op = "_train_block_backward";
  const Block block(op, parameters, numbers, scalars, names);
  const size_t count = block.steps.size();
  check(outputs.size() == count || outputs.size() + 1 == count, op, ": outputs must be ", count,
        " or one less, got ", outputs.size());
  check(statistics.size() == 2 * count && kept.size() == kept_values.size() &&
            needs.size() == count + 1,
        op, ": statistics, kept and needs must fit the convolutions");
  Values values(block, nullptr);
  for (size_t i = 0; i < kept.size(); ++i) {
    const int64_t value = kept_values[i];
    check(value >= 0 && value < kOutside + block.size(), op, ": there is no value ", value);
    values.tensors[static_cast<size_t>(value)] = kept[i];
  }
  for (size_t i = 0; i < count; ++i) {
    values.means[i] = statistics[2 * i], values.variances[i] = statistics[2 * i + 1];
    if (i < outputs.size()) values.outputs[i] = outputs[i];
  }
  if (outputs.size() < count) {
    values.outputs.back() = std::get<0>(values.convolve(op, block.size() - 1));
  }

  const int64_t none = 0;
  const Tensor empty = pool_empty({&none, 1}, MemoryFormat::Contiguous, ScalarType::Float);
  std::vector<Tensor> found(1 + 3 * count, empty);
  std::vector<OptionalTensor> grads(count + kOutside);
  std::vector<std::optional<std::pair<Tensor, Tensor>>> sums(count + kOutside);
  grads.back() = grad_output;
  for (int64_t i = block.size() - 1; i >= 0; --i) {
    const Step& step = block[i];
    const size_t at = static_cast<size_t>(i), value = at + kOutside;
    const size_t from = static_cast<size_t>(step.input);
    check(grads[value].has_value(), op, ": nothing reads value ", value);
    Tensor grad = *std::exchange(grads[value], std::nullopt);
    const Tensor& z = *values.outputs[at];
    check(z.dim() == 4 && z.numel() > 0, op,
          ": outputs must have 4 dimensions and not be empty, got shape ", shape_text(z.sizes()));
    std::string act = step.act;
    if (step.adds() || !sums[value]) {
      const auto given = [&](Step::Bits bit, int64_t which) {
        return step.has(bit) ? OptionalTensor(values.tensor(op, which)) : OptionalTensor();
      };
      auto [grad_residual, grad_weight, grad_bias] =
          bn_act_backward_sums(grad, z, given(Step::mask_residual, step.residual),
                               given(Step::mask_output, static_cast<int64_t>(value)),
                               *values.means[at], *values.variances[at], step.bn_weight,
                               step.bn_bias, step.eps, step.act, step.negative_slope, step.adds());
      sums[value] = {grad_weight, grad_bias};
      if (step.adds()) {
        OptionalTensor& known = grads[static_cast<size_t>(step.residual)];
        check(!known.has_value(), op, ": value ", step.residual, " has several gradients");
        known = grad = grad_residual;
        act = "none";
      }
    }
    const bool needs_input = step.input != 0 || needs[0] != 0, needs_weight = needs[1 + at] != 0;
    found[2 + 3 * at] = sums[value]->first, found[3 + 3 * at] = sums[value]->second;
    if (!needs_input && !needs_weight) continue;
    std::vector<Tensor> after = values.vectors(i);
    after.push_back(sums[value]->first);
    after.push_back(sums[value]->second);
    const Values::Source source = values.source(op, step.input);
    auto [grad_input, grad_weight, norm_weight_grad, norm_bias_grad] = train_conv_backward(
        grad, z, after, step.eps, act, step.negative_slope, z.numel() / z.size(1), std::nullopt, {},
        source.data, source.vectors, source.eps, source.act, source.negative_slope, step.weight,
        step.geometry, needs_input ? grads[from] : OptionalTensor(),
        needs_input ? step.input_algorithm : "none", needs_weight ? step.weight_algorithm : "none");
    if (needs_weight && grad_weight.numel() == 0) return {};
    found[1 + 3 * at] = grad_weight;
    if (!needs_input) continue;
    grads[from] = grad_input;
    // Of several readers the first comes last, and has the sums of all.
    if (!source.vectors.empty()) sums[from] = {norm_weight_grad, norm_bias_grad};
  }
  if (needs[0] != 0 && grads[0]) found[0] = *grads[0];
  return found;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "_train_block(Tensor input, Tensor[] parameters, int[] numbers, float[] scalars, "
      "str[] names) -> Tensor[]");
  m.def(
      "_train_block_backward(Tensor grad_output, Tensor[] outputs, Tensor[] statistics, "
      "Tensor[] kept, int[] kept_values, int[] needs, Tensor[] parameters, int[] numbers, "
      "float[] scalars, str[] names) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_train_block", TORCH_BOX(&resnet_fused::train_block));
  m.impl("_train_block_backward", TORCH_BOX(&resnet_fused::train_block_backward));
}
