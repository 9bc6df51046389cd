// Activations and their derivatives, for one value: forward(x) and backward(g, x) = g * act'(x).
//
// Included INSIDE a backend's namespace, after it has defined exp_(x), erf_(x) and DEVICE_INLINE,
// so that no function compiled for one instruction set is ever shared with another: hence no guard
// and no #include here.
//
// Comparisons are written so that NaN goes where PyTorch's eager kernels send it: relu keeps NaN
// and -0.0 (`x < 0 ? 0 : x`, never max), relu6's gradient at NaN is 0, leaky_relu's is g * slope.
// relu, relu6 and leaky_relu with a slope >= 0 may be given act(x) in place of x in backward().

struct None {
  template <class A>
  DEVICE_INLINE static A forward(A x, A) {
    return x;
  }
  template <class A>
  DEVICE_INLINE static A backward(A g, A, A) {
    return g;
  }
};

struct Relu {
  template <class A>
  DEVICE_INLINE static A forward(A x, A) {
    return x < A(0) ? A(0) : x;
  }
  template <class A>
  DEVICE_INLINE static A backward(A g, A x, A) {
    return x <= A(0) ? A(0) : g;
  }
};

struct Relu6 {
  template <class A>
  DEVICE_INLINE static A forward(A x, A) {
    const A low = x < A(0) ? A(0) : x;
    return low > A(6) ? A(6) : low;
  }
  template <class A>
  DEVICE_INLINE static A backward(A g, A x, A) {
    const A low = x > A(0) ? g : A(0);
    return x < A(6) ? low : A(0);
  }
};

struct LeakyRelu {
  template <class A>
  DEVICE_INLINE static A forward(A x, A slope) {
    return x > A(0) ? x : x * slope;
  }
  template <class A>
  DEVICE_INLINE static A backward(A g, A x, A slope) {
    return x > A(0) ? g : g * slope;
  }
};

// x * sigmoid(x)
struct Silu {
  template <class A>
  DEVICE_INLINE static A forward(A x, A) {
    return x / (A(1) + exp_(-x));
  }
  template <class A>
  DEVICE_INLINE static A backward(A g, A x, A) {
    const A sigmoid = A(1) / (A(1) + exp_(-x));
    return g * sigmoid * (A(1) + x * (A(1) - sigmoid));
  }
};

// x * clamp(x + 3, 0, 6) / 6
struct Hardswish {
  template <class A>
  DEVICE_INLINE static A forward(A x, A) {
    return x * Relu6::forward(x + A(3), A(0)) / A(6);
  }
  template <class A>
  DEVICE_INLINE static A backward(A g, A x, A) {
    const A inside = x < A(3) ? g * (x / A(3) + A(0.5)) : g;
    return x <= A(-3) ? A(0) : inside;
  }
};

// x * (1 + erf(x / sqrt 2)) / 2
struct Gelu {
  template <class A>
  DEVICE_INLINE static A cdf(A x) {
    return A(0.5) * (A(1) + erf_(x * A(0.70710678118654752440)));
  }
  template <class A>
  DEVICE_INLINE static A forward(A x, A) {
    return x * cdf(x);
  }
  template <class A>
  DEVICE_INLINE static A backward(A g, A x, A) {
    const A density = exp_(A(-0.5) * x * x) * A(0.39894228040143267794);  // 1 / sqrt(2 pi)
    return g * (cdf(x) + x * density);
  }
};
