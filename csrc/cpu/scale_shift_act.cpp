// y = act(x * scale[c] + shift[c] [+ residual]): batch norm in eval mode, folded into two vectors.
//
// Dense data in the layout of `input`. One pass: reads x [and residual], writes y, 2 [3] tensors
// where eager moves 2 + 2 [+ 3]. It is normalize_act with mean = 0: x - 0 is exact, -0.0 and NaN
// included.

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "../common/overlap.h"
#include "../common/strings.h"
#include "channel_vectors.h"
#include "memory_pool.h"
#include "normalize_act.h"

namespace resnet_fused {
namespace {

constexpr const char* op = "scale_shift_act";

template <class A>
void run(const Tensor& x, const void* residual, const Tensor& scale, const Tensor& shift,
         MemoryFormat format, Activation act, double negative_slope, Tensor& output) {
  const int64_t channels = x.size(1);
  const VectorArgument<A> scale_data(op, "scale", scale, x), shift_data(op, "shift", shift, x);
  if (x.numel() == 0) return;
  const Extent shape = folded(extent(x, format));
  std::vector<A> zeros(shape.channels), scales(shape.channels), shifts(shape.channels);
  for (int64_t c = 0; c < channels; ++c) {
    scales[c] = scale_data(c, A(1));
    shifts[c] = shift_data(c, A(0));
  }
  repeat(scales, channels);
  repeat(shifts, channels);
  normalize_act({x.const_data_ptr(), residual, output.mutable_data_ptr(), shape, zeros.data(),
                 scales.data(), shifts.data(), negative_slope},
                x.scalar_type(), act);
}

// `output` may be the input.
void checked_run(const Tensor& input, const Tensor& scale, const Tensor& shift,
                 const std::optional<Tensor>& residual, const std::string& act,
                 double negative_slope, Tensor& output) {
  const Activation activation = parse_activation(op, act);
  if (residual) check_like(op, "residual", *residual, input);
  const MemoryFormat format = suggested_format(input);
  const Tensor x = dense(input, format);
  const Tensor r = residual ? dense(*residual, format) : x;
  // Number by number a residual may be the input itself; scale and shift are copied first.
  if (r.const_data_ptr() != output.const_data_ptr())
    check_apart(op, "input and residual", {{output, true}, {r, false}});
  const auto body = input.scalar_type() == ScalarType::Double ? &run<double> : &run<float>;
  body(x, residual ? r.const_data_ptr() : nullptr, scale, shift, format, activation, negative_slope,
       output);
}

Tensor scale_shift_act(const Tensor& input, const Tensor& scale, const Tensor& shift,
                       const std::optional<Tensor>& residual, const std::string& act,
                       double negative_slope) {
  check_data(op, "input", input);
  Tensor output = pool_empty(input.sizes(), suggested_format(input), input.scalar_type());
  checked_run(input, scale, shift, residual, act, negative_slope, output);
  return output;
}

// The same over its own input, where nobody else holds that: no fresh memory, one tensor less
// moved.
void scale_shift_act_(Tensor input, const Tensor& scale, const Tensor& shift,
                      const std::optional<Tensor>& residual, const std::string& act,
                      double negative_slope) {
  check_data(op, "input", input);
  check(is_dense(input, suggested_format(input)), op,
        ": input must be dense to be overwritten, got shape ", shape_text(input.sizes()));
  checked_run(input, scale, shift, residual, act, negative_slope, input);
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused, m) {
  m.def(
      "_scale_shift_act_(Tensor(a!) input, Tensor scale, Tensor shift, Tensor? residual, str act, "
      "float negative_slope) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("_scale_shift_act_", TORCH_BOX(&resnet_fused::scale_shift_act_));
  m.impl("scale_shift_act", TORCH_BOX(&resnet_fused::scale_shift_act));
}
