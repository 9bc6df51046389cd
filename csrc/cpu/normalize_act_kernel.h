// Included inside the namespace of one instruction set, after simd.h.

template <class A>
using NormalizeActTile = void (*)(const NormalizeAct&, const Tile&, const A* x, const A* residual,
                                  A* y);

template <class A, class Act, bool has_residual>
void normalize_act_tile(const NormalizeAct& arguments, const Tile& tile, const A* x,
                        const A* residual, A* y) {
  const A slope = static_cast<A>(arguments.negative_slope);
  by_direction(tile.along, [&](auto parameter) __attribute__((always_inline)) {
    const auto mean = parameter(static_cast<const A*>(arguments.mean), tile.channel);
    const auto scale = parameter(static_cast<const A*>(arguments.scale), tile.channel);
    const auto bias = parameter(static_cast<const A*>(arguments.bias), tile.channel);
    for (int64_t row = 0; row < tile.rows * tile.columns; row += tile.columns) {
#pragma omp simd
      for (int64_t j = 0; j < tile.columns; ++j) {
        A value = normalized(x[row + j], mean[j], scale[j], bias[j]);
        if (has_residual) value += residual[row + j];
        y[row + j] = Act::forward(value, slope);
      }
    }
  });
}

template <class A, bool has_residual>
NormalizeActTile<A> normalize_act_tile(Activation act) {
  switch (act) {
    case Activation::none: return &normalize_act_tile<A, None, has_residual>;
    case Activation::relu: return &normalize_act_tile<A, Relu, has_residual>;
    case Activation::relu6: return &normalize_act_tile<A, Relu6, has_residual>;
    case Activation::leaky_relu: return &normalize_act_tile<A, LeakyRelu, has_residual>;
    case Activation::silu: return &normalize_act_tile<A, Silu, has_residual>;
    case Activation::hardswish: return &normalize_act_tile<A, Hardswish, has_residual>;
    default: return &normalize_act_tile<A, Gelu, has_residual>;
  }
}

template <class T>
void normalize_act_units(const NormalizeAct& arguments, Activation act, int64_t begin,
                         int64_t end) {
  using A = compute_t<T>;
  const T* input = static_cast<const T*>(arguments.input);
  const T* residual = static_cast<const T*>(arguments.residual);
  T* output = static_cast<T*>(arguments.output);
  const auto kernel =
      residual ? normalize_act_tile<A, true>(act) : normalize_act_tile<A, false>(act);
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
