"""Arrays of every framework, in and out without a copy; streams; overlap; and the errors that bad input raises."""

import contextlib
import ctypes
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import types
import warnings
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cusru import dlpack

CPU = ("cpu", 0)
FLOATS = ["float64", "float32", "float16", "bfloat16"]
DTYPES = [*FLOATS, "bool", "uint8"]


def need(module, extra):
    return pytest.importorskip(module, reason=f'needs {module}: pip install "cusru[{extra}]"')


# ---- fake producers ---------------------------------------------------------------------------------------------------

_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))


class Producer:
    """An object of no framework that exports hand-made capsules and counts the calls of their deleter."""

    def __init__(self, memory, *, versioned, device=(1, 0), typecode=(2, 32, 1), strides=None, flags=0, version=(1, 0), offset=0):
        self.memory, self.versioned, self.device, self.typecode = memory, versioned, device, typecode
        self.strides, self.flags, self.version, self.offset = strides, flags, version, offset
        self.deleted = 0
        self.calls = []
        self.capsules = []
        self.kept = []

        def delete(address):
            self.deleted += 1

        self.deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(delete)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **wishes):
        self.calls.append(wishes)
        managed = dlpack._ManagedVersioned() if self.versioned else dlpack._Managed()
        tensor, n = managed.tensor, self.memory.ndim
        tensor.data = self.memory.ctypes.data - self.offset
        tensor.byte_offset = self.offset
        tensor.device_type, tensor.device_id = self.device
        tensor.ndim = n
        tensor.code, tensor.bits, tensor.lanes = self.typecode
        shape = (ctypes.c_int64 * n)(*self.memory.shape)
        tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64)) if n else None
        if self.strides is not None:
            strides = (ctypes.c_int64 * n)(*self.strides)
            tensor.strides = ctypes.cast(strides, ctypes.POINTER(ctypes.c_int64))
            self.kept.append(strides)
        if self.versioned:
            (managed.major, managed.minor), managed.flags = self.version, self.flags
        managed.deleter = ctypes.cast(self.deleter, ctypes.c_void_p).value
        self.kept += [managed, shape]
        capsule = _new_capsule(ctypes.addressof(managed), b"dltensor_versioned" if self.versioned else b"dltensor", None)
        self.capsules.append(capsule)
        return capsule


class Old(Producer):
    """From before DLPack 1.0: knows no max_version."""

    def __dlpack__(self, *, stream=None):
        return super().__dlpack__(stream=stream)


def fake(kind, index=0):
    return types.SimpleNamespace(__dlpack__=lambda **wishes: None, __dlpack_device__=lambda: (kind, index))


# ---- NumPy ------------------------------------------------------------------------------------------------------------


def numpy_array(dtype, shape=(3, 4, 5)):
    if dtype == "bfloat16":
        dtype = need("ml_dtypes", "test").bfloat16
    values = np.arange(np.prod(shape)).reshape(shape)
    return (values % 3 == 0) if dtype == "bool" else values.astype(dtype)


def test_import_needs_numpy_alone():
    code = """
        import sys
        before = set(sys.modules)
        import numpy
        import cusru.dlpack
        assert not {"cupy", "torch", "jax", "tensorflow", "ml_dtypes"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("dtype", [*DTYPES, "int64", "complex64"])
def test_numpy_in(dtype):
    source = numpy_array(dtype)
    array = dlpack.borrow(source, "u")
    assert (array.name, array.pointer, array.shape, array.dtype) == ("u", source.ctypes.data, (3, 4, 5), dtype)
    assert (array.strides, array.device, array.readonly, array.framework) == ((20, 5, 1), CPU, False, "numpy")
    assert array.itemsize == source.itemsize
    assert array.size == 60
    view = array.numpy()
    assert view.ctypes.data == source.ctypes.data
    assert view.dtype.name == ("uint16" if dtype == "bfloat16" else dtype)
    assert view.tobytes() == source.tobytes()
    assert view.flags.writeable


@pytest.mark.parametrize("dtype", FLOATS)
def test_numpy_out(dtype):
    u = dlpack.borrow(numpy_array(dtype), "u")
    made = dlpack.empty("h", (3, 4), dtype, CPU, u.framework)
    result = dlpack.give(made, u)
    assert type(result) is np.ndarray
    assert result.ctypes.data == made.pointer
    assert result.dtype.name == dtype
    made.numpy()[:] = np.arange(12).reshape(3, 4)
    assert result.view(f"u{result.itemsize}").tobytes() == made.numpy().tobytes()


def test_numpy_read_only():
    source = np.zeros(3)
    source.flags.writeable = False
    array = dlpack.borrow(source, "u")
    assert array.readonly
    assert not array.numpy().flags.writeable


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[::-1, :, ::-2],
        lambda a: a.transpose(2, 0, 1),
        lambda a: np.broadcast_to(a[:1], (7, 4, 5)),
        lambda a: a[:, 1:1],
        lambda a: a[1, 2, 3],
        lambda a: a[..., 2:3],
        lambda a: a[1, 2, 3, None].reshape(()),
        lambda a: a[:0, ::-1],
    ],
)
def test_numpy_strides(view):
    source = np.asarray(view(np.arange(60, dtype=np.float32).reshape(3, 4, 5)))
    array = dlpack.borrow(source, "u")
    assert array.strides == tuple(step // 4 for step in source.strides)
    back = array.numpy()
    assert back.shape == source.shape
    assert back.strides == source.strides
    np.testing.assert_array_equal(back, source)
    if source.size:
        assert back.ctypes.data == source.ctypes.data == array.pointer


def test_numpy_view_keeps_the_memory():
    source = np.arange(1000.0)
    gone = weakref.ref(source)
    view = dlpack.borrow(source, "u").numpy()[3:]
    del source
    gc.collect()
    assert gone() is not None
    assert view[0] == 3
    del view
    assert gone() is None


def test_numpy_refuses_what_no_kernel_can_read():
    with pytest.raises(TypeError, match=r"bias.*byte order"):
        dlpack.borrow(np.zeros(3, np.dtype(np.float32).newbyteorder()), "bias")
    packed = np.zeros(3, np.dtype([("a", "u1"), ("b", "f4")]))["b"]
    with pytest.raises(ValueError, match=r"bias has strides"):
        dlpack.borrow(packed, "bias")
    with pytest.raises(ValueError, match=r"bias.*not aligned"):
        dlpack.borrow(np.zeros(9, np.uint8)[1:9].view(np.float32), "bias")
    dlpack.borrow(packed[:0], "bias")


# ---- empty ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, "uint8"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4, 5), (3, 0, 5), (7, 1, 3, 4)])
def test_empty_is_aligned_and_compact(shape, dtype):
    made = dlpack.empty("h", shape, dtype, CPU, "numpy")
    assert made.pointer % 64 == 0
    assert made.pointer
    view = made.numpy()
    assert view.shape == shape
    assert view.flags.c_contiguous
    assert view.flags.writeable
    assert made.dtype == dtype
    assert made.owner.ctypes.data == made.pointer


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_empty_in_another_order(order):
    made = dlpack.empty("h", (2, 3, 4), "float32", CPU, "numpy", order)
    view = made.numpy()
    assert view.shape == made.owner.shape == (2, 3, 4)
    assert view.strides == made.owner.strides
    assert view.transpose(order).flags.c_contiguous
    assert made.owner.ctypes.data == made.pointer
    assert not dlpack.overlaps_itself(made)


# ---- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_in(dtype):
    torch = need("torch", "torch")
    source = torch.arange(60).reshape(3, 4, 5).to(getattr(torch, dtype))[1:].transpose(0, 1)
    assert dlpack.device_of(source, "u") == CPU
    array = dlpack.borrow(source, "u")
    assert (array.pointer, array.dtype, array.framework, array.readonly) == (source.data_ptr(), dtype, "torch", False)
    assert (array.shape, array.strides) == ((4, 2, 5), (5, 20, 1))
    bits = source.view(torch.uint16) if dtype == "bfloat16" else source
    np.testing.assert_array_equal(array.numpy(), bits.numpy())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 2), (1,)])
@pytest.mark.parametrize("order", [None, "reversed"])
def test_torch_out(dtype, shape, order):
    torch = need("torch", "torch")
    u = dlpack.borrow(torch.zeros(2, dtype=getattr(torch, dtype)), "u")
    made = dlpack.empty("h", shape, dtype, CPU, u.framework, order and reversed(range(len(shape))))
    result = dlpack.give(made, u)
    assert type(result) is torch.Tensor
    assert result.dtype == getattr(torch, dtype)
    assert tuple(result.shape) == shape
    if result.numel():
        assert result.data_ptr() == made.pointer
    gone = weakref.ref(made.owner)
    made.numpy()[...] = 0
    del made
    gc.collect()
    result += 1
    assert bool((result == 1).all())
    if result.numel():
        assert gone() is not None
    del result
    gc.collect()
    assert gone() is None


def test_torch_gradients():
    torch = need("torch", "torch")
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    for tensor in (parameter, parameter * 2):
        with pytest.raises(TypeError, match=r"bias requires grad.*cusru\.torch\.sru.*bias\.detach\(\)"):
            dlpack.borrow(tensor, "bias")
        with torch.no_grad():
            assert dlpack.borrow(tensor, "bias").pointer == tensor.data_ptr()
        assert dlpack.borrow(tensor.detach(), "bias").pointer == tensor.data_ptr()
    with torch.inference_mode():
        dlpack.borrow(torch.zeros(3), "bias")


def test_torch_refused():
    torch = need("torch", "torch")
    with pytest.raises(TypeError, match=r"x has layout torch.sparse_coo"):
        dlpack.borrow(torch.eye(3).to_sparse(), "x")
    conjugate = torch.zeros(3, dtype=torch.complex64).conj()
    for lazy in (conjugate, conjugate.imag):
        with pytest.raises(TypeError, match=r"x is a lazily .*x\.resolve_conj"):
            dlpack.borrow(lazy, "x")
    with pytest.raises(ValueError, match=r"x has no device that DLPack knows .meta."):
        dlpack.device_of(torch.zeros(3, device="meta"), "x")
    with pytest.raises(TypeError, match=r"x holds no memory"):
        dlpack.borrow(torch._efficientzerotensor(3), "x")
    seen = []

    def inside(value):
        with pytest.raises(TypeError, match=r"x is a torch tensor without memory"):
            dlpack.borrow(value, "x")
        seen.append(1)
        return value.sum()

    torch.vmap(inside)(torch.ones(2, 3))
    assert seen


def test_torch_view_may_be_empty_or_scalar():
    torch = need("torch", "torch")
    assert dlpack.borrow(torch.zeros(0, 3), "u").numpy().shape == (0, 3)
    assert dlpack.borrow(torch.tensor(2.5), "scale_x").numpy()[()] == 2.5
    expanded = dlpack.borrow(torch.zeros(1, 3).expand(5, 3), "u")
    assert expanded.strides == (0, 1)


@pytest.mark.parametrize(
    "dtype", ["complex64", "complex32", "float8_e4m3fn", "float4_e2m1fn_x2", "int4", "uint4", "bits8", "bool"]
)
def test_torch_dtypes_that_nobody_takes_are_named(dtype):
    torch = need("torch", "torch")
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    memory = torch.from_numpy(np.zeros(25, np.uint8)[1:])  # off the alignment of those wider than a byte
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [torch.empty(3, dtype=getattr(torch, dtype)), memory.view(getattr(torch, dtype))]
    if dtype == "complex64":
        tensors.append(tensors[0].conj())
    for tensor in tensors:
        with pytest.raises(TypeError, match=rf"bias has dtype {dtype}; allowed here: float32, float64"):
            dlpack.borrow(tensor, "bias", allowed=("float32", "float64"))


def test_torch_quantised_tensors_are_refused_by_their_dtype():
    torch = need("torch", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"bias has dtype qint8; allowed here: float32"):
        dlpack.borrow(quantised, "bias", allowed=("float32",))


# ---- JAX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_in(dtype):
    jax = need("jax", "jax")
    with jax.enable_x64(True):
        source = jax.numpy.arange(60).reshape(3, 4, 5).astype(dtype)
        array = dlpack.borrow(source, "u")
    assert (array.pointer, array.dtype) == (source.unsafe_buffer_pointer(), dtype)
    assert (array.shape, array.strides, array.device) == ((3, 4, 5), (20, 5, 1), CPU)
    assert (array.framework, array.readonly) == ("jax", True)
    view = array.numpy()
    assert not view.flags.writeable
    assert view.tobytes() == np.asarray(source).tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 2), (1,)])
def test_jax_out(dtype, shape):
    jax = need("jax", "jax")
    with jax.enable_x64(True):
        u = dlpack.borrow(jax.numpy.zeros(2, dtype), "u")
        made = dlpack.empty("h", shape, dtype, CPU, u.framework)
        made.numpy()[...] = 0
        result = dlpack.give(made, u)
        assert isinstance(result, jax.Array)
        assert (result.dtype.name, result.shape) == (dtype, shape)
        gone = weakref.ref(made.owner)
        if result.size:
            assert result.unsafe_buffer_pointer() == made.pointer
            del made
            gc.collect()
            assert gone() is not None
            assert not np.asarray(result).any()
        made = None
        del result
        gc.collect()
        assert gone() is None


def test_jax_traced():
    jax = need("jax", "jax")
    seen = []

    def inside(value):
        for read in (dlpack.device_of, dlpack.borrow):
            with pytest.raises(TypeError, match=r"u is a traced value.*Tracer.*call cusru\.jax\.sru, qrnn or linear_recurrence"):
                read(value, "u")
            seen.append(read)
        return value.sum()

    value = jax.numpy.ones(3)
    jax.jit(inside)(value)
    jax.grad(inside)(value)
    jax.vmap(inside)(value)
    assert len(seen) == 6


def test_jax_deleted_or_no_array():
    jax = need("jax", "jax")
    value = jax.numpy.ones(3)
    value.delete()
    for read in (dlpack.device_of, dlpack.borrow):
        with pytest.raises(RuntimeError, match=r"u is a JAX array that was deleted"):
            read(value, "u")
    with pytest.raises(TypeError, match=r"u must be an array.*PRNGKeyArray"):
        dlpack.device_of(jax.random.key(0), "u")


@pytest.mark.parametrize(
    "dtype", ["int2", "int4", "uint4", "float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "complex64", "int32"]
)
def test_jax_dtypes_that_nobody_takes_are_named(dtype):
    jax = need("jax", "jax")
    if not hasattr(jax.numpy, dtype):
        pytest.skip(f"this JAX has no {dtype}")
    with pytest.raises(TypeError, match=rf"bias has dtype {dtype}; allowed here: float32, float64"):
        dlpack.borrow(jax.numpy.zeros(3, dtype), "bias", allowed=("float32", "float64"))


def test_jax_has_several_cpus():
    """Uncommitted arrays are no exception: on GPUs theirs is another memory, and simulated devices are there to behave alike."""
    need("jax", "jax")
    code = """
        import jax, numpy as np, cusru
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        def refused(*words, **arguments):
            try:
                cusru.sru_forward(**arguments)
            except ValueError as error:
                assert all(word in str(error) for word in words), error
            else:
                raise AssertionError(words)

        cpus = jax.devices()
        assert len(cpus) == 4
        host = np.random.default_rng(0).standard_normal((4, 3, 6, 3)).astype("f4")
        want = cusru.sru_forward(host)
        one = NamedSharding(Mesh(np.array(cpus[2:3]), "a"), PartitionSpec("a"))
        for where in (*cpus, one):
            u = jax.device_put(host, where)
            got = cusru.sru_forward(u, c0=jax.device_put(np.zeros((3, 6), "f4"), where))
            gradients = cusru.sru_backward(got.h, got.c_last, got.c, u)
            assert {tuple(a.devices()) for a in (*got, gradients.u)} == {tuple(u.devices())}
            (got.h + u[..., 0]).block_until_ready()  # JAX itself refuses committed arrays of two devices
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)
        with jax.default_device(cpus[3]):
            assert cusru.sru_forward(jax.numpy.ones((4, 3, 6, 3))).h.devices() == {cpus[3]}
        with jax.enable_x64(True):
            u = jax.device_put(host.astype("f8"), cpus[1])
            assert cusru.sru_forward(u).h.devices() == {cpus[1]}
            assert cusru.sru_forward(u).h.dtype == "float64"

        u, bias = jax.device_put(host, cpus[1]), np.zeros((2, 6), "f4")
        cusru.sru_forward(u, bias=bias)  # NumPy's are the host's
        cusru.sru_forward(host, bias=jax.device_put(bias, cpus[1]))
        refused("bias is on cpu:0 and u on cpu:1", u=u, bias=jax.device_put(bias, cpus[0]))
        refused("bias is on cpu:0 and u on cpu:1", u=u, bias=jax.numpy.zeros((2, 6)))
        refused("bias is on cpu:1 and u on cpu:0", u=jax.numpy.asarray(host), bias=jax.device_put(bias, cpus[1]))
        at_2, at_3 = (jax.device_put(bias, cpu) for cpu in cpus[2:])
        refused("weight_c is on cpu:3 and bias on cpu:2", u=host, bias=at_2, weight_c=at_3)
        for spec in (PartitionSpec("a"), PartitionSpec()):
            spread = NamedSharding(Mesh(np.array(cpus), "a"), spec)
            refused("u lies on several devices (cpu:0, cpu:1, cpu:2, cpu:3)", u=jax.device_put(host, spread))
            refused("x lies on several devices", u=u, x=jax.device_put(host[..., 0], spread))
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


# ---- TensorFlow -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 0, 5), (3, 4, 1)])
def test_tensorflow(dtype, shape):
    tf = need("tensorflow", "tensorflow")
    source = tf.cast(tf.reshape(tf.range(np.prod(shape)), shape), dtype)
    u = dlpack.borrow(source, "u")
    assert (u.framework, u.readonly, u.shape) == ("tensorflow", True, shape)
    assert u.dtype in (dtype, "uint8" if dtype == "bool" else dtype)
    assert u.numpy().tobytes() == source.numpy().tobytes()
    if dtype in FLOATS:
        made = dlpack.empty("h", shape, dtype, CPU, u.framework)
        made.numpy()[...] = 0
        result = dlpack.give(made, u)
        assert isinstance(result, tf.Tensor)
        assert tuple(result.shape) == shape
        assert dlpack.borrow(result, "h").pointer == made.pointer or not made.size
        made.numpy()[...] = 1
        assert result.numpy().tobytes() == made.numpy().tobytes()


def test_tensorflow_variable():
    tf = need("tensorflow", "tensorflow")
    with pytest.raises(TypeError, match=r"u must be an array.*value\(\)"):
        dlpack.device_of(tf.Variable([1.0]), "u")


def test_tensorflow_dtypes_that_nobody_takes_are_named():
    tf = need("tensorflow", "tensorflow")
    allowed = ("float32", "bool")
    made = [tf.zeros(3, dtype) for dtype in ("complex64", "int32", "float16", "int4", "qint8")]
    made += [tf.cast(tf.zeros(3), "float8_e5m2")]
    made += [tf.constant(["text"]), tf.Variable([1.0]).handle]
    made += [tf.data.experimental.to_variant(tf.data.Dataset.range(3))]
    for tensor in made:
        with pytest.raises(TypeError, match=rf"bias has dtype {tensor.dtype.name}; allowed here: float32, bool"):
            dlpack.borrow(tensor, "bias", allowed=allowed)
    assert dlpack.borrow(tf.constant([True]), "mask_pad", allowed=("bool", "uint8")).size == 1


def test_tensorflow_traced():
    tf = need("tensorflow", "tensorflow")
    seen = []

    @tf.function(autograph=False)
    def inside(value):
        with pytest.raises(TypeError, match=r"u is a traced value.*SymbolicTensor"):
            dlpack.device_of(value, "u")
        seen.append(value)
        return value

    inside(tf.zeros(3))
    assert seen


def test_tensorflow_has_several_cpus():
    need("tensorflow", "tensorflow")
    code = """
        import tensorflow as tf, cusru
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        on = []
        for i in range(2):
            with tf.device(f"CPU:{i}"):
                on.append((tf.ones((4, 3, 6, 3)), tf.zeros((2, 6))))
        for u, bias in on:
            got = cusru.sru_forward(u, bias=bias)
            assert {a.device for a in got} == {u.device}
        try:
            cusru.sru_forward(on[1][0], bias=on[0][1])
        except ValueError as error:
            assert "bias is on cpu:0 and u on cpu:1" in str(error), error
        else:
            raise AssertionError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# a stand-in where TensorFlow is not installed: what matters is what its functions are given
def test_tensorflow_takes_an_unversioned_capsule_without_a_stream(monkeypatch):
    if "tensorflow" in sys.modules:
        pytest.skip("the real one is here")
    taken = []

    class Tensor(Producer):
        dtype, device = np.dtype("float32"), (1, 0)

        def __dlpack__(self):
            return super().__dlpack__()

    result = types.SimpleNamespace(device=Tensor.device)

    def from_dlpack(capsule):
        taken.append(capsule)
        return result

    experimental = types.SimpleNamespace(dlpack=types.SimpleNamespace(from_dlpack=from_dlpack))
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(Tensor=Tensor, experimental=experimental))
    dlpack._framework_of.cache_clear()
    source = Tensor(np.zeros((2, 3), np.float32), versioned=False)
    u = dlpack.borrow(source, "u")
    assert (u.framework, u.readonly) == ("tensorflow", True)
    made = dlpack.empty("h", (0, 3), "bfloat16", CPU, "tensorflow")
    assert dlpack.give(made, u) is result
    assert _capsule_name(taken[0]) == b"dltensor"
    tensor = dlpack._peek(taken[0])
    assert (tensor.code, tensor.bits, tensor.data) == (4, 16, made.pointer)
    assert not tensor.strides
    dlpack._framework_of.cache_clear()


# ---- other producers: capsules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("kind", [Producer, Old])
@pytest.mark.parametrize("strides", [None, (1, 2), (-3, 0)])
def test_capsule_is_read_and_freed_once(kind, versioned, strides):
    memory = np.arange(6, dtype=np.float32).reshape(2, 3)
    producer = kind(memory, versioned=versioned, strides=strides, offset=64)
    array = dlpack.borrow(producer, "x")
    assert (array.pointer, array.shape, array.strides) == (memory.ctypes.data, (2, 3), strides or (3, 1))
    assert (array.dtype, array.framework, array.readonly) == ("float32", "other", False)
    assert _capsule_name(producer.capsules[0]) == (b"used_dltensor_versioned" if versioned else b"used_dltensor")
    if strides is None:
        view = array.numpy()
        assert view.ctypes.data == memory.ctypes.data
        del array
        gc.collect()
        assert producer.deleted == 0
        np.testing.assert_array_equal(view, memory)
        del view
    else:
        del array
    gc.collect()
    assert producer.deleted == 1


def test_capsule_without_deleter_or_axes():
    producer = Producer(np.array(2.5, np.float32), versioned=False)
    producer.deleter = ctypes.c_void_p(None)
    array = dlpack.borrow(producer, "scale_x")
    assert (array.shape, array.strides) == ((), ())
    assert array.numpy()[()] == 2.5
    del array


def test_capsules_freed_from_many_threads():
    producers = [Producer(np.zeros(3, np.float32), versioned=True) for _ in range(200)]
    arrays = [dlpack.borrow(producer, "x") for producer in producers]

    def drop():
        while True:
            try:
                arrays.pop()
            except IndexError:
                return

    threads = [threading.Thread(target=drop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [producer.deleted for producer in producers] == [1] * 200


def test_capsule_outlives_the_interpreter():
    need("jax", "jax")
    code = """
        import numpy, jax.numpy, cusru.dlpack as d
        keep = d.borrow(jax.numpy.ones(5), "u")
        other = d.give(d.empty("h", (3,), "bfloat16", ("cpu", 0), "jax"), keep)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_borrowing_leaks_nothing():
    source = np.zeros(3, np.float32)
    wrapped = types.SimpleNamespace(__dlpack__=source.__dlpack__, __dlpack_device__=source.__dlpack_device__)
    before = sys.getrefcount(source)
    for _ in range(100):
        dlpack.borrow(wrapped, "u").numpy()
    assert sys.getrefcount(source) == before


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ((2, 64, 1), "float64"),
        ((2, 16, 1), "float16"),
        ((4, 16, 1), "bfloat16"),
        ((6, 8, 1), "bool"),
        ((1, 8, 1), "uint8"),
        ((0, 64, 1), "int64"),
        ((5, 64, 1), "complex64"),
        ((2, 32, 4), "float32x4"),
        ((10, 8, 1), "dlpack10_8"),
    ],
)
def test_capsule_dtypes(code, name):
    assert dlpack.borrow(Producer(np.zeros(2), versioned=True, typecode=code), "x").dtype == name


def test_a_capsules_dtype_comes_before_its_address():
    for code, name in (((2, 32, 4), "float32x4"), ((10, 8, 1), "dlpack10_8"), ((5, 64, 1), "complex64"), ((0, 4, 1), "int4")):
        producer = Producer(np.zeros(9, np.uint8)[1:], versioned=True, typecode=code)
        with pytest.raises(TypeError, match=rf"x has dtype {name}; allowed here: float32"):
            dlpack.borrow(producer, "x", allowed=("float32",))
    producer = Producer(np.zeros(9, np.uint8)[1:], versioned=True, typecode=(2, 32, 1))
    with pytest.raises(ValueError, match=r"x starts at an address that is not aligned to its dtype float32"):
        dlpack.borrow(producer, "x", allowed=("float32",))


def test_capsule_read_only_and_version():
    memory = np.zeros(3, np.float32)
    array = dlpack.borrow(Producer(memory, versioned=True, flags=1), "x")
    assert array.readonly
    assert not array.numpy().flags.writeable
    assert not dlpack.borrow(Producer(memory, versioned=True, flags=2), "x").readonly
    future = Producer(memory, versioned=True, version=(2, 1))
    with pytest.raises(TypeError, match=r"x speaks DLPack 2.1"):
        dlpack.borrow(future, "x")
    gc.collect()
    assert future.deleted == 1


def test_a_capsule_is_used_once():
    producer = Producer(np.zeros(3, np.float32), versioned=True)
    dlpack.borrow(producer, "x")
    again = types.SimpleNamespace(__dlpack__=lambda **wishes: producer.capsules[0], __dlpack_device__=lambda: (1, 0))
    with pytest.raises(TypeError, match=r"x: its __dlpack__ returned.*not a fresh DLPack capsule"):
        dlpack.borrow(again, "x")
    again.__dlpack__ = lambda **wishes: 3
    with pytest.raises(TypeError, match=r"x: its __dlpack__ returned"):
        dlpack.borrow(again, "x")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (BufferError, TypeError),
        (TypeError, TypeError),
        (ValueError, ValueError),
        (RuntimeError, RuntimeError),
        (OSError, TypeError),
    ],
)
def test_a_producers_exception_names_the_argument(raised, expected):
    def fail(**wishes):
        raise raised("the producer's words")

    with pytest.raises(expected, match=r"grad_h: .*the producer's words") as caught:
        dlpack.borrow(types.SimpleNamespace(__dlpack__=fail, __dlpack_device__=lambda: (1, 0)), "grad_h")
    assert isinstance(caught.value.__cause__, raised)


def test_other_frameworks_get_their_own_type_back():
    class Result:
        pass

    class Namespace:
        @staticmethod
        def from_dlpack(export):
            assert export.__dlpack_device__() == (1, 0)
            result = Result()
            result.array = np.from_dlpack(export)
            return result

    class Source(Producer):
        def __array_namespace__(self):
            return Namespace

    u = dlpack.borrow(Source(np.zeros(3, np.float32), versioned=True), "u")
    made = dlpack.empty("h", (3,), "float32", CPU, u.framework)
    result = dlpack.give(made, u)
    assert isinstance(result, Result)
    assert result.array.ctypes.data == made.pointer
    plain = dlpack.borrow(Producer(np.zeros(3, np.float32), versioned=True), "u")
    assert dlpack.give(made, plain) is made.owner


# ---- errors of bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [None, 3, 2.5, "text", [1.0], (1.0,), np.float32(1), object(), {}])
def test_no_array(what):
    for read in (dlpack.device_of, dlpack.borrow):
        with pytest.raises(TypeError, match=rf"weight_c must be an array.*{type(what).__name__}"):
            read(what, "weight_c")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (4, "OpenCL"),
        (7, "Vulkan"),
        (8, "MPS"),
        (10, "ROCm"),
        (11, "ROCm host"),
        (14, "oneAPI"),
        (15, "WebGPU"),
        (99, "DLPack 99"),
    ],
)
def test_foreign_devices(kind, text):
    for read in (dlpack.device_of, dlpack.borrow):
        with pytest.raises(ValueError, match=rf"^c0 is on .*{text}.* device 3"):
            read(fake(kind, 3), "c0")


def test_a_device_that_dlpack_does_not_know():
    def refuse():
        raise BufferError("no such kind")

    tpu = types.SimpleNamespace(__dlpack__=None, __dlpack_device__=refuse, device="TPU_0")
    with pytest.raises(ValueError, match=r"c0 has no device that DLPack knows .TPU_0.: no such kind"):
        dlpack.device_of(tpu, "c0")


def test_known_devices():
    assert dlpack.device_of(fake(1, 7), "u") == CPU
    assert dlpack.device_of(fake(3, 1), "u") == CPU  # pinned
    assert dlpack.device_of(fake(2, 1), "u") == ("cuda", 1)
    assert dlpack.device_of(fake(13, 2), "u") == ("cuda", 2)  # managed


def test_cuda_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    device = Producer(np.zeros(3, np.float32), versioned=True, device=(2, 0))
    with pytest.raises(ImportError, match=r"CuPy: pip install 'cusru\[cuda13\]'.*cuda12"):
        dlpack.borrow(device, "u", 0)
    with pytest.raises(ImportError, match=r"cusru\[cuda13\]"):
        dlpack.stream_handle(None, device, ("cuda", 0))
    assert not device.calls


def test_cuda_that_does_not_work(monkeypatch):
    cupy = need("cupy", "cuda13")

    def broken():
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", broken)
    dlpack._check_cuda.cache_clear()
    device = Producer(np.zeros(3, np.float32), versioned=True, device=(2, 0))
    for call in (lambda: dlpack.borrow(device, "u", 0), lambda: dlpack.stream_handle(None, device, ("cuda", 0))):
        with pytest.raises(RuntimeError, match=r"no working CUDA \(cudaErrorInsufficientDriver\).*cusru\[cuda13\]"):
            call()
    assert not device.calls


# ---- streams ----------------------------------------------------------------------------------------------------------


class External:
    def __init__(self, *pair):
        self.pair = pair

    def __cuda_stream__(self):
        return self.pair


def test_stream_handle_given():
    device = ("cuda", 0)
    assert dlpack.stream_handle(0, None, device) == 0
    assert dlpack.stream_handle(123, None, device) == 123
    assert dlpack.stream_handle(np.uint64(2**40), None, device) == 2**40
    assert dlpack.stream_handle(External(0, 456), None, device) == 456
    assert dlpack.stream_handle(types.SimpleNamespace(__cuda_stream__=(0, 789)), None, device) == 789
    for wrong in (True, False, 1.0, "0", object()):
        with pytest.raises(TypeError, match=f"stream must be .*{type(wrong).__name__}"):
            dlpack.stream_handle(wrong, None, device)
    with pytest.raises(TypeError, match=r"stream speaks version 1"):
        dlpack.stream_handle(External(1, 456), None, device)
    with pytest.raises(ValueError, match=r"stream must be .*-1"):
        dlpack.stream_handle(-1, None, device)


@pytest.fixture
def cuda(monkeypatch):
    """CuPy as on a machine with CUDA, as far as this layer asks: the current stream of device i has handle 100 + i."""
    cupy = need("cupy", "cuda13")
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 2)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda device=0: types.SimpleNamespace(ptr=100 + device))
    monkeypatch.setattr(cupy.cuda, "Device", lambda index: contextlib.nullcontext(index))
    dlpack._check_cuda.cache_clear()
    yield cupy
    dlpack._check_cuda.cache_clear()


@pytest.mark.parametrize(("handle", "passed"), [(0, 1), (1, 1), (2, 2), (140, 140), (None, 101)])
def test_handshake(cuda, handle, passed):
    producer = Producer(np.zeros(3, np.float32), versioned=True, device=(2, 1))
    array = dlpack.borrow(producer, "u", handle)
    assert producer.calls == [{"stream": passed, "max_version": (1, 0)}]
    assert array.device == ("cuda", 1)
    with pytest.raises(TypeError, match=r"u is on cuda:1"):
        array.numpy()
    old = Old(np.zeros(3, np.float32), versioned=False, device=(2, 1))
    dlpack.borrow(old, "u", handle)
    assert old.calls == [{"stream": passed}]


def test_no_handshake_on_a_cpu():
    producer = Producer(np.zeros(3, np.float32), versioned=True)
    dlpack.borrow(producer, "u", 140)
    assert producer.calls == [{"max_version": (1, 0)}]


def test_default_stream(cuda, monkeypatch):
    assert dlpack.stream_handle(None, fake(2, 1), ("cuda", 1)) == 101
    torch = need("torch", "torch")
    current = lambda index: types.SimpleNamespace(cuda_stream=200 + index)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    assert dlpack.stream_handle(None, torch.zeros(1), ("cuda", 1)) == 201
    assert dlpack.stream_handle(None, dlpack.borrow(torch.zeros(1), "u"), ("cuda", 1)) == 201


def cupy_array(cupy, memory, shape, dtype, strides=None):
    owned = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, device_id=1)
    return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(owned, 0), strides=strides)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cupy_in(cuda, dtype, monkeypatch):
    source = numpy_array(dtype)
    array = cupy_array(cuda, source, source.shape, source.dtype)
    u = dlpack.borrow(array, "u")
    assert (u.pointer, u.shape, u.strides, u.dtype) == (source.ctypes.data, (3, 4, 5), (20, 5, 1), dtype)
    assert (u.device, u.framework, u.readonly, u.owner) == (("cuda", 1), "cupy", False, array)
    assert dlpack.borrow(array.transpose(2, 0, 1), "u").strides == (1, 20, 5)
    assert dlpack.stream_handle(None, array, u.device) == 101
    asked = []
    monkeypatch.setattr(dlpack, "_export", lambda obj, name, device, stream: asked.append((obj.dtype.name, stream)))
    assert dlpack.borrow(array, "u", 101).pointer == u.pointer
    assert not asked  # the same stream: no handshake
    assert dlpack.borrow(array, "u", 0).pointer == u.pointer
    assert asked == [("uint16" if dtype == "bfloat16" else dtype, 0)]


def test_cupy_of_rocm(cuda, monkeypatch):
    array = cupy_array(cuda, np.zeros(3), (3,), np.float64)
    monkeypatch.setattr(cuda.cuda.runtime, "is_hip", True)
    monkeypatch.setattr(dlpack, "_framework", lambda obj: "cupy")
    rocm = types.SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (10, 0))
    with pytest.raises(ValueError, match=r"u is on ROCm device 0"):
        dlpack.device_of(rocm, "u")
    assert array.shape == (3,)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cupy_out(cuda, dtype, monkeypatch):
    memory = np.zeros(100)
    monkeypatch.setattr(cuda, "empty", lambda shape, dtype: cupy_array(cuda, memory, shape, dtype))
    u = dlpack.borrow(cupy_array(cuda, memory, (3, 4), numpy_array(dtype).dtype), "u")
    for order in (None, (1, 0)):
        made = dlpack.empty("h", (3, 4), dtype, u.device, u.framework, order)
        result = dlpack.give(made, u)
        assert isinstance(result, cuda.ndarray)
        assert result.data.ptr == made.pointer == memory.ctypes.data
        assert (result.dtype.name, result.shape) == (dtype, (3, 4))
        assert tuple(step // result.itemsize for step in result.strides) == made.strides


# ---- overlap ----------------------------------------------------------------------------------------------------------


@st.composite
def arrays(draw, itemsizes=("uint8", "float16", "float32")):
    dtype = draw(st.sampled_from(itemsizes))
    rank = draw(st.integers(0, 3))
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank)))
    strides = tuple(draw(st.lists(st.integers(-9, 9), min_size=rank, max_size=rank)))
    pointer = 0x7F00_0000_0000 + draw(st.integers(-40, 40))
    return dlpack.Array("a", pointer, shape, strides, dtype, ("cuda", 0), False, "other", None, None)


def addresses(a):
    """The first byte of every element."""
    indices = itertools.product(*map(range, a.shape))
    return [a.pointer + a.itemsize * sum(i * s for i, s in zip(index, a.strides, strict=True)) for index in indices]


def covered(a):
    return {address + byte for address in addresses(a) for byte in range(a.itemsize)}


@settings(max_examples=400, deadline=None)
@given(arrays(), arrays())
def test_overlaps(a, b):
    assert dlpack.overlaps(a, b) == bool(covered(a) & covered(b))
    assert dlpack.overlaps(a, b) == dlpack.overlaps(b, a)


@settings(max_examples=400, deadline=None)
@given(arrays())
def test_overlaps_itself(a):
    firsts = addresses(a)
    assert dlpack.overlaps_itself(a) == (len(set(firsts)) < len(firsts))


def test_overlap_examples():
    base = np.zeros((6, 8))
    one = dlpack.borrow(base, "one")
    even, odd = dlpack.borrow(base[:, ::2], "even"), dlpack.borrow(base[:, 1::2], "odd")
    assert dlpack.overlaps(one, even)
    assert not dlpack.overlaps(even, odd)
    assert not dlpack.overlaps(dlpack.borrow(base[:3], "top"), dlpack.borrow(base[3:], "bottom"))
    assert not dlpack.overlaps(one, dlpack.borrow(base[:0], "nothing"))
    elsewhere = dlpack.borrow(base, "elsewhere")
    elsewhere.device = ("cuda", 0)
    assert not dlpack.overlaps(one, elsewhere)
    assert not dlpack.overlaps_itself(dlpack.borrow(base.T[::-1], "turned"))
    assert dlpack.overlaps_itself(dlpack.borrow(np.broadcast_to(base, (2, 6, 8)), "expanded"))
    windows = np.lib.stride_tricks.sliding_window_view(np.zeros(10), 3)
    assert dlpack.overlaps_itself(dlpack.borrow(windows, "windows"))
    assert not dlpack.overlaps_itself(dlpack.borrow(windows[::3], "windows apart"))


def test_overlap_of_huge_arrays_is_quick_and_errs_on_the_safe_side():
    def huge(strides, pointer=4096):
        shape = (10**5, 10**5, 10**4)
        return dlpack.Array("a", pointer, shape, strides, "float32", ("cuda", 0), False, "other", None, None)

    compact = (10**9, 10**4, 1)
    assert not dlpack.overlaps_itself(huge(compact))
    assert dlpack.overlaps_itself(huge((10**9, 10**4 - 1, 1)))
    assert dlpack.overlaps_itself(huge((3 * 10**9, 10**9 + 1, 7 * 10**5)))  # unknown: taken as true
    assert not dlpack.overlaps(huge((2 * 10**9, 2 * 10**4, 2)), huge((2 * 10**9, 2 * 10**4, 2), 4100))
    assert dlpack.overlaps(huge(compact), huge(compact, 4100))


def test_an_address_off_its_dtype_is_refused(cuda):
    memory = np.zeros(64, np.uint8)
    off = np.ndarray((4,), np.float32, memory, 1)
    on_device = cuda.ndarray((4,), np.float32, memptr=cupy_array(cuda, memory, (64,), np.uint8).data + 1)
    for array in (off, on_device):
        with pytest.raises(ValueError, match=r"u starts at an address that is not aligned to its dtype float32"):
            dlpack.borrow(array, "u")


def test_jax_keeps_float64_whatever_its_setting():
    jax = need("jax", "jax")
    with jax.enable_x64(True):
        u = dlpack.borrow(jax.numpy.ones(3, jax.numpy.float64), "u")
    result = dlpack.empty("h", (3,), "float64", dlpack.CPU, "jax")
    given = dlpack.give(result, u)
    assert given.dtype == np.float64
    assert given.unsafe_buffer_pointer() == result.pointer
