// Included inside the namespace of one instruction set, after simd.h.

#include "channel_sums.h"

// ---- pass 1: sums, and the residual's gradient
// ---------------------------------------------------

template <class T>
struct SumsTile {
  const T* grad_output;
  const T* input;
  const T* auxiliary;
  T* grad_residual;
  double* sum_grad;
  double* sum_grad_deviation;
};

template <class T, class Act, MaskFrom mask>
void sums_tile(const BnActBackward& arguments, const Tile& tile, const SumsTile<T>& data) {
  using A = compute_t<T>;
  // Four rows of exp or erf would not fit the registers.
  constexpr bool is_cheap = !std::is_same<Act, Silu>::value && !std::is_same<Act, Gelu>::value;
  constexpr int kRowsAtOnce = is_cheap ? 4 : 1;
  const A negative_slope = static_cast<A>(arguments.negative_slope);
  const T* const grad_output = data.grad_output;
  const T* const input = data.input;
  const T* const auxiliary = data.auxiliary;
  T* const grad_residual = data.grad_residual;
  by_direction(tile.along, [&](auto parameter) __attribute__((always_inline)) {
    const auto mean = parameter(static_cast<const A*>(arguments.mean), tile.channel);
    const auto scale = parameter(static_cast<const A*>(arguments.scale), tile.channel);
    const auto bias = parameter(static_cast<const A*>(arguments.bias), tile.channel);
    const auto value = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
      const A x = widened(input[i]), g = widened(grad_output[i]);
      A argument;
      if (mask == MaskFrom::output) {
        argument = widened(auxiliary[i]);
      } else {
        argument = normalized(x, mean[j], scale[j], bias[j]);
        if (mask == MaskFrom::residual) argument += widened(auxiliary[i]);
      }
      const A grad = Act::backward(g, argument, negative_slope);
      if (mask != MaskFrom::input) narrow(grad, grad_residual[i]);
      return Two<A>{grad, grad * (x - mean[j])};
    };
    add_to_channels<kRowsAtOnce>(tile, parameter, value, data.sum_grad, data.sum_grad_deviation);
  });
}

template <class T>
using SumsTileKernel = void (*)(const BnActBackward&, const Tile&, const SumsTile<T>&);

template <class T, MaskFrom mask>
SumsTileKernel<T> sums_tile(Activation act) {
  switch (act) {
    case Activation::none: return &sums_tile<T, None, mask>;
    case Activation::relu: return &sums_tile<T, Relu, mask>;
    case Activation::relu6: return &sums_tile<T, Relu6, mask>;
    case Activation::leaky_relu: return &sums_tile<T, LeakyRelu, mask>;
    default: break;
  }
  // The others cannot be told from their output.
  constexpr MaskFrom argument = mask == MaskFrom::output ? MaskFrom::residual : mask;
  switch (act) {
    case Activation::silu: return &sums_tile<T, Silu, argument>;
    case Activation::hardswish: return &sums_tile<T, Hardswish, argument>;
    default: return &sums_tile<T, Gelu, argument>;
  }
}

template <class T>
void backward_sums(const BnActBackward& arguments, Activation act, MaskFrom mask,
                   const Chunks& chunks, double* sum_grad, double* sum_grad_deviation,
                   int64_t begin, int64_t end) {
  using Number = tile_t<T>;
  const T* grad_output = static_cast<const T*>(arguments.grad_output);
  const T* input = static_cast<const T*>(arguments.input);
  const T* auxiliary = static_cast<const T*>(arguments.auxiliary);
  T* grad_residual = static_cast<T*>(arguments.grad_residual);
  const auto kernel = mask == MaskFrom::input    ? sums_tile<Number, MaskFrom::input>(act)
                      : mask == MaskFrom::output ? sums_tile<Number, MaskFrom::output>(act)
                                                 : sums_tile<Number, MaskFrom::residual>(act);
  const bool has_residual = grad_residual != nullptr;
  Input<T> grad_buffer, input_buffer, auxiliary_buffer;
  Output<T> output_buffer;
  for (int64_t u = begin; u < end; ++u) {
    for_tiles_of<T>(chunks.unit(u), chunks.extent, [&](const Tile& tile, int64_t index) {
      kernel(arguments, tile,
             {grad_buffer.read(grad_output, tile), input_buffer.read(input, tile),
              has_residual ? auxiliary_buffer.read(auxiliary, tile) : nullptr,
              has_residual ? output_buffer.begin(grad_residual, tile) : nullptr, sum_grad + index,
              sum_grad_deviation + index});
      if (has_residual) output_buffer.end(grad_residual, tile);
    });
  }
}

// ---- pass 2: the input's gradient
// ----------------------------------------------------------------

template <class T>
using InputTileKernel = void (*)(const BnActBackward&, const Tile&, const void* mean_grads,
                                 const void* slope_grads, const T* g, const T* x, T* result);

template <class T, class Act>
void input_tile(const BnActBackward& arguments, const Tile& tile, const void* mean_grads,
                const void* slope_grads, const T* g, const T* x, T* result) {
  using A = compute_t<T>;
  const A negative_slope = static_cast<A>(arguments.negative_slope);
  by_direction(tile.along, [&](auto parameter) __attribute__((always_inline)) {
    const auto mean = parameter(static_cast<const A*>(arguments.mean), tile.channel);
    const auto scale = parameter(static_cast<const A*>(arguments.scale), tile.channel);
    const auto bias = parameter(static_cast<const A*>(arguments.bias), tile.channel);
    const auto mean_grad = parameter(static_cast<const A*>(mean_grads), tile.channel);
    const auto slope_grad = parameter(static_cast<const A*>(slope_grads), tile.channel);
    for (int64_t row = 0; row < tile.rows * tile.columns; row += tile.columns) {
#pragma omp simd
      for (int64_t j = 0; j < tile.columns; ++j) {
        const A sample = widened(x[row + j]);
        const A grad = Act::backward(
            widened(g[row + j]), normalized(sample, mean[j], scale[j], bias[j]), negative_slope);
        narrow(scale[j] * ((grad - mean_grad[j]) - (sample - mean[j]) * slope_grad[j]),
               result[row + j]);
      }
    }
  });
}

template <class T>
InputTileKernel<T> input_tile(Activation act) {
  switch (act) {
    case Activation::none: return &input_tile<T, None>;
    case Activation::relu: return &input_tile<T, Relu>;
    case Activation::relu6: return &input_tile<T, Relu6>;
    case Activation::leaky_relu: return &input_tile<T, LeakyRelu>;
    case Activation::silu: return &input_tile<T, Silu>;
    case Activation::hardswish: return &input_tile<T, Hardswish>;
    default: return &input_tile<T, Gelu>;
  }
}

template <class T>
void backward_input(const BnActBackward& arguments, Activation act, const Extent& extent,
                    const void* mean_grads, const void* slope_grads, int64_t begin, int64_t end) {
  using Number = tile_t<T>;
  const T* grad_output = static_cast<const T*>(arguments.grad_output);
  const T* input = static_cast<const T*>(arguments.input);
  T* grad_input = static_cast<T*>(arguments.grad_input);
  const auto kernel = input_tile<Number>(act);
  Input<T> grad_buffer, input_buffer;
  Output<T> output_buffer;
  for_tiles<T>(extent, begin, end, [&](const Tile& tile) {
    kernel(arguments, tile, mean_grads, slope_grads, grad_buffer.read(grad_output, tile),
           input_buffer.read(input, tile), output_buffer.begin(grad_input, tile));
    output_buffer.end(grad_input, tile);
  });
}

// ---- by dtype
// --------------------------------------------------------------------------------------

inline auto backward_sums_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return &backward_sums<float>;
    case ScalarType::Double: return &backward_sums<double>;
    case ScalarType::BFloat16: return &backward_sums<bf16>;
    default: return &backward_sums<f16>;
  }
}

inline auto backward_input_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return &backward_input<float>;
    case ScalarType::Double: return &backward_input<double>;
    case ScalarType::BFloat16: return &backward_input<bf16>;
    default: return &backward_input<f16>;
  }
}
