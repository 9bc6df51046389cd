// A convolution in training, with the batch norms before and behind it.
//
//     forward    z = conv(a, w) + b,  a = act(bn(x)) or x;  mean and variance of z
//     backward   dz = weight rstd (g act' - ...) or g;  dw, da [+ r];  the sums for the bn before
//
// where g may be the gradient of a max-pool behind, spread over the pixels that it came from.
//
// Neither a nor dz exists as a whole: a few images at a time are computed, used while they are in
// cache, and overwritten by the next ones. In tensors that cross memory: forward reads x and writes
// z, backward reads g, z and x and writes da; eager PyTorch's modules read or write 9 and 15.
// The weights are packed in the call, since every step has new ones.

#include "train_conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../common/strings.h"
#include "batch_statistics.h"
#include "direct_conv.h"
#include "isa.h"
#include "max_pool.h"
#include "pack_weights.h"
#include "packed_now.h"
#include "train_norm.h"
#include "weight_grad.h"

namespace resnet_fused {
namespace {

// Bytes that one pass may touch, a quarter of a common L3.
constexpr int64_t kPassBytes = int64_t(8) << 20;

void check_image(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_cpu() && tensor.dim() == 4 && tensor.numel() > 0 &&
            (tensor.scalar_type() == ScalarType::Float ||
             tensor.scalar_type() == ScalarType::BFloat16),
        op, ": ", name,
        " must be a float32 or bfloat16 CPU tensor with 4 dimensions, not empty, got ",
        dtype_name(tensor.scalar_type()), " ", shape_text(tensor.sizes()));
  check_memory(op, name, tensor);
}

ConvShape conv_shape(const char* op, const Tensor& input, const Tensor& weight,
                     const std::vector<int64_t>& geometry) {
  check_image(op, "input", input);
  check(weight.is_cpu() && weight.dim() == 4 && weight.numel() > 0 &&
            weight.scalar_type() == ScalarType::Float,
        op, ": weight must be a float32 CPU tensor with 4 dimensions, got ",
        dtype_name(weight.scalar_type()), " ", shape_text(weight.sizes()));
  check_memory(op, "weight", weight);
  check(geometry.size() == 6, op, ": geometry must be stride, padding and dilation, got ",
        geometry.size(), " numbers");
  check(input.size(1) == weight.size(1), op, ": input must have ", weight.size(1),
        " channels, got shape ", shape_text(input.sizes()));
  ConvShape s{};
  s.batch = input.size(0), s.channels = input.size(1), s.out_channels = weight.size(0);
  s.height = input.size(2), s.width = input.size(3), s.groups = 1;
  int64_t out[2];
  for (int i = 0; i < 2; ++i) {
    s.kernel[i] = weight.size(2 + i);
    out[i] = set_side(op, s, i, geometry[i], geometry[2 + i], geometry[4 + i]);
  }
  s.out_height = out[0], s.out_width = out[1];
  return s;
}

int64_t images_of_a_pass(const ConvShape& s, int64_t element) {
  const int64_t image =
      (s.channels * s.height * s.width + s.out_channels * s.out_height * s.out_width) * element;
  const int64_t passes = (s.batch + std::max<int64_t>(1, kPassBytes / image) - 1) /
                         std::max<int64_t>(1, kPassBytes / image);
  return (s.batch + passes - 1) / passes;
}

// `channels` are those that are added up.
Algorithm parse_quick(const char* op, const std::string& name, const ConvShape& shape,
                      const Tensor& weight, int64_t channels, bool is_bf16) {
  const Algorithm algorithm = parse_algorithm(op, name);
  const bool pairs = multiplies_pairs(algorithm, is_bf16);
  check(packs_quickly(algorithm, pairs), op,
        ": training takes direct, winograd4, winograd4_late and, for bfloat16 data, winograd2, "
        "winograd3, winograd2_late and winograd3_late, got ",
        name);
  const bool windows = algorithm == Algorithm::direct && direct_has_windows(channels, pairs);
  check(!pairs || windows || channels % 2 == 0, op, ": ", name,
        " takes an even number of channels beside bfloat16 data, got ", channels);
  check(!pairs || isa() == Isa::avx512_bf16, op, ": bfloat16 data need AVX512_BF16 for ", name);
  check_weight(op, weight, 1, algorithm, pairs);
  check_geometry(op, shape, algorithm, is_bf16);
  return algorithm;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> train_conv(
    const Tensor& input, const std::vector<Tensor>& before, double eps, const std::string& act,
    double negative_slope, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& geometry, const std::string& algorithm) {
  constexpr const char* op = "_train_conv";
  const ConvShape shape = conv_shape(op, input, weight, geometry);
  const ScalarType dtype = input.scalar_type();
  const bool is_bf16 = dtype == ScalarType::BFloat16;
  const Tensor x = dense(input, MemoryFormat::ChannelsLast);
  const Norm norm(op, "before", before, eps, act, negative_slope, input);
  const int64_t sizes[4] = {shape.batch, shape.out_channels, shape.out_height, shape.out_width};
  Tensor output = pool_empty({sizes, 4}, MemoryFormat::ChannelsLast, dtype);
  const VectorArgument<float> shift(op, "bias", bias, output);
  const PackedNow conv(parse_quick(op, algorithm, shape, weight, shape.channels, is_bf16), shape,
                       view_weight(weight, 1), shift.data(), is_bf16, kOutputPart);

  const Images from = images_of(x), to = images_of(output);
  const int64_t step = images_of_a_pass(shape, from.element);
  const Workspace activation = norm ? from.workspace(step) : Workspace();
  const Extent extent = folded({shape.batch * to.pixels, to.channels, 1}, 512);
  BatchStatistics statistics(output.const_data_ptr(), extent, dtype, to.channels);
  for (int64_t first = 0; first < shape.batch; first += step) {
    const int64_t count = std::min(step, shape.batch - first);
    const void* a = at(x.const_data_ptr(), from, first);
    if (norm) {
      norm.apply(a, from, count, dtype, activation.data());
      a = activation.data();
    }
    conv.run(a, nullptr, at(output.mutable_data_ptr(), to, first), count);
    statistics.advance((first + count) * to.pixels * to.channels / extent.channels);
  }
  std::vector<double> mean(to.channels), var(to.channels);
  statistics.finish(mean.data(), var.data());
  return {output, vector_of(mean), vector_of(var)};
}

namespace {

// The gradient of a convolution's output, some images at a time.
class OutputGrad {
 public:
  struct Arguments {
    const Tensor& grad;                   // of what follows it
    const std::optional<Tensor>& output;  // its own, where something does
    const std::vector<Tensor>& after;     // the batch norm's mean, var, weight and bias, and the
                                          // gradients of the last two
    double eps;
    const std::string& act;
    double negative_slope;
    int64_t count;                           // values a channel that these were taken over
    const std::optional<Tensor>& positions;  // of a max-pool
    const std::vector<int64_t>& window;
  };

  OutputGrad(const char* op, const Arguments& arguments, const ConvShape& shape, ScalarType dtype,
             int64_t most_images)
      : pool_(checked(op, arguments, shape, dtype)),
        grad_(dense(arguments.grad, MemoryFormat::ChannelsLast)),
        output_(arguments.output ? dense(*arguments.output, MemoryFormat::ChannelsLast) : grad_),
        norm_(op, "after", arguments.after, arguments.eps, arguments.act, arguments.negative_slope,
              output_, 2),
        from_(images_of(grad_)),
        images_(images_of(output_)) {
    if (arguments.positions) {
      positions_ = dense(*arguments.positions, MemoryFormat::ChannelsLast);
    }
    if (norm_) {
      check(arguments.count > 0, op, ": count must be positive, got ", arguments.count);
      const VectorArgument<float> weight(op, "after", arguments.after[4], output_),
          bias(op, "after", arguments.after[5], output_);
      means_.emplace(weight.data(), bias.data(), *norm_.values, arguments.count, images_.extent(1));
    }
    if (norm_ || positions_) computed_ = images_.workspace(most_images);
  }

  const void* of(int64_t first, int64_t count) const {
    const ScalarType dtype = output_.scalar_type();
    const void* grad = at(grad_.const_data_ptr(), from_, first);
    if (positions_) {
      max_unpool(grad,
                 static_cast<const uint8_t*>(positions_->const_data_ptr()) +
                     first * from_.pixels * from_.channels,
                 computed_.data(), pool_, count, dtype);
      grad = computed_.data();
    }
    if (!norm_) return grad;
    bn_act_backward_input(
        norm_.backward(grad, at(output_.const_data_ptr(), images_, first), computed_.data()),
        images_.extent(count), dtype, norm_.act, means_->grad.data(), means_->slope.data());
    return computed_.data();
  }

 private:
  // The tensors fit the convolution; returns the pool's shape, where there is one.
  static PoolShape checked(const char* op, const Arguments& arguments, const ConvShape& s,
                           ScalarType dtype) {
    const Tensor& grad = arguments.grad;
    const Tensor& output = arguments.output ? *arguments.output : grad;
    check_image(op, "grad", grad);
    check_image(op, arguments.output ? "output" : "grad", output);
    check(grad.scalar_type() == dtype && output.scalar_type() == dtype, op,
          ": grad and output must have the dtype of input, ", dtype_name(dtype), ", got ",
          dtype_name(grad.scalar_type()), " and ", dtype_name(output.scalar_type()));
    const int64_t wanted[4] = {s.batch, s.out_channels, s.out_height, s.out_width};
    check(std::equal(wanted, wanted + 4, output.sizes().data()), op, ": ",
          arguments.output ? "output" : "grad",
          " must have the shape of the convolution's output, ", shape_text({wanted, 4}), ", got ",
          shape_text(output.sizes()));
    if (!arguments.positions) {
      check(same_shape(grad, output), op, ": grad must have the shape of output, ",
            shape_text(output.sizes()), ", got ", shape_text(grad.sizes()));
      return {};
    }
    const PoolShape pool = positions_shape(op, output, arguments.window);
    check_pooled(op, grad, *arguments.positions, output, pool);
    return pool;
  }

  PoolShape pool_;
  Tensor grad_, output_;
  Norm norm_;
  Images from_, images_;
  std::optional<MeanGradients<float>> means_;
  std::optional<Tensor> positions_;
  Workspace computed_;
};

void check_input_grad(const char* op, const ConvShape& s) {
  for (int i = 0; i < 2; ++i) {
    check(s.stride[i] == 1 || (s.dilation[0] == 1 && s.dilation[1] == 1), op,
          ": the input's gradient takes a dilation with stride 1 only");
    check(s.padding[i] <= s.dilation[i] * (s.kernel[i] - 1), op,
          ": the input's gradient takes a padding smaller than the kernel, got ", s.padding[i]);
  }
}

void check_weight_grad(const char* op, const ConvShape& s, const std::string& algorithm) {
  check(algorithm == "gemm" || algorithm == "winograd4", op,
        ": weight_algorithm must be winograd4, gemm or none, got ", algorithm);
  const bool takes = s.kernel[0] == 3 && s.kernel[1] == 3 && s.stride[0] == s.stride[1] &&
                     s.stride[0] <= 2 && s.dilation[0] == 1 && s.dilation[1] == 1;
  check(algorithm == "gemm" || takes, op,
        ": winograd4 takes 3 x 3 kernels, stride 1 or 2 and dilation 1");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> train_conv_backward(
    const Tensor& grad, const std::optional<Tensor>& output, const std::vector<Tensor>& after,
    double after_eps, const std::string& after_act, double after_slope, int64_t count_behind,
    const std::optional<Tensor>& positions, const std::vector<int64_t>& window, const Tensor& input,
    const std::vector<Tensor>& before, double before_eps, const std::string& before_act,
    double before_slope, const Tensor& weight, const std::vector<int64_t>& geometry,
    const std::optional<Tensor>& residual, const std::string& input_algorithm,
    const std::string& weight_algorithm) {
  constexpr const char* op = "_train_conv_backward";
  const ConvShape shape = conv_shape(op, input, weight, geometry);
  const ScalarType dtype = input.scalar_type();
  const bool is_bf16 = dtype == ScalarType::BFloat16;
  if (residual) check_like(op, "residual", *residual, input);
  const Tensor x = dense(input, MemoryFormat::ChannelsLast);
  const Tensor r = residual ? dense(*residual, MemoryFormat::ChannelsLast) : x;
  const Norm norm(op, "before", before, before_eps, before_act, before_slope, input);
  const Images from = images_of(x);
  const int64_t step = images_of_a_pass(shape, from.element);
  const OutputGrad gradient(
      op, {grad, output, after, after_eps, after_act, after_slope, count_behind, positions, window},
      shape, dtype, step);

  const bool needs_input = input_algorithm != "none", needs_weight = weight_algorithm != "none";
  const bool winograd = weight_algorithm == "winograd4";
  if (needs_input) check_input_grad(op, shape);
  if (needs_weight) check_weight_grad(op, shape, weight_algorithm);
  const int64_t none = 0;
  Tensor grad_input = needs_input ? pool_empty(x.sizes(), MemoryFormat::ChannelsLast, dtype)
                                  : pool_empty({&none, 1}, MemoryFormat::Contiguous, dtype);
  Tensor grad_weight = needs_weight
                           ? pool_empty(weight.sizes(), suggested_format(weight), ScalarType::Float)
                           : pool_empty({&none, 1}, MemoryFormat::Contiguous, ScalarType::Float);
  const WeightView view = view_weight(weight, 1);
  std::optional<InputGrad> inputs;
  if (needs_input) {
    const Algorithm algorithm =
        parse_quick(op, input_algorithm, shape, weight, shape.out_channels, is_bf16);
    inputs.emplace(algorithm, shape, view, is_bf16);
  }
  std::optional<WeightGrad> weights;
  if (needs_weight) weights.emplace(shape, winograd, is_bf16, step);
  const WeightView stored = needs_weight ? view_weight(grad_weight, 1) : view;

  const Workspace activation = norm && needs_weight ? from.workspace(step) : Workspace();
  const auto add_weights = [&](const void* dz, int64_t first, int64_t count) {
    const void* a = at(x.const_data_ptr(), from, first);
    if (norm) {
      norm.apply(a, from, count, dtype, activation.data());
      a = activation.data();
    }
    weights->add(a, dz, count, first + count == shape.batch, stored);
  };
  const Extent extent = from.extent(from.count);
  std::optional<BackwardSums> sums;
  if (norm && needs_input) {
    sums.emplace(norm.backward(grad_input.const_data_ptr(), x.const_data_ptr(), nullptr), extent,
                 dtype, norm.act, MaskFrom::input, from.channels);
  }
  for (int64_t first = 0; first < shape.batch; first += step) {
    const int64_t count = std::min(step, shape.batch - first);
    const void* const dz = gradient.of(first, count);
    if (needs_input) {
      inputs->run(dz, residual ? at(r.const_data_ptr(), from, first) : nullptr,
                  at(grad_input.mutable_data_ptr(), from, first), count);
      if (sums) sums->advance((first + count) * from.pixels * from.channels / extent.channels);
    }
    if (needs_weight) add_weights(dz, first, count);
  }
  // Infinities have met zeros beside the image, or spread over their tiles: not what eager PyTorch
  // gives. An empty gradient says that its convolution has to do it.
  if (needs_weight && !weights->is_finite()) {
    grad_weight = pool_empty({&none, 1}, MemoryFormat::Contiguous, ScalarType::Float);
  }
  std::vector<double> sum_grad(sums ? from.channels : 0), sum_deviation(sums ? from.channels : 0);
  if (sums) sums->finish(sum_grad.data(), sum_deviation.data());
  for (size_t c = 0; c < sum_deviation.size(); ++c) sum_deviation[c] *= norm.values->rstd[c];
  return {grad_input, grad_weight, vector_of(sum_deviation), vector_of(sum_grad)};
}

}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "_train_conv(Tensor input, Tensor[] before, float eps, str act, float negative_slope, "
      "Tensor weight, Tensor? bias, int[] geometry, str algorithm) "
      "-> (Tensor output, Tensor mean, Tensor var)");
  m.def(
      "_train_conv_backward(Tensor grad, Tensor? output, Tensor[] after, float after_eps, "
      "str after_act, float after_slope, int count, Tensor? positions, int[] window, "
      "Tensor input, Tensor[] before, float before_eps, str before_act, float before_slope, "
      "Tensor weight, int[] geometry, Tensor? residual, str input_algorithm, str weight_algorithm) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor norm_weight_grad, Tensor norm_bias_grad)");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_train_conv", TORCH_BOX(&resnet_fused::train_conv));
  m.impl("_train_conv_backward", TORCH_BOX(&resnet_fused::train_conv_backward));
}
