// PyTorch's CPU operators without what they compute: each allocates its results and returns. What is
// left of a call is its host side as on a GPU, without the launch. Operators that are not named here
// stay as they are: for tensors of a few elements they compute little, and what they do besides
// (shapes, strides, dtypes) a GPU's operators do too. Dropout takes the way that it takes on CUDA.
//
// `bench.host` loads this file as a Python module. Under valgrind it also counts instructions.

#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/native_dropout.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <tuple>

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#define HAS_CALLGRIND 1
#else
#define HAS_CALLGRIND 0
#endif

namespace {

using at::Tensor;
using std::optional;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Mask = std::array<bool, 3>;
using Ints = c10::SymIntArrayRef;

Tensor like(const Tensor& t) { return at::empty_like(t); }
Tensor like_if(bool wanted, const Tensor& t) { return wanted ? at::empty_like(t) : Tensor(); }
Tensor of(const Tensor& t, at::IntArrayRef sizes) { return at::empty(sizes, t.options()); }

// ---- Activations, softmax -----------------------------------------------------------------------

using S = const at::Scalar&;
using T = const Tensor&;

template <typename... Others>
Tensor one(T x, Others...) {
  return like(x);
}
template <typename... Others>
Tensor backward(T, T x, Others...) {
  return like(x);
}
Tensor backward_of_elu(T, S, S, S, bool, T x) { return like(x); }
Two log_sigmoid(T x) { return {like(x), of(x, {0})}; }

// ---- Norms --------------------------------------------------------------------------------------

Three layer_norm(const Tensor& x, Ints shape, const optional<Tensor>&, const optional<Tensor>&,
                 double) {
  int64_t rows = x.numel();
  for (const auto& n : shape) rows /= n.expect_int();
  return {like(x), of(x, {rows, 1}), of(x, {rows, 1})};
}
Three layer_norm_backward(const Tensor&, const Tensor& x, Ints, const Tensor&, const Tensor&,
                          const optional<Tensor>& w, const optional<Tensor>& b, Mask wanted) {
  return {like_if(wanted[0], x), wanted[1] ? like(*w) : Tensor(), wanted[2] ? like(*b) : Tensor()};
}
Three group_norm(const Tensor& x, const optional<Tensor>&, const optional<Tensor>&, c10::SymInt n,
                 c10::SymInt, c10::SymInt, int64_t groups, double) {
  return {like(x), of(x, {n.expect_int(), groups}), of(x, {n.expect_int(), groups})};
}
Three group_norm_backward(const Tensor&, const Tensor& x, const Tensor&, const Tensor&,
                          const optional<Tensor>&, c10::SymInt, c10::SymInt channels, c10::SymInt,
                          int64_t, Mask wanted) {
  int64_t c = channels.expect_int();
  return {like_if(wanted[0], x), wanted[1] ? of(x, {c}) : Tensor(),
          wanted[2] ? of(x, {c}) : Tensor()};
}
Three batch_norm(const Tensor& x, const optional<Tensor>&, const optional<Tensor>&,
                 const optional<Tensor>&, const optional<Tensor>&, bool training, double, double) {
  int64_t kept = training ? x.size(1) : 0;
  return {like(x), of(x, {kept}), of(x, {kept})};
}
Three batch_norm_backward(const Tensor&, const Tensor& x, const optional<Tensor>&,
                          const optional<Tensor>&, const optional<Tensor>&, const optional<Tensor>&,
                          const optional<Tensor>&, bool, double, Mask wanted) {
  return {like_if(wanted[0], x), wanted[1] ? of(x, {x.size(1)}) : Tensor(),
          wanted[2] ? of(x, {x.size(1)}) : Tensor()};
}

// ---- Losses -------------------------------------------------------------------------------------

Two nll_loss(const Tensor& x, const Tensor& target, const optional<Tensor>&, int64_t reduction,
             c10::SymInt) {
  return {reduction == 0 ? of(x, target.sizes()) : of(x, {}), of(x, {})};
}
Tensor nll_loss_backward(const Tensor&, const Tensor& x, const Tensor&, const optional<Tensor>&,
                         int64_t, c10::SymInt, const Tensor&) {
  return like(x);
}

// ---- Products and sums --------------------------------------------------------------------------

Tensor addmm(const Tensor&, const Tensor& x, const Tensor& w, const at::Scalar&,
             const at::Scalar&) {
  return of(x, {x.size(0), w.size(1)});
}
Tensor mm(const Tensor& x, const Tensor& w) { return of(x, {x.size(0), w.size(1)}); }
Tensor bmm(const Tensor& x, const Tensor& w) { return of(x, {x.size(0), x.size(1), w.size(2)}); }
Tensor sum(const Tensor& x, at::OptionalIntArrayRef dims, bool keep, optional<at::ScalarType>) {
  c10::SmallVector<int64_t, 6> sizes(x.sizes().begin(), x.sizes().end());
  bool all = !dims.has_value() || dims->empty();
  for (int64_t i = (int64_t)sizes.size() - 1; i >= 0; i--) {
    bool gone = all;
    if (!all) {
      for (int64_t d : *dims) gone = gone || d == i || d + x.dim() == i;
    }
    if (gone && keep) sizes[i] = 1;
    if (gone && !keep) sizes.erase(sizes.begin() + i);
  }
  return of(x, sizes);
}

// ---- Convolution, pooling, embedding, attention -------------------------------------------------

Tensor convolution(const Tensor& x, const Tensor& w, const optional<Tensor>&, Ints stride,
                   Ints padding, Ints dilation, bool transposed, Ints more, c10::SymInt groups) {
  c10::SmallVector<int64_t, 5> sizes{
      x.size(0), transposed ? w.size(1) * groups.expect_int() : w.size(0)};
  for (int64_t i = 0; i < x.dim() - 2; i++) {
    auto at = [i](Ints values) { return values[values.size() == 1 ? 0 : i].expect_int(); };
    int64_t n = x.size(i + 2), reach = at(dilation) * (w.size(i + 2) - 1), pad = 2 * at(padding);
    sizes.push_back(transposed ? (n - 1) * at(stride) - pad + reach + at(more) + 1
                               : (n + pad - reach - 1) / at(stride) + 1);
  }
  return of(x, sizes);
}
Three convolution_backward(const Tensor&, const Tensor& x, const Tensor& w,
                           at::OptionalSymIntArrayRef bias, Ints, Ints, Ints, bool, Ints,
                           c10::SymInt, Mask wanted) {
  Tensor b;
  if (wanted[2] && bias.has_value()) b = of(x, {(*bias)[0].expect_int()});
  return {like_if(wanted[0], x), like_if(wanted[1], w), b};
}
Tensor embedding(const Tensor& w, const Tensor& indices, c10::SymInt, bool, bool) {
  c10::SmallVector<int64_t, 5> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(w.size(1));
  return of(w, sizes);
}
Tensor embedding_backward(const Tensor& g, const Tensor&, c10::SymInt rows, c10::SymInt, bool) {
  return of(g, {rows.expect_int(), g.size(-1)});
}
Two attention(const Tensor& q, const Tensor&, const Tensor& v, double, bool,
              const optional<Tensor>&, optional<double>) {
  auto y = of(q, {q.size(0), q.size(2), q.size(1), v.size(3)}).transpose(1, 2);
  return {y, of(q, {q.size(0), q.size(1), q.size(2)})};
}
Three attention_backward(const Tensor&, const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor&, const Tensor&, double, bool, const optional<Tensor>&,
                         optional<double>) {
  return {like(q), like(k), like(v)};
}

// ---- Dropout ------------------------------------------------------------------------------------

Two native_dropout(const Tensor& x, double, optional<bool>) {
  return {like(x), at::empty_like(x, x.options().dtype(at::kBool))};
}
Tensor native_dropout_backward(const Tensor& g, const Tensor&, double) { return like(g); }
Tensor dropout(const Tensor& x, double p, bool train) {
  if (p == 0 || !train || x.numel() == 0) return x;
  return std::get<0>(at::native_dropout(x, p, train));
}

// ---- On and off ---------------------------------------------------------------------------------

std::vector<std::unique_ptr<torch::Library>> registered;

torch::Library& library(c10::DispatchKey key) {
  registered.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "aten",
                                                        std::make_optional(key), __FILE__,
                                                        __LINE__));
  return *registered.back();
}

PyObject* py_on(PyObject*, PyObject*) {
  if (!registered.empty()) Py_RETURN_NONE;
  torch::Library& m = library(c10::DispatchKey::CPU);
  for (const char* name : {"relu", "sigmoid", "tanh", "silu", "mish", "hardswish", "hardsigmoid"}) {
    m.impl(name, one<>);
  }
  for (const char* name : {"sigmoid_backward", "tanh_backward", "silu_backward", "mish_backward",
                           "hardswish_backward", "hardsigmoid_backward"}) {
    m.impl(name, backward<>);
  }
  for (const char* name : {"leaky_relu", "hardshrink", "softshrink"}) m.impl(name, one<S>);
  m.impl("threshold_backward", backward<S>);
  m.impl("leaky_relu_backward", backward<S, bool>);
  m.impl("hardshrink_backward", backward<S>);
  m.impl("softshrink_backward", backward<S>);
  m.impl("threshold", one<S, S>);
  m.impl("hardtanh", one<S, S>);
  m.impl("hardtanh_backward", backward<S, S>);
  m.impl("softplus", one<S, S>);
  m.impl("softplus_backward", backward<S, S>);
  m.impl("elu", one<S, S, S>);
  m.impl("elu_backward", backward_of_elu);
  m.impl("log_sigmoid_forward", log_sigmoid);
  m.impl("log_sigmoid_backward", backward<T>);
  m.impl("gelu", one<c10::string_view>);
  m.impl("gelu_backward", backward<c10::string_view>);
  m.impl("_softmax", one<int64_t, bool>);
  m.impl("_softmax_backward_data", backward<int64_t, at::ScalarType>);
  m.impl("_log_softmax", one<int64_t, bool>);
  m.impl("_log_softmax_backward_data", backward<int64_t, at::ScalarType>);
  m.impl("native_layer_norm", layer_norm);
  m.impl("native_layer_norm_backward", layer_norm_backward);
  m.impl("native_group_norm", group_norm);
  m.impl("native_group_norm_backward", group_norm_backward);
  m.impl("native_batch_norm", batch_norm);
  m.impl("native_batch_norm_backward", batch_norm_backward);
  m.impl("nll_loss_forward", nll_loss);
  m.impl("nll_loss_backward", nll_loss_backward);
  m.impl("addmm", addmm);
  m.impl("mm", mm);
  m.impl("bmm", bmm);
  m.impl("sum.dim_IntList", sum);
  m.impl("convolution", convolution);
  m.impl("convolution_backward", convolution_backward);
  m.impl("embedding", embedding);
  m.impl("embedding_dense_backward", embedding_backward);
  m.impl("_scaled_dot_product_flash_attention_for_cpu", attention);
  m.impl("_scaled_dot_product_flash_attention_for_cpu_backward", attention_backward);
  m.impl("native_dropout", native_dropout);
  m.impl("native_dropout_backward", native_dropout_backward);
  m.impl("dropout", dropout);
  library(c10::DispatchKey::AutogradCPU).impl("dropout", dropout);
  Py_RETURN_NONE;
}

PyObject* py_off(PyObject*, PyObject*) {
  registered.clear();
  Py_RETURN_NONE;
}

// ---- Instructions -------------------------------------------------------------------------------

PyObject* py_counts(PyObject*, PyObject*) {
#if HAS_CALLGRIND
  return PyBool_FromLong(RUNNING_ON_VALGRIND != 0);
#else
  Py_RETURN_FALSE;
#endif
}

PyObject* py_start(PyObject*, PyObject*) {
#if HAS_CALLGRIND
  CALLGRIND_START_INSTRUMENTATION;
#endif
  Py_RETURN_NONE;
}

// count(name, function): calls the function, and writes the instructions under that name.
PyObject* py_count(PyObject*, PyObject* args) {
  const char* name;
  PyObject* function;
  if (!PyArg_ParseTuple(args, "sO", &name, &function)) return nullptr;
#if HAS_CALLGRIND
  CALLGRIND_ZERO_STATS;
#endif
  PyObject* result = PyObject_CallNoArgs(function);
#if HAS_CALLGRIND
  if (result) CALLGRIND_DUMP_STATS_AT(name);
#endif
  return result;
}

PyMethodDef functions[] = {{"on", py_on, METH_NOARGS, nullptr},
                           {"off", py_off, METH_NOARGS, nullptr},
                           {"counts", py_counts, METH_NOARGS, nullptr},
                           {"start", py_start, METH_NOARGS, nullptr},
                           {"count", py_count, METH_VARARGS, nullptr},
                           {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "null", nullptr, -1, functions};

}  // namespace

PyMODINIT_FUNC PyInit_null() { return PyModule_Create(&definition); }
