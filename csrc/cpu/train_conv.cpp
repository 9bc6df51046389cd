// A convolution in training, with the batch norms before and behind it.
//
//     forward    z = conv(a, w) + b,  a = act(bn(x)) or x;  mean and variance of z
//     backward   dz = weight rstd (g act' - ...) or g;  dw, da [+ r];  the sums for the bn before
//
// Neither a nor dz exists as a whole: a few images at a time are computed, used while they are in
// cache, and overwritten by the next ones. In tensors that cross memory: forward reads x and writes
// z, backward reads g, z and x and writes da; eager PyTorch's modules read or write 9 and 15.
// The weights are packed in the call, since every step has new ones.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "batch_statistics.h"
#include "bn_act_backward.h"
#include "channel_vectors.h"
#include "memory_pool.h"
#include "normalize_act.h"
#include "pack_weights.h"
#include "weight_grad.h"

namespace resnet_fused {
namespace {

// Bytes that one pass may touch, a quarter of a common L3.
constexpr int64_t kPassBytes = int64_t(8) << 20;

// Images [*, H, W, C] and how their rows of pixels are handed to the kernels for batch norm.
struct Images {
  int64_t count, pixels, channels, element;

  int64_t bytes() const { return pixels * channels * element; }  // of one
  Extent extent(int64_t images) const {
    Extent one = folded({pixels, channels, 1});
    one.outer *= images;
    return one;
  }
};

Images images_of(const Tensor& tensor) {
  return {tensor.size(0), tensor.size(2) * tensor.size(3), tensor.size(1),
          static_cast<int64_t>(element_size(tensor.scalar_type()))};
}

const char* at(const void* data, const Images& images, int64_t image) {
  return static_cast<const char*>(data) + image * images.bytes();
}
char* at(void* data, const Images& images, int64_t image) {
  return static_cast<char*>(data) + image * images.bytes();
}

// A batch norm with the batch's statistics, and the activation behind it; `vectors` are mean, var,
// weight and bias, of which the last two may be empty, or there is none at all.
struct Norm {
  std::optional<Normalization<float>> values;
  Activation act = Activation::none;
  double negative_slope = 0;

  Norm(const char* op, const char* name, const std::vector<Tensor>& vectors, double eps,
       const std::string& act_name, double slope, const Tensor& data)
      : act(parse_activation(op, act_name)), negative_slope(slope) {
    if (vectors.empty()) return;
    check(vectors.size() >= 4, op, ": ", name,
          " must be empty or begin with mean, var, weight, "
          "bias, got ",
          vectors.size(), " tensors");
    const auto optional = [&](size_t i) {
      return vectors[i].numel() == 0 ? std::optional<Tensor>() : std::optional<Tensor>(vectors[i]);
    };
    const VectorArgument<float> mean(op, name, vectors[0], data), var(op, name, vectors[1], data);
    const VectorArgument<float> weight(op, name, optional(2), data),
        bias(op, name, optional(3), data);
    values.emplace(mean.data(), var.data(), weight, bias, eps, data.size(1),
                   images_of(data).extent(1));
  }
  explicit operator bool() const { return values.has_value(); }

  void apply(const void* x, const Images& images, int64_t count, ScalarType dtype, void* y) const {
    normalize_act({x, nullptr, y, images.extent(count), values->mean.data(), values->scale.data(),
                   values->bias.data(), negative_slope},
                  dtype, act);
  }
  BnActBackward backward(const void* grad, const void* x, void* result) const {
    return {grad,
            x,
            grad,
            result,
            nullptr,
            values->mean.data(),
            values->scale.data(),
            values->bias.data(),
            negative_slope};
  }
};

Tensor vector_of(const std::vector<double>& values) {
  const int64_t size = static_cast<int64_t>(values.size());
  Tensor result = pool_empty({&size, 1}, MemoryFormat::Contiguous, ScalarType::Float);
  std::copy(values.begin(), values.end(), static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

void check_image(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_cpu() && tensor.dim() == 4 && tensor.numel() > 0 &&
            (tensor.scalar_type() == ScalarType::Float ||
             tensor.scalar_type() == ScalarType::BFloat16),
        op, ": ", name,
        " must be a float32 or bfloat16 CPU tensor with 4 dimensions, not empty, got ",
        dtype_name(tensor.scalar_type()), " ", shape_text(tensor.sizes()));
}

ConvShape conv_shape(const char* op, const Tensor& input, const Tensor& weight,
                     const std::vector<int64_t>& geometry) {
  check_image(op, "input", input);
  check(weight.is_cpu() && weight.dim() == 4 && weight.numel() > 0 &&
            weight.scalar_type() == ScalarType::Float,
        op, ": weight must be a float32 CPU tensor with 4 dimensions, got ",
        dtype_name(weight.scalar_type()), " ", shape_text(weight.sizes()));
  check(geometry.size() == 6, op, ": geometry must be stride, padding and dilation, got ",
        geometry.size(), " numbers");
  check(input.size(1) == weight.size(1), op, ": input must have ", weight.size(1),
        " channels, got shape ", shape_text(input.sizes()));
  ConvShape s{};
  s.batch = input.size(0), s.channels = input.size(1), s.out_channels = weight.size(0);
  s.height = input.size(2), s.width = input.size(3), s.groups = 1;
  int64_t out[2];
  for (int64_t i = 0; i < 2; ++i) {
    s.kernel[i] = weight.size(2 + i), s.stride[i] = geometry[i];
    s.padding[i] = geometry[2 + i], s.dilation[i] = geometry[4 + i];
    check(s.stride[i] > 0 && s.padding[i] >= 0 && s.dilation[i] > 0, op,
          ": stride and dilation must be positive and padding not negative");
    const int64_t room = input.size(2 + i) + 2 * s.padding[i] - s.dilation[i] * (s.kernel[i] - 1);
    check(room >= 1, op, ": input is smaller than the kernel, got shape ",
          shape_text(input.sizes()));
    out[i] = (room - 1) / s.stride[i] + 1;
  }
  s.out_height = out[0], s.out_width = out[1];
  return s;
}

// The convolution whose output is the gradient of `s`'s input, for stride 1.
ConvShape turned(const ConvShape& s) {
  ConvShape t = s;
  t.channels = s.out_channels, t.out_channels = s.channels;
  t.height = s.out_height, t.width = s.out_width;
  t.out_height = s.height, t.out_width = s.width;
  for (int i = 0; i < 2; ++i) t.padding[i] = s.dilation[i] * (s.kernel[i] - 1) - s.padding[i];
  return t;
}

int64_t images_of_a_pass(const ConvShape& s, int64_t element) {
  const int64_t image =
      (s.channels * s.height * s.width + s.out_channels * s.out_height * s.out_width) * element;
  const int64_t passes = (s.batch + std::max<int64_t>(1, kPassBytes / image) - 1) /
                         std::max<int64_t>(1, kPassBytes / image);
  return (s.batch + passes - 1) / passes;
}

// A convolution with weights packed now, over some images at a time.
class PackedNow {
 public:
  PackedNow(const char* op, const std::string& algorithm, const ConvShape& shape,
            const WeightView& view, const Tensor& weight, const float* shift, bool is_bf16)
      : algorithm_(parse_algorithm(op, algorithm)), shape_(shape), is_bf16_(is_bf16) {
    check(algorithm_ == Algorithm::direct || algorithm_ == Algorithm::winograd4 ||
              algorithm_ == Algorithm::winograd4_late,
          op, ": training takes direct, winograd4 or winograd4_late, got ", algorithm);
    check_weight(op, weight, 1, algorithm_, false);
    check_geometry(op, shape, algorithm_, is_bf16);
    // winograd4_late takes the weights where they are.
    const size_t words = algorithm_ == Algorithm::direct      ? direct_words(view)
                         : algorithm_ == Algorithm::winograd4 ? winograd_packed_words(
                                                                    view.outputs, view.inputs, 1, 4, false)
                                                              : 0;
    packed_ = Workspace(words + static_cast<size_t>(view.outputs));
    if (words > 0) pack_weights(algorithm_, view, shape.stride[0], packed_.data());
    weights_ = words > 0 ? packed_.data() : nullptr;
    float* const own_shift = packed_.data() + words;
    for (int64_t i = 0; i < view.outputs; ++i) own_shift[i] = shift == nullptr ? 0.0f : shift[i];
    shift_ = own_shift;
    plain_ = {view.data,
              false,
              {view.output_stride, view.input_stride, view.tap_stride[0], view.tap_stride[1]},
              nullptr};
  }

  void run(const void* input, const void* residual, void* output, int64_t images) const {
    ConvArguments arguments{shape_,           input, weights_, shift_, residual, output,
                            Activation::none, 0.0f,  is_bf16_,       false};
    arguments.shape.batch = images;
    const int64_t c = shape_.channels;
    const int64_t strides[4] = {shape_.height * shape_.width * c, 1, shape_.width * c, c};
    algorithm_run(algorithm_, arguments, strides, plain_);
  }

 private:
  static size_t direct_words(const WeightView& w) {
    const int64_t panels = (w.outputs + kPanel - 1) / kPanel;
    return static_cast<size_t>(panels * kPanel * w.inputs * w.taps());
  }

  Algorithm algorithm_;
  ConvShape shape_;
  bool is_bf16_;
  Workspace packed_;
  const float* weights_;
  const float* shift_;
  PlainWeight plain_;
};

std::tuple<Tensor, Tensor, Tensor> train_conv(
    const Tensor& input, const std::vector<Tensor>& before, double eps, const std::string& act,
    double negative_slope, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<int64_t>& geometry, const std::string& algorithm) {
  constexpr const char* op = "_train_conv";
  const ConvShape shape = conv_shape(op, input, weight, geometry);
  const ScalarType dtype = input.scalar_type();
  const Tensor x = dense(input, MemoryFormat::ChannelsLast);
  const Norm norm(op, "before", before, eps, act, negative_slope, input);
  const int64_t sizes[4] = {shape.batch, shape.out_channels, shape.out_height, shape.out_width};
  Tensor output = pool_empty({sizes, 4}, MemoryFormat::ChannelsLast, dtype);
  const VectorArgument<float> shift(op, "bias", bias, output);
  const PackedNow conv(op, algorithm, shape, view_weight(weight, 1), weight, shift.data(),
                       dtype == ScalarType::BFloat16);

  const Images from = images_of(x), to = images_of(output);
  const int64_t step = images_of_a_pass(shape, from.element);
  const Workspace activation(norm ? static_cast<size_t>(step * from.bytes() + 3) / sizeof(float)
                                  : 0);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> train_conv_backward(
    const Tensor& grad, const std::optional<Tensor>& output, const std::vector<Tensor>& after,
    double after_eps, const std::string& after_act, double after_slope, int64_t count_behind,
    const Tensor& input, const std::vector<Tensor>& before, double before_eps,
    const std::string& before_act, double before_slope, const Tensor& weight,
    const std::vector<int64_t>& geometry, const std::optional<Tensor>& residual,
    const std::string& input_algorithm, const std::string& weight_algorithm) {
  constexpr const char* op = "_train_conv_backward";
  const ConvShape shape = conv_shape(op, input, weight, geometry);
  const ScalarType dtype = input.scalar_type();
  const bool is_bf16 = dtype == ScalarType::BFloat16;
  const Tensor g = dense(grad, MemoryFormat::ChannelsLast),
               x = dense(input, MemoryFormat::ChannelsLast);
  const Tensor z = output ? dense(*output, MemoryFormat::ChannelsLast) : g;
  const Tensor r = residual ? dense(*residual, MemoryFormat::ChannelsLast) : x;
  const Norm behind(op, "after", after, after_eps, after_act, after_slope, g);
  const Norm norm(op, "before", before, before_eps, before_act, before_slope, input);
  const Images from = images_of(x), to = images_of(g);

  std::optional<MeanGradients<float>> means;
  if (behind) {
    check(after.size() == 6 && count_behind > 0, op,
          ": after must end with the gradients of weight and bias, and count be positive");
    const VectorArgument<float> weight_grad(op, "after", after[4], g),
        bias_grad(op, "after", after[5], g);
    means.emplace(weight_grad.data(), bias_grad.data(), *behind.values, count_behind, to.extent(1));
  }

  const bool needs_input = input_algorithm != "none", needs_weight = weight_algorithm != "none";
  const int64_t none = 0;
  Tensor grad_input = needs_input ? pool_empty(x.sizes(), MemoryFormat::ChannelsLast, dtype)
                                  : pool_empty({&none, 1}, MemoryFormat::Contiguous, dtype);
  Tensor grad_weight = needs_weight
                           ? pool_empty(weight.sizes(), suggested_format(weight), ScalarType::Float)
                           : pool_empty({&none, 1}, MemoryFormat::Contiguous, ScalarType::Float);
  const WeightView view = view_weight(weight, 1);
  std::optional<PackedNow> conv;
  if (needs_input)
    conv.emplace(op, input_algorithm, turned(shape), view.turned(), weight, nullptr, is_bf16);
  const int64_t step = images_of_a_pass(shape, from.element);
  std::optional<WeightGrad> weights;
  if (needs_weight) weights.emplace(shape, weight_algorithm == "winograd4", is_bf16, step);
  const WeightView stored = needs_weight ? view_weight(grad_weight, 1) : view;

  const Workspace activation(
      norm && needs_weight ? static_cast<size_t>(step * from.bytes() + 3) / sizeof(float) : 0);
  const Workspace gradient(behind ? static_cast<size_t>(step * to.bytes() + 3) / sizeof(float) : 0);
  const Extent extent = from.extent(from.count);
  std::optional<BackwardSums> sums;
  if (norm && needs_input) {
    sums.emplace(norm.backward(grad_input.const_data_ptr(), x.const_data_ptr(), nullptr), extent,
                 dtype, norm.act, MaskFrom::input, from.channels);
  }
  for (int64_t first = 0; first < shape.batch; first += step) {
    const int64_t count = std::min(step, shape.batch - first);
    const void* dz = at(g.const_data_ptr(), to, first);
    if (behind) {
      bn_act_backward_input(behind.backward(dz, at(z.const_data_ptr(), to, first), gradient.data()),
                            to.extent(count), dtype, behind.act, means->grad.data(),
                            means->slope.data());
      dz = gradient.data();
    }
    if (needs_input) {
      conv->run(dz, residual ? at(r.const_data_ptr(), from, first) : nullptr,
                at(grad_input.mutable_data_ptr(), from, first), count);
      if (sums) sums->advance((first + count) * from.pixels * from.channels / extent.channels);
    }
    if (needs_weight) {
      const void* a = at(x.const_data_ptr(), from, first);
      if (norm) {
        norm.apply(a, from, count, dtype, activation.data());
        a = activation.data();
      }
      weights->add(a, dz, count, first + count == shape.batch, stored);
    }
  }
  std::vector<double> sum_grad(sums ? from.channels : 0), sum_deviation(sums ? from.channels : 0);
  if (sums) sums->finish(sum_grad.data(), sum_deviation.data());
  for (size_t c = 0; c < sum_deviation.size(); ++c) sum_deviation[c] *= norm.values->rstd[c];
  return {grad_input, grad_weight, vector_of(sum_deviation), vector_of(sum_grad)};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "_train_conv(Tensor input, Tensor[] before, float eps, str act, float negative_slope, "
      "Tensor weight, Tensor? bias, int[] geometry, str algorithm) "
      "-> (Tensor output, Tensor mean, Tensor var)");
  m.def(
      "_train_conv_backward(Tensor grad, Tensor? output, Tensor[] after, float after_eps, "
      "str after_act, float after_slope, int count, Tensor input, Tensor[] before, float "
      "before_eps, "
      "str before_act, float before_slope, Tensor weight, int[] geometry, Tensor? residual, "
      "str input_algorithm, str weight_algorithm) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor norm_weight_grad, Tensor norm_bias_grad)");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_train_conv", TORCH_BOX(&resnet_fused::train_conv));
  m.impl("_train_conv_backward", TORCH_BOX(&resnet_fused::train_conv_backward));
}
