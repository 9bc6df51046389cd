// Included inside the namespace of one instruction set, after simd.h.

template <class T>
using NormalizeActTile = void (*)(const NormalizeAct&, const Tile&, const T* x, const T* residual,
                                  T* y);

template <class T, class Act, bool has_residual>
void normalize_act_tile(const NormalizeAct& arguments, const Tile& tile, const T* x,
                        const T* residual, T* y) {
  using A = compute_t<T>;
  const A slope = static_cast<A>(arguments.negative_slope);
  by_direction(tile.along, [&](auto parameter) __attribute__((always_inline)) {
    const auto mean = parameter(static_cast<const A*>(arguments.mean), tile.channel);
    const auto scale = parameter(static_cast<const A*>(arguments.scale), tile.channel);
    const auto bias = parameter(static_cast<const A*>(arguments.bias), tile.channel);
    for (int64_t row = 0; row < tile.rows * tile.columns; row += tile.columns) {
#pragma omp simd
      for (int64_t j = 0; j < tile.columns; ++j) {
        A value = normalized(widened(x[row + j]), mean[j], scale[j], bias[j]);
        if (has_residual) value += widened(residual[row + j]);
        narrow(Act::forward(value, slope), y[row + j]);
      }
    }
  });
}

template <class T, bool has_residual>
NormalizeActTile<T> normalize_act_tile(Activation act) {
  switch (act) {
    case Activation::none: return &normalize_act_tile<T, None, has_residual>;
    case Activation::relu: return &normalize_act_tile<T, Relu, has_residual>;
    case Activation::relu6: return &normalize_act_tile<T, Relu6, has_residual>;
    case Activation::leaky_relu: return &normalize_act_tile<T, LeakyRelu, has_residual>;
    case Activation::silu: return &normalize_act_tile<T, Silu, has_residual>;
    case Activation::hardswish: return &normalize_act_tile<T, Hardswish, has_residual>;
    default: return &normalize_act_tile<T, Gelu, has_residual>;
  }
}

template <class T>
void normalize_act_units(const NormalizeAct& arguments, Activation act, int64_t begin,
                         int64_t end) {
  using Number = tile_t<T>;
  const T* input = static_cast<const T*>(arguments.input);
  const T* residual = static_cast<const T*>(arguments.residual);
  T* output = static_cast<T*>(arguments.output);
  const auto kernel =
      residual ? normalize_act_tile<Number, true>(act) : normalize_act_tile<Number, false>(act);
  Input<T> input_buffer, residual_buffer;
  Output<T> output_buffer;
  for_tiles<T>(arguments.extent, begin, end, [&](const Tile& tile) {
    kernel(arguments, tile, input_buffer.read(input, tile),
           residual ? residual_buffer.read(residual, tile) : nullptr,
           output_buffer.begin(output, tile));
    output_buffer.end(output, tile);
  });
}

using NormalizeActKernel = void (*)(const NormalizeAct&, Activation, int64_t, int64_t);

inline NormalizeActKernel normalize_act_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return &normalize_act_units<float>;
    case ScalarType::Double: return &normalize_act_units<double>;
    case ScalarType::BFloat16: return &normalize_act_units<bf16>;
    default: return &normalize_act_units<f16>;
  }
}
