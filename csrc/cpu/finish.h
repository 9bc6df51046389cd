// What follows a convolution's sums: y = act(sum + shift[c] [+ residual]), NaN kept.
// Included inside the namespace of one instruction set (for_each_isa.h), after vectors.h.

// relu and none are applied to registers; the others, and panels with fewer than 32 channels, to a
// tile of sums that was written to L1.
template <class T>
struct Finish {
  const float* shift;  // of the panel's first channel
  const T* residual;   // at the first output element, or null
  T* output;
  int64_t columns;  // channels of this panel, 32 at most
  Activation act;
  float slope;
};

template <class T>
DEVICE_INLINE bool in_registers(const Finish<T>& finish) {
  return finish.columns == 32 && (finish.act == Activation::none || finish.act == Activation::relu);
}

template <class T>
DEVICE_INLINE void finish_vector(const Finish<T>& finish, int64_t offset, int64_t column,
                                 Vector sum) {
  Vector value = sum + load(finish.shift + column);
  if (finish.residual != nullptr) value += load(finish.residual + offset + column);
  if (finish.act == Activation::relu) value = value < 0.0f ? Vector{} : value;
  store(finish.output + offset + column, value);
}

template <class Act>
void finish_row_as(const Finish<float>& finish, int64_t offset, const float* __restrict sums) {
  float* __restrict output = finish.output + offset;
  const float slope = finish.slope;
  if (finish.residual == nullptr) {
#pragma omp simd
    for (int64_t c = 0; c < finish.columns; ++c) {
      output[c] = Act::forward(sums[c] + finish.shift[c], slope);
    }
  } else {
    const float* residual = finish.residual + offset;
#pragma omp simd
    for (int64_t c = 0; c < finish.columns; ++c) {
      output[c] = Act::forward(sums[c] + finish.shift[c] + residual[c], slope);
    }
  }
}

template <class Act>
void finish_row_as(const Finish<bf16>& finish, int64_t offset, const float* __restrict sums) {
  float residual[kPanel], output[kPanel];
  if (finish.residual != nullptr) widen(finish.residual + offset, residual, finish.columns);
  finish_row_as<Act>({finish.shift, finish.residual == nullptr ? nullptr : residual, output,
                      finish.columns, finish.act, finish.slope},
                     0, sums);
  narrow(output, finish.output + offset, finish.columns);
}

// One pixel of a panel, from sums in memory.
template <class T>
void finish_row(const Finish<T>& finish, int64_t offset, const float* sums) {
  switch (finish.act) {
    case Activation::none: return finish_row_as<None>(finish, offset, sums);
    case Activation::relu: return finish_row_as<Relu>(finish, offset, sums);
    case Activation::relu6: return finish_row_as<Relu6>(finish, offset, sums);
    case Activation::leaky_relu: return finish_row_as<LeakyRelu>(finish, offset, sums);
    case Activation::silu: return finish_row_as<Silu>(finish, offset, sums);
    case Activation::hardswish: return finish_row_as<Hardswish>(finish, offset, sums);
    case Activation::gelu: return finish_row_as<Gelu>(finish, offset, sums);
  }
}
