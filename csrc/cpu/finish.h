// What follows a convolution's sums: y = act(sum + shift[c] [+ residual]), NaN kept.
// Included inside the namespace of one instruction set (for_each_isa.h), after vectors.h.

// relu and none are applied to registers; the others, and panels with fewer than 32 channels, to a
// tile of sums that was written to L1.
struct Finish {
  const float* shift;     // of the panel's first channel
  const float* residual;  // at the first output element, or null
  float* output;
  int64_t columns;  // channels of this panel, 32 at most
  Activation act;
  float slope;
};

DEVICE_INLINE bool in_registers(const Finish& finish) {
  return finish.columns == 32 && (finish.act == Activation::none || finish.act == Activation::relu);
}

DEVICE_INLINE void finish_vector(const Finish& finish, int64_t offset, int64_t column, Vector sum) {
  Vector value = sum + load(finish.shift + column);
  if (finish.residual != nullptr) value += load(finish.residual + offset + column);
  if (finish.act == Activation::relu) value = value < 0.0f ? Vector{} : value;
  store(finish.output + offset + column, value);
}

template <class Act>
void finish_row_as(const Finish& finish, int64_t offset, const float* __restrict sums) {
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

// One pixel of a panel, from sums in memory.
inline void finish_row(const Finish& finish, int64_t offset, const float* sums) {
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
