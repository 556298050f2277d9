// Runs plans (fastnn/_plan.py) without Python: guard, allocations, launches, operators of PyTorch,
// and a node of autograd. It knows nothing of single ops, and decides nothing: fastnn/_native.py
// translates plans into the tuples that `program_of` and `plan_of` read. What differs from the
// recording goes to Python: a call returns UNFIT, a backward calls `slow`. One function is no plan:
// `linear` is that of PyTorch with one node of autograd, for compiled graphs.
//
// It needs no CUDA toolkit: launches go through the address of `cuLaunchKernel` in the driver that
// is loaded, and the current stream comes from a C function of libtorch_cuda.
//
// The interpreter lock: a call holds it, but for its steps if none of them is Python's. A backward
// runs without it, and takes it where it calls Python. Nothing is locked across a launch.

#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided_ops.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Layout.h>
#include <torch/csrc/MemoryFormat.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <dlfcn.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::ForwardADLevel;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

PyObject* unfit = nullptr;  // _plan.UNFIT
PyObject* same = nullptr;   // _plan.same
PyTypeObject* device_mode = nullptr;  // the class of `with torch.device(...)`

// ---- References to Python's objects -------------------------------------------------------------

struct Lock {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Lock() { PyGILState_Release(state); }
};

struct Unlock {
  PyThreadState* state;
  explicit Unlock(bool wanted) : state(wanted ? PyEval_SaveThread() : nullptr) {}
  ~Unlock() {
    if (state) PyEval_RestoreThread(state);
  }
};

// A strong reference. The last owner may be a thread of autograd without the interpreter lock, and
// it may be gone only after the interpreter: then the object is left.
class Ref {
 public:
  Ref() = default;
  static Ref borrowed(PyObject* object) {
    Py_XINCREF(object);
    return Ref(object);
  }
  static Ref stolen(PyObject* object) { return Ref(object); }
  Ref(Ref&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() {
    if (!object_ || !Py_IsInitialized()) return;
    if (PyGILState_Check()) {
      Py_DECREF(object_);
    } else {
      Lock lock;
      Py_DECREF(object_);
    }
  }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  explicit Ref(PyObject* object) : object_(object) {}
  PyObject* object_ = nullptr;
};

[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

Ref checked(PyObject* made) {
  if (!made) throw_python_error();
  return Ref::stolen(made);
}

[[noreturn]] void fail(const std::string& why) { throw std::runtime_error("fastnn: " + why); }

// ---- Reading what _native.py passes -------------------------------------------------------------

PyObject* item(PyObject* tuple, Py_ssize_t i) {
  if (!PyTuple_Check(tuple) || i >= PyTuple_GET_SIZE(tuple)) fail("a tuple was expected");
  return PyTuple_GET_ITEM(tuple, i);
}

Py_ssize_t length(PyObject* tuple) {
  if (!PyTuple_Check(tuple)) fail("a tuple was expected");
  return PyTuple_GET_SIZE(tuple);
}

int64_t integer(PyObject* object) {
  int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw_python_error();
  return value;
}

uint64_t word(PyObject* object) {
  uint64_t value = PyLong_AsUnsignedLongLong(object);
  if (value == (uint64_t)-1 && PyErr_Occurred()) throw_python_error();
  return value;
}

std::string text(PyObject* object) {
  const char* found = PyUnicode_AsUTF8(object);
  if (!found) throw_python_error();
  return found;
}

template <typename T>
std::vector<T> integers(PyObject* tuple) {
  std::vector<T> found;
  for (Py_ssize_t i = 0; i < length(tuple); i++) found.push_back((T)integer(item(tuple, i)));
  return found;
}

// Slots; -1 for None.
std::vector<int> slots_of(PyObject* tuple) {
  std::vector<int> found;
  for (Py_ssize_t i = 0; i < length(tuple); i++) {
    PyObject* slot = item(tuple, i);
    found.push_back(slot == Py_None ? -1 : (int)integer(slot));
  }
  return found;
}

const Tensor& tensor_of(PyObject* object) {
  if (!THPVariable_Check(object)) fail("a tensor was expected");
  return THPVariable_Unpack(object);
}

at::ScalarType dtype_of(PyObject* object) {
  if (!THPDtype_Check(object)) fail("a dtype was expected");
  return reinterpret_cast<THPDtype*>(object)->scalar_type;
}

// ---- The driver ---------------------------------------------------------------------------------

typedef int (*LaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                            unsigned, void*, void**, void**);
struct Driver {
  LaunchKernel launch = nullptr;
  int (*context)(void**) = nullptr;
  int (*device)(int*, int) = nullptr;
  int (*retain)(void**, int) = nullptr;
  int (*enter)(void*) = nullptr;
  int (*error)(int, const char**) = nullptr;
  int (*stream)(int32_t, void**) = nullptr;  // aoti_torch_get_current_cuda_stream
} driver;

void check_driver(int code) {
  if (code == 0) return;
  const char* said = nullptr;
  if (driver.error) driver.error(code, &said);
  throw std::runtime_error(std::string("Triton Error [CUDA]: ") + (said ? said : "unknown"));
}

template <typename F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

// Takes the functions of the libcuda that is loaded, and that of libtorch_cuda (empty: none).
// Returns the name of what is missing, or None.
PyObject* py_driver(PyObject*, PyObject* args) {
  const char *cuda, *torch;
  if (!PyArg_ParseTuple(args, "ss", &cuda, &torch)) return nullptr;
  void* library = dlopen(cuda, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return PyUnicode_FromString(cuda);
  Driver found;
  if (!find(library, "cuLaunchKernel", found.launch) ||
      !find(library, "cuCtxGetCurrent", found.context) ||
      !find(library, "cuCtxSetCurrent", found.enter) ||
      !find(library, "cuDeviceGet", found.device) ||
      !find(library, "cuDevicePrimaryCtxRetain", found.retain) ||
      !find(library, "cuGetErrorString", found.error)) {
    return PyUnicode_FromString("a function of the driver");
  }
  if (*torch) {
    void* of_torch = dlopen(torch, RTLD_LAZY | RTLD_NOLOAD);
    if (!of_torch) return PyUnicode_FromString(torch);
    if (!find(of_torch, "aoti_torch_get_current_cuda_stream", found.stream)) {
      return PyUnicode_FromString("aoti_torch_get_current_cuda_stream");
    }
  }
  driver = found;
  Py_RETURN_NONE;
}

// ---- Programs -----------------------------------------------------------------------------------

struct Argument {
  enum Kind { VALUE, POINTER, DRAWN } kind;
  int slot;        // POINTER: whose address; DRAWN: which number
  uint64_t value;  // POINTER: what is added
};

struct Operand {  // of an operator
  enum Kind { CONSTANT, SLOT, SLOTS } kind;
  c10::IValue constant;
  std::vector<int> slots;
};

struct Step {
  enum Kind { ALLOCATE, LAUNCH, CALL, PYTHON, DRAW } kind;
  // ALLOCATE: sizes, strides, dtype
  std::vector<c10::SymInt> size, stride;
  at::ScalarType dtype = at::ScalarType::Float;
  // LAUNCH
  void* function = nullptr;
  unsigned grid[3] = {1, 1, 1}, threads = 0, shared = 0;
  std::vector<Argument> arguments;
  // CALL
  std::optional<c10::OperatorHandle> op;
  std::vector<Operand> operands;
  // PYTHON: called with the random numbers and the slots it reads. DRAW: called without arguments.
  Ref callable;
  std::vector<int> reads;
  std::vector<int> makes;  // slots, -1 for None
  std::vector<int> ends;   // slots that nobody needs after the step
};

struct Program {
  std::vector<Step> steps;
  std::vector<std::pair<int, Tensor>> lasting;
  std::vector<int> results;
  std::vector<int> saved;
  std::vector<bool> addressed;  // of the given tensors: whether kernels get their addresses
  bool launches = false;  // by the driver
  bool python = false;    // whether a step calls Python
  bool whole = false;     // whether it is a pass of a whole graph
};

struct Drawn {  // the numbers of all draws, one after the other; empty if there was none
  c10::SmallVector<int64_t, 2> numbers;
};

using Slots = c10::SmallVector<Tensor, 24>;

Ref drawn_object(const Drawn& drawn) {
  if (drawn.numbers.empty()) return Ref::borrowed(Py_None);
  Ref all = checked(PyTuple_New((Py_ssize_t)drawn.numbers.size()));
  Py_ssize_t i = 0;
  for (int64_t number : drawn.numbers) {
    PyTuple_SET_ITEM(all.get(), i++, checked(PyLong_FromLongLong(number)).release());
  }
  return all;
}

PyObject* wrapped(const Tensor& t) {  // a new reference
  if (!t.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(t);
}

void run_python(const Step& step, Slots& slots, Drawn& drawn) {
  Lock lock;
  if (step.kind == Step::DRAW) {
    Ref pair = checked(PyObject_CallNoArgs(step.callable.get()));
    for (Py_ssize_t i = 0; i < 2; i++) drawn.numbers.push_back(integer(item(pair.get(), i)));
    return;
  }
  Ref given = checked(PyTuple_New(1 + (Py_ssize_t)step.reads.size()));
  PyTuple_SET_ITEM(given.get(), 0, drawn_object(drawn).release());
  Py_ssize_t i = 1;
  for (int slot : step.reads) {
    PyTuple_SET_ITEM(given.get(), i++, checked(wrapped(slots[slot])).release());
  }
  Ref made = checked(PyObject_CallObject(step.callable.get(), given.get()));
  for (size_t k = 0; k < step.makes.size(); k++) {
    PyObject* result = item(made.get(), (Py_ssize_t)k);
    if (step.makes[k] >= 0) slots[step.makes[k]] = tensor_of(result);
  }
}

void run_call(const Step& step, Slots& slots) {
  torch::jit::Stack stack;
  stack.reserve(step.operands.size());
  for (const Operand& o : step.operands) {
    if (o.kind == Operand::CONSTANT) {
      stack.push_back(o.constant);
    } else if (o.kind == Operand::SLOT) {
      stack.emplace_back(slots[o.slots[0]]);
    } else {
      c10::List<Tensor> list;
      list.reserve(o.slots.size());
      for (int slot : o.slots) list.push_back(slots[slot]);
      stack.emplace_back(std::move(list));
    }
  }
  step.op->callBoxed(&stack);
  size_t k = 0;
  auto take = [&](const Tensor& t) {
    if (k < step.makes.size() && step.makes[k] >= 0) slots[step.makes[k]] = t;
    k++;
  };
  for (const c10::IValue& value : stack) {
    if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) take(t);
    } else if (value.isTensor()) {
      take(value.toTensor());
    } else {  // None, or a number that follows from the sizes
      k++;
    }
  }
  if (k != step.makes.size()) fail("an operator returned another number of tensors");
}

void run_launch(const Step& step, Slots& slots, const Drawn& drawn, void* stream) {
  constexpr size_t MOST = 128;
  uint64_t values[MOST];
  void* addresses[MOST];
  size_t n = step.arguments.size();
  for (size_t i = 0; i < n; i++) {
    const Argument& a = step.arguments[i];
    values[i] = a.value;
    if (a.kind == Argument::POINTER) {
      values[i] += (uint64_t)slots[a.slot].mutable_data_ptr();
    } else if (a.kind == Argument::DRAWN) {
      values[i] = (uint64_t)drawn.numbers[a.slot];
    }
    addresses[i] = &values[i];
  }
  values[n] = values[n + 1] = 0;  // Triton's scratch memory: there is none
  addresses[n] = &values[n];
  addresses[n + 1] = &values[n + 1];
  check_driver(driver.launch(step.function, step.grid[0], step.grid[1], step.grid[2], step.threads,
                             1, 1, step.shared, stream, addresses, nullptr));
}

void run(const Program& program, Slots& slots, Drawn& drawn, c10::Device device) {
  for (auto& [slot, tensor] : program.lasting) slots[slot] = tensor;
  void* stream = nullptr;
  if (program.launches) {
    void* context = nullptr;
    check_driver(driver.context(&context));
    if (!context) {  // a thread that has not used the device yet
      int ordinal = 0;
      check_driver(driver.device(&ordinal, device.has_index() ? device.index() : 0));
      check_driver(driver.retain(&context, ordinal));
      check_driver(driver.enter(context));
    }
    if (!device.is_cpu() && driver.stream(device.index(), &stream) != 0) fail("no current stream");
  }
  c10::DispatchKeySet keys(c10::computeDispatchKey(std::nullopt, std::nullopt, device));
  // What a log heard of a whole graph lies below autograd and autocast.
  std::optional<at::AutoDispatchBelowADInplaceOrView> below;
  std::optional<c10::impl::ExcludeDispatchKeyGuard> uncast;
  if (program.whole) {
    below.emplace();
    uncast.emplace(c10::autocast_dispatch_keyset);
  }
  for (const Step& step : program.steps) {
    switch (step.kind) {
      case Step::ALLOCATE: {
        // PyTorch may fill the memory, and must not count that as a version of the tensor.
        at::AutoDispatchBelowADInplaceOrView below;
        slots[step.makes[0]] = at::_ops::empty_strided::redispatch(
            keys, step.size, step.stride, step.dtype, at::kStrided, device, std::nullopt);
        break;
      }
      case Step::LAUNCH:
        run_launch(step, slots, drawn, stream);
        break;
      case Step::CALL:
        run_call(step, slots);
        break;
      default:
        run_python(step, slots, drawn);
    }
    for (int slot : step.ends) slots[slot].reset();
  }
}

// ---- Guards -------------------------------------------------------------------------------------

struct Meta {
  c10::DispatchKeySet keys;
  at::ScalarType dtype;
  c10::Device device;
  bool grad;
  bool addressed = true;  // whether kernels get its address
  std::vector<int64_t> sizes, strides;

  explicit Meta(const Tensor& t)
      : keys(t.key_set()),
        dtype(t.scalar_type()),
        device(t.device()),
        grad(t.requires_grad()),
        sizes(t.sizes().vec()),
        strides(t.strides().vec()) {}

  bool fits(const Tensor& t) const {
    auto* impl = t.unsafeGetTensorImpl();
    if (impl->key_set() != keys || t.scalar_type() != dtype || impl->device() != device ||
        impl->requires_grad() != grad || impl->sizes() != c10::IntArrayRef(sizes) ||
        impl->strides() != c10::IntArrayRef(strides)) {
      return false;
    }
    if (!addressed) return true;
    auto address = (uintptr_t)t.mutable_data_ptr();
    return address && !(address & 15);
  }
};

// Whether a torch function mode may see calls. That of a device concerns only functions that make
// tensors. The stack of modes keeps them alive, so no lock is needed.
bool mode_sees_calls() {
  if (!at::impl::torch_function_mode_enabled()) return false;
  for (int64_t i = 0; i < at::impl::PythonTorchFunctionTLS::stack_len(); i++) {
    const auto& mode = at::impl::PythonTorchFunctionTLS::get_stack_at(i);
    if (Py_TYPE(mode->ptr(getPyInterpreter())) != device_mode) return true;
  }
  return false;
}

// The state of a thread. What dispatch keys tell: inference mode, functorch, tracing, dispatch
// modes, whether autocast is on.
struct State {
  c10::DispatchKeySet included, excluded;
  bool autocast = false;
  at::ScalarType autocast_dtype = at::ScalarType::Undefined;

  explicit State(c10::DeviceType type, bool autocasts) {
    auto now = c10::impl::tls_local_dispatch_key_set();
    included = now.included_;
    excluded = now.excluded_;
    autocast = autocasts && at::autocast::is_autocast_enabled(type);
    if (autocast) autocast_dtype = at::autocast::get_autocast_dtype(type);
  }

  bool holds(c10::DeviceType type) const {
    auto now = c10::impl::tls_local_dispatch_key_set();
    return now.included_ == included && now.excluded_ == excluded &&
           !mode_sees_calls() && !ForwardADLevel::try_get_by_idx(0) &&
           (!autocast || at::autocast::get_autocast_dtype(type) == autocast_dtype);
  }
};

struct Check {  // a function of Python and what it must return
  Ref callable, value;
};

std::vector<Check> checks_of(PyObject* tuple) {
  std::vector<Check> found;
  for (Py_ssize_t i = 0; i < length(tuple); i++) {
    PyObject* pair = item(tuple, i);
    found.push_back({Ref::borrowed(item(pair, 0)), Ref::borrowed(item(pair, 1))});
  }
  return found;
}

bool hold(const std::vector<Check>& checks) {  // with the interpreter lock
  for (const Check& check : checks) {
    Ref now = checked(PyObject_CallNoArgs(check.callable.get()));
    int equal = PyObject_RichCompareBool(now.get(), check.value.get(), Py_EQ);
    if (equal < 0) throw_python_error();
    if (!equal) return false;
  }
  return true;
}

bool current(c10::Device device) {
  return device.is_cpu() ||
         c10::impl::VirtualGuardImpl(device.type()).getDevice().index() == device.index();
}

struct Backward {
  Program program;
  State state;
  std::vector<Check> checks;
  std::vector<std::optional<Meta>> metas;  // of the gradients, then of what was saved
  c10::Device device;
  int count;  // of slots

  bool fits(const variable_list& grads, const variable_list& saved) const {
    if (grads.size() + saved.size() != metas.size() || !state.holds(device.type()) ||
        !current(device)) {
      return false;
    }
    for (size_t i = 0; i < metas.size(); i++) {
      const Tensor& t = i < grads.size() ? grads[i] : saved[i - grads.size()];
      if (t.defined() != metas[i].has_value() || (t.defined() && !metas[i]->fits(t))) return false;
      for (size_t k = 0; k < i && !program.whole; k++) {  // the same tensor twice
        if (t.defined() && t.is_same(k < grads.size() ? grads[k] : saved[k - grads.size()])) {
          return false;
        }
      }
    }
    if (checks.empty()) return true;
    Lock lock;
    return hold(checks);
  }
};

// What a plan and Python's side of it share. The program is set once, and stays.
struct Holder {
  std::atomic<Backward*> backward{nullptr};
  ~Holder() { delete backward.load(); }
};

struct Output {
  std::vector<int64_t> sizes;
  at::TensorOptions options;
};

// An argument: a leaf, or a tuple or list of which the elements are arguments.
struct Form {
  PyTypeObject* type = nullptr;  // null: a leaf
  std::vector<Form> elements;
};

struct Plan {
  std::string name;
  c10::Device device = at::kCPU;
  std::vector<Form> forms;                  // of the arguments; what follows is of their leaves
  bool nested = false;
  std::vector<Ref> constants;               // empty where a tensor is given
  std::vector<bool> ignored;                // constants that may change
  std::vector<PyTypeObject*> types;         // of the tensors; they exist as long as the process
  std::vector<Meta> metas;
  std::unique_ptr<State> state;
  bool grad_mode = false;
  std::vector<Check> checks;
  Program before, after;
  int count = 0;                            // of slots
  std::vector<int> order;                   // the slots that the node is given
  bool graph = false, saves = false, materialize = true;
  std::vector<int> picked;                  // which results are returned
  bool single = false;                      // whether the one result is returned by itself
  std::vector<bool> differentiable;         // of the results
  std::vector<std::optional<Output>> outputs;
  bool keeps = false;                       // whether nodes keep all inputs for the long way
  std::vector<int> written;                 // inputs whose versions count up after a call
  Ref slow;                                 // (drawn, gradients, saved, kept) -> gradients
  std::shared_ptr<Holder> holder;
};

// ---- The node of autograd -----------------------------------------------------------------------

using NodePtr = c10::intrusive_ptr<Node>;

struct Replayed : Node {
  std::shared_ptr<const Plan> plan;
  c10::SmallVector<SavedVariable, 6> saved;
  Drawn drawn;
  variable_list kept;    // the inputs of a graph, for the long way
  uint64_t version = 0;  // the sum of their versions
  bool freed = false;

  std::string name() const override { return plan->name; }

  void release_variables() override {
    std::lock_guard<std::mutex> guard(mutex_);
    freed = true;
    for (auto& variable : saved) variable.reset_data();
    kept.clear();
  }

  variable_list apply(variable_list&& grads) override {
    if (plan->materialize) {
      for (size_t i = 0; i < grads.size(); i++) {
        if (!grads[i].defined() && plan->outputs[i]) {
          grads[i] = at::zeros(plan->outputs[i]->sizes, plan->outputs[i]->options);
        }
      }
    }
    variable_list given;
    given.reserve(saved.size());
    {
      std::lock_guard<std::mutex> guard(mutex_);
      TORCH_CHECK(!(plan->saves && freed), torch::autograd::ERR_BACKWARD_TWICE);
      for (size_t i = 0; i < saved.size(); i++) {
        given.push_back(plan->after.saved[i] < 0 ? Tensor() : saved[i].unpack(NodePtr::reclaim_copy(this)));
      }
    }
    const Backward* backward = plan->holder->backward.load(std::memory_order_acquire);
    if (!at::GradMode::is_enabled() && backward && backward->fits(grads, given)) {
      if (backward->program.whole && !torch::autograd::get_current_graph_task_keep_graph()) {
        release_variables();  // each tensor goes after its last use
      }
      Slots slots(backward->count);
      int next = 0;
      for (auto* tensors : {&grads, &given}) {
        for (Tensor& t : *tensors) {
          if (t.defined()) slots[next++] = std::move(t);
        }
      }
      Drawn numbers = drawn;
      run(backward->program, slots, numbers, backward->device);
      variable_list results;
      results.reserve(backward->program.results.size());
      for (int slot : backward->program.results) {
        results.push_back(slot < 0 ? Tensor() : slots[slot]);
      }
      return results;
    }
    return in_python(grads, given);
  }

 private:
  variable_list in_python(const variable_list& grads, const variable_list& given) {
    variable_list inputs;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      uint64_t now = 0;
      for (const Tensor& t : kept) now += t._version();
      if (now == version) inputs = kept;
    }
    Lock lock;
    Ref arguments[3];
    int k = 0;
    for (const auto* tensors : {&grads, &given, (const variable_list*)&inputs}) {
      Ref tuple = checked(PyTuple_New((Py_ssize_t)tensors->size()));
      for (size_t i = 0; i < tensors->size(); i++) {
        PyTuple_SET_ITEM(tuple.get(), (Py_ssize_t)i, checked(wrapped((*tensors)[i])).release());
      }
      arguments[k++] = std::move(tuple);
    }
    Ref numbers = drawn_object(drawn);
    Ref made = checked(PyObject_CallFunctionObjArgs(plan->slow.get(), numbers.get(),
                                                    arguments[0].get(), arguments[1].get(),
                                                    arguments[2].get(), nullptr));
    variable_list results;
    for (Py_ssize_t i = 0; i < length(made.get()); i++) {
      PyObject* result = item(made.get(), i);
      results.push_back(result == Py_None ? Tensor() : tensor_of(result));
    }
    return results;
  }
};

void attach(const std::shared_ptr<const Plan>& plan, Slots& slots, const Drawn& drawn) {
  auto made = c10::make_intrusive<Replayed>();
  Replayed* node = made.get();
  NodePtr pointer = std::move(made);
  node->plan = plan;
  node->drawn = drawn;
  torch::autograd::edge_list edges;
  edges.reserve(plan->order.size());
  for (int slot : plan->order) {
    edges.push_back(torch::autograd::impl::gradient_edge(slots[slot]));
  }
  node->set_next_edges(std::move(edges));
  const auto& results = plan->after.results;
  for (size_t i = 0; i < results.size(); i++) {
    if (plan->differentiable[i]) {
      Tensor& out = slots[results[i]];
      auto number = node->add_input_metadata(out);
      torch::autograd::impl::set_gradient_edge(out, {pointer, number});
    } else {
      node->add_input_metadata(Node::undefined_input());
    }
  }
  if (plan->keeps) {
    for (int slot : plan->order) {
      node->kept.push_back(slots[slot]);
      node->version += slots[slot]._version();
    }
  }
  node->saved.reserve(plan->after.saved.size());
  for (int slot : plan->after.saved) {
    if (slot < 0) {
      node->saved.emplace_back();
    } else {
      const Tensor& t = slots[slot];
      const auto& function = t.grad_fn();
      node->saved.emplace_back(t, function && function.get() == (Node*)node);
    }
  }
}

// ---- A call -------------------------------------------------------------------------------------

struct PlanObject {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  std::shared_ptr<const Plan> plan;
};

// Whether an argument equals a constant: what `_plan.same` says, which is asked if need be.
bool equals(PyObject* value, PyObject* constant) {
  if (value == constant) return !PyList_Check(value);
  if (constant == Py_None || PyBool_Check(constant)) return false;
  if (Py_TYPE(value) != Py_TYPE(constant)) return false;
  if (PyFloat_CheckExact(value)) {
    double a = PyFloat_AS_DOUBLE(value), b = PyFloat_AS_DOUBLE(constant);
    return a == b && std::signbit(a) == std::signbit(b);
  }
  if (PyLong_CheckExact(value) || PyUnicode_CheckExact(value)) {
    int equal = PyObject_RichCompareBool(value, constant, Py_EQ);
    if (equal < 0) throw_python_error();
    return equal;
  }
  if (PyTuple_CheckExact(value)) {
    Py_ssize_t n = PyTuple_GET_SIZE(value);
    if (n != PyTuple_GET_SIZE(constant)) return false;
    for (Py_ssize_t i = 0; i < n; i++) {
      if (!equals(PyTuple_GET_ITEM(value, i), PyTuple_GET_ITEM(constant, i))) return false;
    }
    return true;
  }
  Ref answer = checked(PyObject_CallFunctionObjArgs(same, value, constant, nullptr));
  return answer.get() == Py_True;
}

using Leaves = c10::SmallVector<PyObject*, 24>;

// Adds the leaves of an argument. False if it has another form.
bool take(const Form& form, PyObject* value, Leaves& leaves) {
  if (!form.type) {
    leaves.push_back(value);
    return true;
  }
  if (Py_TYPE(value) != form.type) return false;
  bool is_list = form.type == &PyList_Type;
  auto n = (size_t)(is_list ? PyList_GET_SIZE(value) : PyTuple_GET_SIZE(value));
  if (n != form.elements.size()) return false;
  for (size_t i = 0; i < n; i++) {
    PyObject* element = is_list ? PyList_GET_ITEM(value, i) : PyTuple_GET_ITEM(value, i);
    if (!take(form.elements[i], element, leaves)) return false;
  }
  return true;
}

using Given = c10::SmallVector<const Tensor*, 64>;

bool fits(const Plan& plan, PyObject* const* args, Given& given) {
  if (at::GradMode::is_enabled() != plan.grad_mode || !plan.state->holds(plan.device.type()) ||
      !current(plan.device)) {
    return false;
  }
  for (size_t i = 0; i < plan.constants.size(); i++) {
    if (plan.constants[i]) {
      if (!plan.ignored[i] && !equals(args[i], plan.constants[i].get())) return false;
      continue;
    }
    size_t m = given.size();
    if (Py_TYPE(args[i]) != plan.types[m]) return false;
    const Tensor& t = THPVariable_Unpack(args[i]);
    if (!plan.metas[m].fits(t)) return false;
    for (size_t k = 0; k < m && !plan.after.whole; k++) {
      if (given[k]->is_same(t)) return false;
    }
    given.push_back(&t);
  }
  return hold(plan.checks);
}

// What a call with these arguments returns, or UNFIT.
PyObject* attempt(const std::shared_ptr<const Plan>& plan, PyObject* const* args, size_t n) {
  try {
    Given given;
    Leaves leaves;
    bool formed = true;
    if (plan->nested) {
      for (size_t i = 0; i < n && formed; i++) formed = take(plan->forms[i], args[i], leaves);
      args = leaves.data();
    }
    if (!formed || !fits(*plan, args, given)) return Py_NewRef(unfit);
    Slots slots(plan->count);
    for (size_t i = 0; i < plan->metas.size(); i++) slots[i] = *given[i];
    {
      Unlock unlock(!plan->before.python && !plan->after.python);
      Drawn drawn;
      if (!plan->before.steps.empty()) run(plan->before, slots, drawn, plan->device);
      if (plan->graph) {
        {
          // Of a whole graph, some operators ask whether gradients may be wanted.
          at::AutoGradMode mode(plan->after.whole);
          run(plan->after, slots, drawn, plan->device);
        }
        attach(plan, slots, drawn);
        for (int i : plan->written) slots[i].unsafeGetTensorImpl()->bump_version();
      } else {
        run(plan->after, slots, drawn, plan->device);
        for (int i : plan->written) slots[i].unsafeGetTensorImpl()->bump_version();
      }
    }
    const auto& results = plan->after.results;
    const auto& picked = plan->picked;
    if (plan->single) return wrapped(slots[results[picked[0]]]);
    Ref all = checked(PyTuple_New((Py_ssize_t)picked.size()));
    for (size_t i = 0; i < picked.size(); i++) {
      int slot = results[picked[i]];
      PyObject* out = slot < 0 ? Py_NewRef(Py_None) : wrapped(slots[slot]);
      PyTuple_SET_ITEM(all.get(), (Py_ssize_t)i, checked(out).release());
    }
    return all.release();
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

PyObject* call(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  std::shared_ptr<const Plan> plan = ((PlanObject*)self)->plan;
  size_t n = (size_t)PyVectorcall_NARGS(flags);
  if (names || n != plan->forms.size()) {
    PyErr_SetString(PyExc_TypeError, "a plan takes all arguments, by position");
    return nullptr;
  }
  return attempt(plan, args, n);
}

// ---- The plans of an op -------------------------------------------------------------------------

// Plans by the shape of one argument. A call looks for its plan here without Python's help: mode,
// shape, and all that the guard asks.
struct Entry {
  Ref mode;
  PyObject* made;  // the plan's object, for its removal; `Plans` of _record.py holds it
  std::shared_ptr<const Plan> plan;
};
using Bucket = std::vector<std::shared_ptr<const Entry>>;

struct TableObject {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  size_t key;  // the argument by whose shape plans are found
  size_t count;  // of arguments
  Ref context;  // the variable with the mode of a context
  // Buckets are replaced, not changed: a guard may run Python's code, which may add a plan.
  std::unordered_map<uint64_t, std::shared_ptr<const Bucket>> buckets;
};

uint64_t hashed(c10::IntArrayRef sizes, bool grad_mode) {
  uint64_t found = grad_mode ? 0x9e3779b97f4a7c15 : 0x51ed270b0a1c3d21;
  for (int64_t n : sizes) found = (found ^ (uint64_t)n) * 0x100000001b3 + 0x632be59bd9b4e019;
  return found;
}

bool is_mode(PyObject* mode, PyObject* other) {
  return mode == other || (PyUnicode_CheckExact(mode) && PyUnicode_CheckExact(other) &&
                           PyUnicode_Compare(mode, other) == 0);
}

// table(mode, *arguments) -> what the call returns, or UNFIT. mode: the one in force in every
// thread, if a context has no other.
PyObject* find_and_call(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  auto* table = (TableObject*)self;
  auto n = (size_t)PyVectorcall_NARGS(flags);
  if (names || n != table->count + 1) {
    PyErr_SetString(PyExc_TypeError, "a mode and all arguments are expected, by position");
    return nullptr;
  }
  PyObject* mode = args[0];
  PyObject* value = args[1 + table->key];
  if (!THPVariable_CheckExact(value)) return Py_NewRef(unfit);
  auto found = table->buckets.find(
      hashed(THPVariable_Unpack(value).unsafeGetTensorImpl()->sizes(), at::GradMode::is_enabled()));
  if (found == table->buckets.end()) return Py_NewRef(unfit);
  PyObject* here = nullptr;
  if (PyContextVar_Get(table->context.get(), nullptr, &here) < 0) return nullptr;
  Ref held = Ref::stolen(here);
  if (here && here != Py_None && !is_mode(here, mode)) return Py_NewRef(unfit);
  std::shared_ptr<const Bucket> bucket = found->second;
  for (const auto& entry : *bucket) {
    if (!is_mode(entry->mode.get(), mode)) continue;
    PyObject* result = attempt(entry->plan, args + 1, n - 1);
    if (result != unfit) return result;
    Py_DECREF(result);
  }
  return Py_NewRef(unfit);
}

// ---- A linear of PyTorch in one node -------------------------------------------------------------

// What `linear` computes, with the gradients of its addmm. PyTorch has four nodes: two views, a
// transposition and the addmm. To the engine of autograd each node costs as much as what it computes
// costs the host.
struct Linear : Node {
  SavedVariable x, weight;
  bool freed = false;

  std::string name() const override { return "LinearBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> guard(mutex_);
    freed = true;
    x.reset_data();
    weight.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    Tensor in, w;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      TORCH_CHECK(!freed, torch::autograd::ERR_BACKWARD_TWICE);
      in = x.unpack();
      w = weight.unpack();
    }
    variable_list found(3);
    if (!grads[0].defined()) return found;
    // With a graph of the backward, or where somebody watches, each operator is PyTorch's own call.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled() && nobody_watches() && is_plain(grads[0])) below.emplace();
    const Tensor& given = grads[0];
    Tensor dy = given.dim() == 2 ? given : given.reshape({-1, given.size(-1)});
    if (task_should_compute_output(0)) {
      found[0] = dy.mm(w);
      if (given.dim() != 2) {
        auto sizes = given.sizes().vec();
        sizes.back() = w.size(1);
        found[0] = found[0].view(sizes);
      }
    }
    if (task_should_compute_output(1)) {
      found[1] = dy.t().mm(in.dim() == 2 ? in : in.reshape({-1, in.size(-1)}));
    }
    if (task_should_compute_output(2)) found[2] = dy.sum(0);
    return found;
  }

  // Whether no mode sees what this thread calls, and autocast is off.
  static bool nobody_watches() {
    auto now = c10::impl::tls_local_dispatch_key_set();
    return now.included_ == c10::default_included_set && now.excluded_ == c10::default_excluded_set &&
           !mode_sees_calls() && !ForwardADLevel::try_get_by_idx(0);
  }

  static bool is_plain(const Tensor& t) {
    auto kind = t.device().type();
    if (t.layout() != at::kStrided || (kind != at::kCPU && kind != at::kCUDA)) return false;
    auto of = kind == at::kCPU ? c10::BackendComponent::CPUBit : c10::BackendComponent::CUDABit;
    c10::DispatchKeySet keys(c10::computeDispatchKey(std::nullopt, std::nullopt, t.device()));
    return t.key_set() == (keys | c10::getAutocastRelatedKeySetFromBackend(of) |
                           c10::getAutogradRelatedKeySetFromBackend(of));
  }

  static bool takes(const Tensor& t) {
    return is_plain(t) && t.is_floating_point() && t.is_contiguous() && t.numel() > 0;
  }

  static bool fits(const Tensor& x, const Tensor& w, const Tensor& b) {
    if (!at::GradMode::is_enabled() || !nobody_watches() || !takes(x) || !takes(w)) return false;
    auto dtype = x.scalar_type();
    if (x.dim() < 2 || w.dim() != 2 || x.size(-1) != w.size(1) || w.size(1) == 1) return false;
    if (w.scalar_type() != dtype || w.device() != x.device()) return false;
    bool graph = x.requires_grad() || w.requires_grad();
    if (b.defined()) {
      graph = graph || b.requires_grad();
      if (!takes(b) || b.dim() != 1 || b.size(0) != w.size(0) || b.scalar_type() != dtype ||
          b.device() != x.device()) {
        return false;
      }
    }
    return graph;
  }
};

PyObject* stock_linear = nullptr;

// linear(input, weight, bias or None): what `torch.nn.functional.linear` returns.
PyObject* py_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    if (count == 3 && THPVariable_CheckExact(args[0]) && THPVariable_CheckExact(args[1]) &&
        (args[2] == Py_None || THPVariable_CheckExact(args[2]))) {
      Tensor x = THPVariable_Unpack(args[0]), w = THPVariable_Unpack(args[1]), b;
      if (args[2] != Py_None) b = THPVariable_Unpack(args[2]);
      if (Linear::fits(x, w, b)) {
        Tensor y;
        {
          Unlock unlock(true);
          auto made = c10::make_intrusive<Linear>();
          Linear* node = made.get();
          NodePtr pointer = std::move(made);
          torch::autograd::edge_list edges;
          for (const Tensor* t : {&x, &w, &b}) {
            edges.push_back(t->defined() ? torch::autograd::impl::gradient_edge(*t)
                                         : torch::autograd::Edge());
          }
          node->set_next_edges(std::move(edges));
          {
            at::AutoDispatchBelowADInplaceOrView below;
            y = b.defined() ? at::linear(x, w, b) : at::linear(x, w);
          }
          auto number = node->add_input_metadata(y);
          torch::autograd::impl::set_gradient_edge(y, {pointer, number});
          if (w.requires_grad()) node->x = SavedVariable(x, false);
          if (x.requires_grad()) node->weight = SavedVariable(w, false);
        }
        return THPVariable_Wrap(std::move(y));
      }
    }
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
  return PyObject_Vectorcall(stock_linear, args, (size_t)count, nullptr);
}

// ---- Making plans -------------------------------------------------------------------------------

struct NotOurs {};  // an argument of an operator that only Python can convert

c10::IValue constant_of(PyObject* value, const c10::TypePtr& type) {
  if (value == Py_None) {
    if (type->kind() == c10::TypeKind::OptionalType || type->kind() == c10::TypeKind::NoneType) {
      return {};
    }
    throw NotOurs();
  }
  if (auto optional = type->cast<c10::OptionalType>()) {
    return constant_of(value, optional->getElementType());
  }
  switch (type->kind()) {
    case c10::TypeKind::BoolType:
      if (PyBool_Check(value)) return value == Py_True;
      break;
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
    case c10::TypeKind::ScalarTypeType:
    case c10::TypeKind::LayoutType:
    case c10::TypeKind::MemoryFormatType:
      if (PyLong_CheckExact(value)) return (int64_t)integer(value);
      if (THPDtype_Check(value)) return (int64_t)dtype_of(value);
      if (THPLayout_Check(value)) return (int64_t)((THPLayout*)value)->layout;
      if (THPMemoryFormat_Check(value)) return (int64_t)((THPMemoryFormat*)value)->memory_format;
      break;
    case c10::TypeKind::FloatType:
      if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
      if (PyLong_CheckExact(value)) return (double)integer(value);
      break;
    case c10::TypeKind::NumberType:
      if (PyBool_Check(value)) return value == Py_True;
      if (PyLong_CheckExact(value)) return (int64_t)integer(value);
      if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
      break;
    case c10::TypeKind::StringType:
      if (PyUnicode_CheckExact(value)) {
        return text(value);
      }
      break;
    case c10::TypeKind::DeviceObjType:
      if (THPDevice_Check(value)) return ((THPDevice*)value)->device;
      break;
    case c10::TypeKind::ListType: {
      auto element = type->expect<c10::ListType>()->getElementType();
      bool is_list = PyList_Check(value), is_tuple = PyTuple_Check(value);
      if (!is_list && !is_tuple) break;
      Py_ssize_t n = PySequence_Size(value);
      auto at = [&](Py_ssize_t i) {
        return is_list ? PyList_GET_ITEM(value, i) : PyTuple_GET_ITEM(value, i);
      };
      auto kind = element->kind();
      if (kind == c10::TypeKind::IntType || kind == c10::TypeKind::SymIntType) {
        c10::List<int64_t> list;
        for (Py_ssize_t i = 0; i < n; i++) {
          if (!PyLong_CheckExact(at(i))) throw NotOurs();
          list.push_back(integer(at(i)));
        }
        return list;
      }
      if (kind == c10::TypeKind::BoolType) {
        c10::List<bool> list;
        for (Py_ssize_t i = 0; i < n; i++) {
          if (!PyBool_Check(at(i))) throw NotOurs();
          list.push_back(at(i) == Py_True);
        }
        return list;
      }
      if (kind == c10::TypeKind::FloatType) {
        c10::List<double> list;
        for (Py_ssize_t i = 0; i < n; i++) {
          if (!PyFloat_CheckExact(at(i))) throw NotOurs();
          list.push_back(PyFloat_AS_DOUBLE(at(i)));
        }
        return list;
      }
      break;
    }
    default:
      break;
  }
  throw NotOurs();
}

// An operand is ("slot", n), ("slots", (n, ...)) or ("value", value).
Operand operand_of(PyObject* pair, const c10::TypePtr& type) {
  std::string kind = text(item(pair, 0));
  PyObject* value = item(pair, 1);
  auto inner = type;
  if (auto optional = type->cast<c10::OptionalType>()) inner = optional->getElementType();
  if (kind == "slot") {
    if (inner->kind() != c10::TypeKind::TensorType) throw NotOurs();
    return {Operand::SLOT, {}, {(int)integer(value)}};
  }
  if (kind == "slots") {
    auto list = inner->cast<c10::ListType>();
    if (!list || list->getElementType()->kind() != c10::TypeKind::TensorType) throw NotOurs();
    return {Operand::SLOTS, {}, integers<int>(value)};
  }
  return {Operand::CONSTANT, constant_of(value, type), {}};
}

// (name, overload, positional operands, {name: operand})
void read_call(Step& step, PyObject* spec) {
  std::string name = text(item(spec, 0)), overload = text(item(spec, 1));
  auto found = c10::Dispatcher::singleton().findSchema({name, overload});
  if (!found) throw NotOurs();
  PyObject *given = item(spec, 2), *named = item(spec, 3);
  Py_ssize_t taken = 0;
  const auto& arguments = found->schema().arguments();
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& argument = arguments[i];
    PyObject* pair = nullptr;
    if (!argument.kwarg_only() && (Py_ssize_t)i < length(given)) {
      pair = item(given, (Py_ssize_t)i);
    } else if ((pair = PyDict_GetItemString(named, argument.name().c_str()))) {
      taken++;
    }
    if (pair) {
      step.operands.push_back(operand_of(pair, argument.real_type()));
    } else if (argument.default_value()) {
      step.operands.push_back({Operand::CONSTANT, *argument.default_value(), {}});
    } else {
      throw NotOurs();
    }
  }
  if (taken != PyDict_Size(named) || (size_t)length(given) > arguments.size()) throw NotOurs();
  step.op = *found;
}

// A step is one of
//   ("allocate", slot, size, stride, dtype)
//   ("launch", function, grid, threads, shared bytes, ((kind, slot, value), ...), what it keeps)
//   ("call", name, overload, operands, named operands, slots made)
//   ("python", callable, slots read, slots made)
//   ("draw", callable)
Step step_of(PyObject* spec, Program& program) {
  Step step;
  std::string kind = text(item(spec, 0));
  if (kind == "allocate") {
    step.kind = Step::ALLOCATE;
    step.makes = {(int)integer(item(spec, 1))};
    for (int64_t n : integers<int64_t>(item(spec, 2))) step.size.emplace_back(n);
    for (int64_t n : integers<int64_t>(item(spec, 3))) step.stride.emplace_back(n);
    step.dtype = dtype_of(item(spec, 4));
  } else if (kind == "launch") {
    step.kind = Step::LAUNCH;
    program.launches = true;
    if (!driver.launch) fail("there is no driver");
    step.function = (void*)word(item(spec, 1));
    auto grid = integers<unsigned>(item(spec, 2));
    for (size_t i = 0; i < 3; i++) step.grid[i] = grid.at(i);
    step.threads = (unsigned)integer(item(spec, 3));
    step.shared = (unsigned)integer(item(spec, 4));
    step.callable = Ref::borrowed(item(spec, 6));  // the compiled kernel, which owns the function
    PyObject* arguments = item(spec, 5);
    if (length(arguments) > 120) fail("a kernel has too many arguments");
    for (Py_ssize_t i = 0; i < length(arguments); i++) {
      PyObject* a = item(arguments, i);
      step.arguments.push_back({(Argument::Kind)integer(item(a, 0)), (int)integer(item(a, 1)),
                                word(item(a, 2))});
    }
  } else if (kind == "call") {
    step.kind = Step::CALL;
    Ref rest = checked(PyTuple_GetSlice(spec, 1, 5));
    read_call(step, rest.get());
    step.makes = slots_of(item(spec, 5));
  } else if (kind == "python") {
    step.kind = Step::PYTHON;
    program.python = true;
    step.callable = Ref::borrowed(item(spec, 1));
    step.reads = integers<int>(item(spec, 2));
    step.makes = slots_of(item(spec, 3));
  } else if (kind == "draw") {
    step.kind = Step::DRAW;
    program.python = true;
    step.callable = Ref::borrowed(item(spec, 1));
  } else {
    fail("an unknown step");
  }
  return step;
}

// (steps, ((slot, tensor), ...), results, saved), and for a whole graph two more: the slots that end
// with each step, and whether kernels get the addresses of the given tensors
Program program_of(PyObject* spec) {
  Program program;
  PyObject* steps = item(spec, 0);
  for (Py_ssize_t i = 0; i < length(steps); i++) {
    program.steps.push_back(step_of(item(steps, i), program));
  }
  PyObject* lasting = item(spec, 1);
  for (Py_ssize_t i = 0; i < length(lasting); i++) {
    PyObject* pair = item(lasting, i);
    program.lasting.emplace_back((int)integer(item(pair, 0)), tensor_of(item(pair, 1)));
  }
  program.results = slots_of(item(spec, 2));
  program.saved = slots_of(item(spec, 3));
  if (length(spec) > 4) {
    program.whole = true;
    for (size_t i = 0; i < program.steps.size(); i++) {
      program.steps[i].ends = integers<int>(item(item(spec, 4), (Py_ssize_t)i));
    }
    for (int addressed : integers<int>(item(spec, 5))) program.addressed.push_back(addressed);
  }
  return program;
}

PyObject* none_or_error() {
  try {
    throw;
  } catch (const NotOurs&) {
    PyErr_SetString(PyExc_NotImplementedError, "an argument of an operator");
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

struct HolderObject {
  PyObject_HEAD
  std::shared_ptr<Holder> holder;
};

template <typename T, typename M>
void destroy(PyObject* self, M T::*member) {
  (((T*)self)->*member).~M();
  Py_TYPE(self)->tp_free(self);
}

void plan_dealloc(PyObject* self) { destroy(self, &PlanObject::plan); }
void holder_dealloc(PyObject* self) { destroy(self, &HolderObject::holder); }

void table_dealloc(PyObject* self) {
  auto* table = (TableObject*)self;
  table->context.~Ref();
  destroy(self, &TableObject::buckets);
}

PyTypeObject TableType = {PyVarObject_HEAD_INIT(nullptr, 0)};
PyTypeObject PlanType = {PyVarObject_HEAD_INIT(nullptr, 0)};
PyTypeObject HolderType = {PyVarObject_HEAD_INIT(nullptr, 0)};

PyObject* field(PyObject* spec, const char* name) {
  PyObject* value = PyDict_GetItemString(spec, name);
  if (!value) fail(std::string("no field ") + name);
  return value;
}

// A form is None, or (tuple or list, (form, ...)).
Form form_of(PyObject* spec) {
  Form form;
  if (spec == Py_None) return form;
  form.type = (PyTypeObject*)item(spec, 0);
  if (form.type != &PyTuple_Type && form.type != &PyList_Type) fail("a form of another type");
  PyObject* elements = item(spec, 1);
  for (Py_ssize_t i = 0; i < length(elements); i++) {
    form.elements.push_back(form_of(item(elements, i)));
  }
  return form;
}

// plan(spec) -> (the plan, its holder)
PyObject* py_plan(PyObject*, PyObject* spec) {
  try {
    auto plan = std::make_shared<Plan>();
    plan->name = text(field(spec, "name"));
    PyObject* forms = field(spec, "forms");
    for (Py_ssize_t i = 0; i < length(forms); i++) {
      plan->forms.push_back(form_of(item(forms, i)));
      plan->nested = plan->nested || plan->forms.back().type;
    }
    PyObject *values = field(spec, "values"), *ignored = field(spec, "ignored");
    for (Py_ssize_t i = 0; i < length(values); i++) {
      PyObject* value = item(values, i);
      plan->ignored.push_back(item(ignored, i) == Py_True);
      if (THPVariable_Check(value)) {
        plan->constants.emplace_back();
        plan->types.push_back(Py_TYPE(value));
        plan->metas.emplace_back(tensor_of(value));
      } else {
        plan->constants.push_back(Ref::borrowed(value));
      }
    }
    if (plan->metas.empty()) throw NotOurs();
    plan->device = plan->metas[0].device;
    plan->state = std::make_unique<State>(plan->device.type(), true);
    plan->grad_mode = at::GradMode::is_enabled();
    plan->checks = checks_of(field(spec, "checks"));
    plan->before = program_of(field(spec, "before"));
    plan->after = program_of(field(spec, "after"));
    if (!plan->after.whole && plan->metas.size() > 60) throw NotOurs();
    for (size_t i = 0; i < plan->after.addressed.size(); i++) {
      plan->metas.at(i).addressed = plan->after.addressed[i];
    }
    plan->keeps = field(spec, "keeps") == Py_True;
    plan->written = integers<int>(field(spec, "written"));
    plan->count = (int)integer(field(spec, "count"));
    plan->order = slots_of(field(spec, "order"));
    plan->graph = field(spec, "graph") == Py_True;
    plan->saves = field(spec, "saves") == Py_True;
    plan->materialize = field(spec, "materialize") == Py_True;
    plan->single = field(spec, "single") == Py_True;
    PyObject* picked = field(spec, "picked");
    if (picked != Py_None) {
      plan->picked = integers<int>(picked);
    } else {
      for (size_t i = 0; i < plan->after.results.size(); i++) plan->picked.push_back((int)i);
    }
    PyObject *outputs = field(spec, "outputs"), *constant = field(spec, "constant");
    for (Py_ssize_t i = 0; i < length(outputs); i++) {
      PyObject* out = item(outputs, i);
      if (out == Py_None) {
        plan->outputs.emplace_back();
        plan->differentiable.push_back(false);
      } else {
        const Tensor& t = tensor_of(out);
        plan->outputs.push_back(Output{t.sizes().vec(), t.options()});
        plan->differentiable.push_back(item(constant, i) != Py_True &&
                                       torch::autograd::isDifferentiableType(t.scalar_type()));
      }
    }
    plan->slow = Ref::borrowed(field(spec, "slow"));
    plan->holder = std::make_shared<Holder>();
    auto* made = (PlanObject*)PlanType.tp_alloc(&PlanType, 0);
    if (!made) return nullptr;
    Ref plan_object = Ref::stolen((PyObject*)made);
    made->vectorcall = call;
    new (&made->plan) std::shared_ptr<const Plan>(plan);
    auto* kept = (HolderObject*)HolderType.tp_alloc(&HolderType, 0);
    if (!kept) return nullptr;
    Ref holder_object = Ref::stolen((PyObject*)kept);
    new (&kept->holder) std::shared_ptr<Holder>(plan->holder);
    return PyTuple_Pack(2, plan_object.get(), holder_object.get());
  } catch (...) {
    return none_or_error();
  }
}

// holder.set(program, (gradient or saved tensor or None, ...), checks, count, device)
PyObject* holder_set(PyObject* self, PyObject* args) {
  try {
    Program program = program_of(item(args, 0));
    PyObject* values = item(args, 1);
    std::vector<std::optional<Meta>> metas;
    std::optional<c10::Device> device;
    for (Py_ssize_t i = 0; i < length(values); i++) {
      PyObject* value = item(values, i);
      metas.emplace_back();
      if (value != Py_None) {
        metas.back().emplace(tensor_of(value));
        if (!device) device = metas.back()->device;
      }
    }
    if (!device) throw NotOurs();
    bool whole = program.whole;
    size_t next = 0;
    for (auto& meta : metas) {
      if (meta && next < program.addressed.size()) meta->addressed = program.addressed[next++];
    }
    auto made = std::unique_ptr<Backward>(
        new Backward{std::move(program), State(device->type(), whole), checks_of(item(args, 2)),
                     std::move(metas), *device, (int)integer(item(args, 3))});
    auto& holder = ((HolderObject*)self)->holder;
    Backward* expected = nullptr;
    if (holder->backward.compare_exchange_strong(expected, made.get())) (void)made.release();
    Py_RETURN_NONE;
  } catch (...) {
    return none_or_error();
  }
}

// plan.table(position of the argument by whose shape plans are found, number of arguments, context
// variable)
PyObject* py_table(PyObject*, PyObject* args) {
  Py_ssize_t key, count;
  PyObject* context;
  if (!PyArg_ParseTuple(args, "nnO", &key, &count, &context)) return nullptr;
  auto* table = (TableObject*)TableType.tp_alloc(&TableType, 0);
  if (!table) return nullptr;
  table->vectorcall = find_and_call;
  table->key = (size_t)key;
  table->count = (size_t)count;
  new (&table->context) Ref(Ref::borrowed(context));
  new (&table->buckets) decltype(table->buckets)();
  return (PyObject*)table;
}

// table.add(mode, shape, plan)
PyObject* table_add(PyObject* self, PyObject* args) {
  try {
    auto* table = (TableObject*)self;
    PyObject *mode, *shape, *made;
    if (!PyArg_ParseTuple(args, "OOO", &mode, &shape, &made)) return nullptr;
    if (Py_TYPE(made) != &PlanType) fail("a plan was expected");
    const auto& plan = ((PlanObject*)made)->plan;
    if (plan->forms.size() != table->count) fail("a plan of another op");
    auto entry = std::make_shared<Entry>(Entry{Ref::borrowed(mode), made, plan});
    auto& bucket = table->buckets[hashed(integers<int64_t>(shape), plan->grad_mode)];
    auto more = bucket ? std::make_shared<Bucket>(*bucket) : std::make_shared<Bucket>();
    more->push_back(std::move(entry));
    bucket = std::move(more);
    Py_RETURN_NONE;
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

// table.remove(plan)
PyObject* table_remove(PyObject* self, PyObject* made) {
  auto* table = (TableObject*)self;
  for (auto& [hash, bucket] : table->buckets) {
    for (size_t i = 0; i < bucket->size(); i++) {
      if ((*bucket)[i]->made != made) continue;
      auto fewer = std::make_shared<Bucket>(*bucket);
      fewer->erase(fewer->begin() + (std::ptrdiff_t)i);
      std::shared_ptr<const Bucket> before = std::move(bucket);  // its plan goes after the change
      bucket = std::move(fewer);
      Py_RETURN_NONE;
    }
  }
  Py_RETURN_NONE;
}

// table.clear()
PyObject* table_clear(PyObject* self, PyObject*) {
  auto* table = (TableObject*)self;
  decltype(table->buckets) before;
  std::swap(before, table->buckets);
  Py_RETURN_NONE;
}

// setup(UNFIT, same, the class of `with torch.device(...)`, torch.nn.functional.linear)
PyObject* py_setup(PyObject*, PyObject* args) {
  if (!PyArg_ParseTuple(args, "OOO!O", &unfit, &same, &PyType_Type, &device_mode, &stock_linear)) {
    return nullptr;
  }
  Py_INCREF(unfit);
  Py_INCREF(stock_linear);
  Py_INCREF(same);
  Py_INCREF(device_mode);
  Py_RETURN_NONE;
}

PyMethodDef holder_methods[] = {{"set", holder_set, METH_VARARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
PyMethodDef table_methods[] = {{"add", table_add, METH_VARARGS, nullptr},
                               {"remove", table_remove, METH_O, nullptr},
                               {"clear", table_clear, METH_NOARGS, nullptr},
                               {nullptr, nullptr, 0, nullptr}};
PyMethodDef plan_methods[] = {{"table", py_table, METH_VARARGS, nullptr},
                              {nullptr, nullptr, 0, nullptr}};
PyMethodDef functions[] = {{"setup", py_setup, METH_VARARGS, nullptr},
                           {"driver", py_driver, METH_VARARGS, nullptr},
                           {"plan", py_plan, METH_O, nullptr},
                           {"linear", (PyCFunction)(void (*)(void))py_linear, METH_FASTCALL, nullptr},
                           {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "runner", nullptr, -1, functions};

template <typename Object>
void callable(PyTypeObject& type) {
  type.tp_flags = Py_TPFLAGS_HAVE_VECTORCALL;
  type.tp_vectorcall_offset = offsetof(Object, vectorcall);
  type.tp_call = PyVectorcall_Call;
}

template <typename Object>
bool define(PyTypeObject& type, const char* name, destructor dealloc, PyMethodDef* methods) {
  type.tp_name = name;
  type.tp_basicsize = sizeof(Object);
  type.tp_flags |= Py_TPFLAGS_DEFAULT;
  type.tp_dealloc = dealloc;
  type.tp_methods = methods;
  return PyType_Ready(&type) == 0;
}

}  // namespace

PyMODINIT_FUNC PyInit_runner() {
  callable<PlanObject>(PlanType);
  callable<TableObject>(TableType);
  bool ready =
      define<PlanObject>(PlanType, "fastnn.native.Plan", plan_dealloc, plan_methods) &&
      define<TableObject>(TableType, "fastnn.native.Table", table_dealloc, table_methods) &&
      define<HolderObject>(HolderType, "fastnn.native.Holder", holder_dealloc, holder_methods);
  if (!ready) return nullptr;
  return PyModule_Create(&definition);
}
