"""Any framework's array in, the same framework's array out, never copied; and the streams that order the two.

An array comes in through `borrow` and leaves through `empty` and `give`; several plain ones of NumPy, CuPy or torch at once, in a
fraction of the time, through `read_plain` and `new`. NumPy, CuPy and torch arrays are read directly; every other framework's
through its DLPack capsule, by ctypes, because NumPy cannot import bfloat16. Only NumPy is imported here: a framework is looked
up in `sys.modules` once one of its arrays has arrived.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

_Function = TypeVar("_Function", bound=Callable[..., Any])

_Allowed = tuple[str, ...] | None  # dtypes

CPU = ("cpu", 0)
INSTALL = "pip install 'cusru[cuda13]' (with a CUDA 12 driver: pip install 'cusru[cuda12]')"

_ALIGNMENT = 64  # bytes: JAX copies a CPU array that is aligned to less, TensorFlow aborts
_LEGACY, _VERSIONED = b"dltensor", b"dltensor_versioned"
_USED = {_LEGACY: b"used_dltensor", _VERSIONED: b"used_dltensor_versioned"}
_READ_ONLY = 1  # a bit of the versioned capsule's flags
_BFLOAT = 4
_TYPE_CODES = {0: "int", 1: "uint", 2: "float", 3: "opaque", _BFLOAT: "bfloat", 5: "complex", 6: "bool"}
_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}  # 3 is pinned, 13 managed memory
_FOREIGN_DEVICES = {
    4: "OpenCL", 7: "Vulkan", 8: "Metal (MPS)", 9: "VPI", 10: "ROCm", 11: "ROCm host", 12: "extension",
    14: "oneAPI", 15: "WebGPU", 16: "Hexagon", 17: "MAIA", 18: "Trainium",
}  # fmt: skip


@dataclass(slots=True, eq=False)
class Array:
    """A borrowed view of one framework's array: where its elements lie, and what keeps them alive."""

    name: str  # the argument's name, for messages
    pointer: int  # address of element [0, ..., 0]; may be 0 when there is none
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str
    device: tuple[str, int]
    readonly: bool
    framework: str
    owner: Any = field(repr=False)  # keeps the memory alive; NumPy's array of this shape is this very array
    source: Any = field(repr=False)  # what the caller passed

    @property
    def itemsize(self) -> int:
        return _itemsize(self.dtype)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def numpy(self) -> np.ndarray:
        """The same CPU memory as a NumPy array; bfloat16 as its bits in uint16."""
        if self.device != CPU:
            raise TypeError(f"{self.name} is on {device_name(self.device)}, and NumPy reads CPU memory only")
        storage = _storage(self.dtype)
        if type(self.owner) is np.ndarray and self.owner.shape == self.shape:
            return self.owner.view(storage)
        return _view(self, storage, self.readonly)


# ---- in ------------------------------------------------------------------------------------------------------------


def device_of(obj: Any, name: str) -> tuple[str, int]:
    """Where the array is: ("cpu", 0) or ("cuda", index)."""
    if isinstance(obj, Array):
        return obj.device
    kind_of_array: Any = type(obj)
    framework = _framework_of(kind_of_array)
    if framework == "numpy":
        return CPU
    if framework == "cupy" and not sys.modules["cupy"].cuda.runtime.is_hip:
        return "cuda", obj.data.device_id  # its __dlpack_device__ would ask the driver
    if framework == "torch":
        if obj.is_cpu:
            return CPU
        if obj.is_cuda and sys.modules["torch"].version.hip is None:
            return "cuda", obj.device.index
    if not hasattr(obj, "__dlpack__") or not hasattr(obj, "__dlpack_device__"):
        raise _no_array(obj, name)
    try:
        kind, index = map(int, obj.__dlpack_device__())
    except Exception as error:
        if _is_traced(obj):
            raise _no_array(obj, name) from error
        if framework == "jax" and obj.is_deleted():
            raise RuntimeError(f"{name} is a JAX array that was deleted, or donated to a jitted function") from error
        if framework == "jax" and len(obj.devices()) > 1:
            where = ", ".join(sorted(map(_jax_device, obj.devices())))
            raise ValueError(f"{name} lies on several devices ({where}); cusru runs on one: call it for each shard") from error
        where = getattr(obj, "device", "unknown")
        raise ValueError(f"{name} has no device that DLPack knows ({where}): {error}") from error
    return _device(kind, index, name)


def one_cpu(arrays: Iterable[Array]) -> None:
    """Refuse arrays of one framework on several of its CPU devices: DLPack calls each of JAX's the first."""
    first: dict[str, tuple[str, str]] = {}
    for array in arrays:
        if array.framework in _CPU_DEVICES and array.device == CPU:
            where = _CPU_DEVICES[array.framework](array.source)
            name_of_first, its = first.setdefault(array.framework, (array.name, where))
            if where != its:
                raise ValueError(f"{array.name} is on {where} and {name_of_first} on {its}; all arrays must share one device")


def _jax_device(device: Any) -> str:
    return f"{device.platform}:{device.id}"


_CPU_DEVICES: dict[str, Callable[[Any], str]] = {  # of the frameworks that have several
    "jax": lambda obj: _jax_device(next(iter(obj.devices()))),
    "tensorflow": lambda obj: obj.device.rpartition("device:")[2].lower(),
}


def stream_handle(stream: Any, u: Any, device: tuple[str, int]) -> int:
    """The cudaStream_t to work on: the caller's `stream`, or else the current one of torch or CuPy."""
    if stream is None:
        u = u.source if isinstance(u, Array) else u
        framework = _framework(u)
        cupy = _cupy(proven=framework == "cupy")
        if framework == "torch":
            return int(sys.modules["torch"].cuda.current_stream(device[1]).cuda_stream)
        return int(cupy.cuda.get_current_stream(device[1]).ptr)
    if isinstance(stream, (int, np.integer)) and not isinstance(stream, bool):
        handle = int(stream)
    elif hasattr(stream, "__cuda_stream__"):
        pair = stream.__cuda_stream__
        version, handle = pair() if callable(pair) else pair
        if version != 0:
            raise TypeError(f"stream speaks version {version} of __cuda_stream__, and cusru version 0")
    else:
        raise TypeError(f"stream must be an integer handle or an object with __cuda_stream__, not {type_name(stream)}")
    if handle < 0:
        raise ValueError(f"stream must be a cudaStream_t, which is never negative: got {handle}")
    return int(handle)


def borrow(
    obj: Any,
    name: str,
    stream: int | None = None,
    device: tuple[str, int] | None = None,
    allowed: _Allowed = None,
) -> Array:
    """Read an array where it lies. One on a device is ready for the work that `stream` gets from now on.

    `device` is what `device_of` said, if it has been asked. `stream=None` stands for the producer's own current stream (torch,
    CuPy), else for CuPy's; on a CPU it has no meaning. The producer's side of the handshake is its current stream: call this
    before entering `stream`'s scope. `allowed` are the dtypes to take, None: any; the dtype is looked at before all that depends
    on it, the producer's own export included.
    """
    if isinstance(obj, Array):
        _check_dtype(name, obj.dtype, allowed)
        return obj
    device = device or device_of(obj, name)
    kind_of_array: Any = type(obj)
    framework = _framework_of(kind_of_array)
    if device[0] == "cuda":
        _cupy(proven=framework == "cupy")
    else:
        stream = None
    array = _READERS.get(framework, _read_capsule)(obj, name, device, stream, allowed)
    if not array.pointer and array.size:
        raise TypeError(f"{name} holds no memory: {type_name(obj)} of shape {array.shape} (a fake or traced tensor?)")
    if array.pointer % array.itemsize and array.size:
        raise ValueError(f"{name} starts at an address that is not aligned to its dtype {array.dtype}")
    return array


def _check_dtype(name: str, dtype: str, allowed: _Allowed) -> None:
    if allowed and dtype not in allowed:
        raise TypeError(f"{name} has dtype {dtype}; allowed here: {', '.join(allowed)}")


def _read_numpy(obj: np.ndarray, name: str, device: tuple[str, int], stream: int | None, allowed: _Allowed) -> Array:
    dtype = _name(obj.dtype)
    _check_dtype(name, dtype, allowed)
    if type(obj) is not np.ndarray and isinstance(obj, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, and cusru would not see its mask: pass {name}.filled(...), or {name}.data")
    if not obj.dtype.isnative:
        raise TypeError(f"{name} has dtype {obj.dtype.str}: a byte order that is not this machine's")
    strides = _in_elements(obj, name)
    return Array(name, obj.ctypes.data, obj.shape, strides, dtype, device, not obj.flags.writeable, "numpy", obj, obj)


def _read_cupy(obj: Any, name: str, device: tuple[str, int], stream: int | None, allowed: _Allowed) -> Array:
    dtype = _name(obj.dtype)
    _check_dtype(name, dtype, allowed)
    if stream is not None and stream != sys.modules["cupy"].cuda.get_current_stream(device[1]).ptr:
        # only the handshake matters here, and CuPy exports no bfloat16; it orders the current device's current stream
        with sys.modules["cupy"].cuda.Device(device[1]):
            _export(obj.view(np.uint16) if dtype == "bfloat16" else obj, name, device, stream)
    return Array(name, obj.data.ptr, obj.shape, _in_elements(obj, name), dtype, device, False, "cupy", obj, obj)


def _read_torch(obj: Any, name: str, device: tuple[str, int], stream: int | None, allowed: _Allowed) -> Array:
    torch = sys.modules["torch"]
    dtype = _name_in_torch(obj.dtype)
    _check_dtype(name, dtype, allowed)
    if obj.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} requires grad, and a kernel call is not recorded for autograd: call cusru.torch.sru, qrnn or "
            f"linear_recurrence, which is, or pass {name}.detach()"
        )
    if getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0 and _has_tangent(torch, obj):  # the level first: asked often
        raise TypeError(f"{name} carries a forward-mode tangent, and cusru has no forward-mode derivative: use reverse mode")
    if type(obj) is not torch.Tensor:
        if type(obj).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            what = f"{name} is a {type_name(obj)}, which is more than its memory"
            raise TypeError(f"{what}: {_TRACEABLE}, or pass the tensor within")
        if torch.nn.parameter.is_lazy(obj):
            raise TypeError(f"{name} is a {type_name(obj)}: its module must run once before it has memory")
    check_torch(obj, name)
    try:
        pointer, shape, strides = obj.data_ptr(), tuple(obj.shape), obj.stride()
    except Exception as error:
        raise TypeError(f"{name} is a torch tensor without memory of its own ({error}); in a transform {_TRACEABLE}") from error
    if not pointer and torch._is_functional_tensor(obj):  # an empty one's pointer is 0 in any case
        raise TypeError(f"{name} is a torch tensor without memory of its own; in a transform {_TRACEABLE}")
    if stream is not None and stream != torch.cuda.current_stream(device[1]).cuda_stream:
        with torch.cuda.device(device[1]):  # torch exports from the current device only
            _export(obj.detach(), name, device, stream)
    return Array(name, pointer, shape, strides, dtype, device, False, "torch", obj, obj)


_READERS = {"numpy": _read_numpy, "cupy": _read_cupy, "torch": _read_torch}


def _has_tangent(torch: Any, obj: Any) -> bool:
    try:
        return torch.autograd.forward_ad.unpack_dual(obj).tangent is not None
    except RuntimeError:  # below autograd, where a tensor without one cannot be asked
        return False


_TRACEABLE = "call cusru.torch.sru, qrnn or linear_recurrence, which can be traced and transformed"


def untraceable(function: _Function) -> _Function:
    """torch.compile breaks its graph where it meets `function`, which runs as it is: it compiles no frame from there down.
    TensorFlow's autograph does not rewrite it."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        # True only in what torch.compile makes of this frame; where there is no torch, bool() is False.
        if getattr(sys.modules.get("torch.compiler"), "is_dynamo_compiling", bool)():
            watcher = _watched_by(None)  # a break, and from here on it does not look
            try:
                return call(*args, **keywords)  # this very frame again, as it is
            finally:
                _watched_by(watcher)
        return function(*args, **keywords)

    marked = _break_at(call)
    marked.autograph_info__ = {}  # as autograph marks what it is done with
    return marked  # type: ignore[no-any-return]


def _break_at(function: Any) -> Any:
    """What torch.compiler.disable marks a function with. It would import torch._dynamo, and be one more frame in the way."""
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = _TRACEABLE  # read by torch from 2.8 on: before, its error does not say what to call
    return function


@_break_at
def _watched_by(watcher: Any) -> Any:
    """Set what torch.compile sees this thread's frames with, None: nothing; what it was. (It skips this frame: no tensor.)"""
    return sys.modules["torch._C._dynamo.eval_frame"].set_eval_frame(watcher)


def refuse_tracers() -> None:
    """Where torch records all that is done with its tensors, what a kernel does to their memory would be a constant."""
    for module, question, tracer in _TRACERS:
        ask = getattr(sys.modules.get(module), question, None)
        if ask is not None and ask():
            raise TypeError(f"{tracer} cannot record cusru.sru_forward and sru_backward, only their results: {_TRACEABLE}")


_TRACERS = (
    ("torch.jit", "is_tracing", "torch.jit.trace"),
    ("torch.fx.experimental.proxy_tensor", "get_proxy_mode", "make_fx (or torch.export)"),
)


def check_writable(array: Array) -> None:
    if array.readonly:
        raise ValueError(f"{array.name} is read-only ({array.framework}); it must be writable")
    if array.source is not None and not may_be_written(array.source):
        raise ValueError(f"{array.name} is an inference tensor, which torch lets nobody write outside torch.inference_mode()")


def mark_written(obj: Any) -> None:
    """Tell those who saved a tensor for a backward that it is no longer what they saved, as torch's own `out=` does."""
    if _framework(obj) == "torch":
        sys.modules["torch"].autograd.graph.increment_version(obj)


def check_torch(obj: Any, name: str) -> None:
    """That a tensor of torch is what its strides say."""
    torch = sys.modules["torch"]
    if obj.layout is not torch.strided:
        raise TypeError(f"{name} has layout {obj.layout}: pass a strided tensor ({name}.to_dense())")
    if obj.is_conj() or obj.is_neg():  # a negated view is exported by torch as if it were not
        raise TypeError(f"{name} is a lazily conjugated or negated view: pass {name}.resolve_conj().resolve_neg()")


def _read_capsule(obj: Any, name: str, device: tuple[str, int], stream: int | None, allowed: _Allowed) -> Array:
    framework = _framework(obj)
    # first, for JAX cannot export every dtype that it has, and TensorFlow aborts the process over its strings
    if framework != "other":
        _check_dtype(name, obj.dtype.name, allowed)
    if device[0] == "cuda" and stream is None:
        stream = stream_handle(None, obj, device)
    capsule = _export(obj, name, device, stream)
    tensor, owner, readonly = _consume(capsule, name)
    shape = tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else ()
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.ndim and tensor.strides else compact(shape)
    kind = _TYPE_CODES.get(tensor.code, f"dlpack{tensor.code}_")
    dtype = kind if (kind, tensor.bits) == ("bool", 8) else f"{kind}{tensor.bits}"
    if tensor.lanes != 1:
        dtype += f"x{tensor.lanes}"
    _check_dtype(name, dtype, allowed)
    device = _device(tensor.device_type, tensor.device_id, name)
    readonly = readonly or framework in ("jax", "tensorflow")  # whose arrays are values: XLA may share or fold them
    pointer = (tensor.data or 0) + tensor.byte_offset
    return Array(name, pointer, shape, strides, dtype, device, readonly, framework, owner, obj)


def _export(obj: Any, name: str, device: tuple[str, int], stream: int | None) -> Any:
    """obj's DLPack capsule, and on a device `stream` made to wait for what obj's producer has enqueued."""
    try:
        if _framework(obj) == "tensorflow":
            return obj.__dlpack__()  # takes no stream: it waits on the host
        wishes = {} if device[0] == "cpu" else {"stream": stream or 1}  # DLPack calls the legacy default stream 1
        try:
            return obj.__dlpack__(max_version=(1, 0), **wishes)
        except TypeError:  # a producer older than DLPack 1.0
            return obj.__dlpack__(**wishes)
    except Exception as error:
        kind = type(error) if type(error) in (ValueError, RuntimeError, MemoryError) else TypeError
        raise kind(f"{name}: {type_name(obj)} could not be exported through DLPack: {error}") from error


# ---- plain arrays, as fast as they can be read -----------------------------------------------------------------------

_Key = tuple[Any, ...]  # (shape, strides, dtype, device, address modulo 16) as its framework writes them
_Plain = tuple[str, tuple[str, int], int | None, list[int], tuple[_Key | None, ...]]


def read_plain(objects: list[Any], addresses: bool, stream: Any) -> _Plain | None:
    """The arrays' framework, their device, the stream to work on (None: CuPy's current one), their addresses (0 for None), and
    a key of all else that is known of each; NumPy's addresses only if asked for, since that takes long.

    None where they are more than arrays of one framework, `stream` is not its current one, or torch records what is done:
    `borrow` sees to these, and says what is wrong."""
    kind: Any = type(objects[0])
    reader = _plain_reader(kind)
    return reader(objects, addresses, stream) if reader else None


def _nothing(objects: list[Any]) -> tuple[list[int], list[_Key | None]]:
    return [0] * len(objects), [None] * len(objects)


def _plain_numpy(objects: list[Any], addresses: bool, stream: Any) -> _Plain | None:
    found, keys = _nothing(objects)
    for slot, a in enumerate(objects):
        if a is None:
            continue
        if type(a) is not np.ndarray or not a.flags.aligned:
            return None
        address = a.ctypes.data if addresses else 0
        found[slot], keys[slot] = address, (a.shape, a.strides, a.dtype, 0, address & 15)
    return "numpy", CPU, None, found, tuple(keys)


def _plain_cupy(objects: list[Any], addresses: bool, stream: Any) -> _Plain | None:
    cupy = sys.modules["cupy"]
    check_cupy_version(cupy.__version__)
    array = cupy.ndarray
    found, keys = _nothing(objects)
    for slot, a in enumerate(objects):
        if a is None:
            continue
        if type(a) is not array:
            return None
        data = a.data
        address = data.ptr
        if not address and a.size:
            return None
        found[slot], keys[slot] = address, (a.shape, a.strides, a.dtype, data.device_id, address & 15)
    device = "cuda", objects[0].data.device_id
    if stream is not None and stream_handle(stream, objects[0], device) != cupy.cuda.get_current_stream(device[1]).ptr:
        return None
    return "cupy", device, None, found, tuple(keys)


def _plain_torch(objects: list[Any], addresses: bool, stream: Any) -> _Plain | None:
    torch = sys.modules["torch"]
    if watched_by_torch():
        return None
    tensor, parameter, recorded = torch.Tensor, torch.nn.Parameter, torch.is_grad_enabled()
    found, keys = _nothing(objects)
    for slot, a in enumerate(objects):
        if a is None:
            continue
        kind = type(a)
        if (kind is not tensor and kind is not parameter) or (recorded and a.requires_grad) or a.is_neg():
            return None
        address = a.data_ptr()
        if not address and (a.numel() or torch._is_functional_tensor(a)):
            return None
        found[slot], keys[slot] = address, (a.shape, a.stride(), a.dtype, a.device, address & 15)
    device = objects[0].device
    if device.type == "cpu":
        return "torch", CPU, None, found, tuple(keys)
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    index = device.index
    handle = torch._C._cuda_getCurrentRawStream(index)
    if stream is not None and stream_handle(stream, objects[0], ("cuda", index)) != handle:
        return None
    return "torch", ("cuda", index), handle, found, tuple(keys)


def watched_by_torch() -> bool:
    """Whether a mode, a trace or a transform of torch's looks at what is done with tensors at this moment."""
    torch = sys.modules["torch"]
    c = torch._C
    try:
        return bool(
            c._len_torch_dispatch_stack()
            or c._len_torch_function_stack()
            or c._is_tracing()
            or c._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
        )
    except AttributeError:  # a torch that calls them otherwise, whose answer is not known: the careful way asks in public
        return True


_PLAIN_READERS = {("numpy", "ndarray"): _plain_numpy, ("cupy", "ndarray"): _plain_cupy, ("torch", "Tensor"): _plain_torch}


@functools.lru_cache(256)
def _plain_reader(kind: type) -> Callable[[list[Any], bool, Any], _Plain | None] | None:
    """For a framework's own class, which no subclass is."""
    for (framework, name), reader in _PLAIN_READERS.items():
        if kind is getattr(sys.modules.get(framework), name, None):
            return None if framework == "cupy" and sys.modules["cupy"].cuda.runtime.is_hip else reader
    return None


def describe(name: str, framework: str, key: _Key, device: tuple[str, int]) -> Array:
    """The array of a key, without its memory. Raises where `borrow` would."""
    shape, strides, dtype, where, offset = key
    if framework == "torch" and not isinstance(dtype, str):
        dtype = _name_in_torch(dtype)
        where = CPU if where.type == "cpu" else (where.type, where.index)
    elif not isinstance(dtype, str):
        if not dtype.isnative:
            raise TypeError(f"{name} has dtype {dtype.str}: a byte order that is not this machine's")
        strides, dtype = _whole_elements(strides, shape, dtype.itemsize, name), _name(dtype)
        where = device[0], where
    if where != device:
        raise ValueError(f"{name} is on {device_name(where)}")
    array = Array(name, offset, tuple(shape), tuple(strides), dtype, device, False, framework, None, None)
    if offset % array.itemsize and array.size:
        raise ValueError(f"{name} starts at an address that is not aligned to its dtype {dtype}")
    return array


def key_of(array: Array) -> _Key:
    """A borrowed array's, which says the same of it in every framework."""
    return array.shape, array.strides, array.dtype, array.device, array.pointer & 15


def may_be_written(obj: Any) -> bool:
    """Of a plain array."""
    if _framework(obj) == "torch":
        return not obj.is_inference() or sys.modules["torch"].is_inference_mode_enabled()
    return not isinstance(obj, np.ndarray) or obj.flags.writeable


class View(NamedTuple):
    """How NumPy sees a CPU's memory that somebody else holds."""

    slot: int  # the array's, in a list of addresses
    shape: tuple[int, ...]
    storage: np.dtype[Any]
    low: int  # of the first byte, from the address of element [0, ..., 0]
    strides: tuple[int, ...]  # in bytes


def see(addresses: list[int], views: Iterable[View]) -> list[Any]:
    """NumPy's arrays by their slots, None where there is none. The memory must outlive them. (A tensor's own numpy() takes
    longer, and forbids torch to resize it from then on.)"""
    arrays: list[Any] = [None] * len(addresses)
    for slot, shape, storage, low, strides in views:
        memory: Any = _MEMORY.from_address(addresses[slot] + low)
        arrays[slot] = np.ndarray(shape, storage, memory, -low, strides)
    return arrays


_MEMORY = ctypes.c_char * sys.maxsize


def as_cupy(obj: Any, device: tuple[str, int]) -> Any:
    """A compact device array of another framework as CuPy's over the same memory, in a fraction of the time that `borrow` takes.
    What its framework has in hand is not waited for."""
    cupy = _cupy(proven=False)
    capsule = obj.__dlpack__()  # which is not consumed, and owns what is read here
    tensor = _peek(capsule)
    pointer, shape, dtype = (tensor.data or 0) + tensor.byte_offset, obj.shape, obj.dtype
    memory = cupy.cuda.UnownedMemory(pointer, math.prod(shape) * dtype.itemsize, obj, device[1])
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


# ---- out -----------------------------------------------------------------------------------------------------------


class Blank(NamedTuple):
    """Compact memory that is yet to be allocated."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    dtype: str
    laid_out: tuple[int, ...]  # the extents as they lie in memory, outermost first
    order: tuple[int, ...] | None  # the axes, outermost first; None: C order
    axes: tuple[int, ...] | None  # how what is laid out is brought to the shape
    storage: np.dtype[Any]
    nbytes: int


def blank(shape: tuple[int, ...], dtype: str, order: tuple[int, ...] | None = None) -> Blank:
    """`order` lists the axes outermost first; None is C order."""
    axes = None if order is None else tuple([order.index(axis) for axis in range(len(shape))])
    laid_out = shape if order is None else tuple([shape[axis] for axis in order])
    nbytes = math.prod(shape) * storage(dtype).itemsize
    return Blank(shape, compact(shape, order), dtype, laid_out, order, axes, storage(dtype), nbytes)


def new(framework: str, what: Blank, device: tuple[str, int]) -> tuple[Any, int]:
    """An array of NumPy's, CuPy's or torch's own, and its address. On a device it belongs to the current device and stream."""
    if framework == "torch":
        torch = sys.modules["torch"]
        where = _torch_device(device)
        tensor = torch.empty_strided(what.shape, what.strides, dtype=getattr(torch, what.dtype), device=where)
        return tensor, tensor.data_ptr()
    owner, address = _allocate(what, device)
    return owner.view(_bfloat16()) if what.dtype == "bfloat16" else owner, address


def _allocate(what: Blank, device: tuple[str, int]) -> tuple[Any, int]:
    """NumPy's or CuPy's array of the storage's dtype."""
    owner: Any
    if device[0] == "cpu":
        raw = np.empty(what.nbytes + _ALIGNMENT, np.uint8)
        address = raw.ctypes.data
        start = -address % _ALIGNMENT
        address += start
        owner = np.ndarray(what.laid_out, what.storage, raw, start)  # a slice of length 0 would start at raw's own address
    else:
        owner = _cupy(proven=True).empty(what.laid_out, what.storage)
        address = owner.data.ptr
    return owner if what.axes is None else owner.transpose(what.axes), address


def order_like(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of torch's empty_like of such a tensor as they lie in memory, outermost first: by their strides, and one whose
    stride is 0 between the neighbours that it has. (To ask torch itself, on its meta device, would load its compiler.)"""
    axes = list(reversed(range(len(strides))))  # sorted by insertion, innermost first
    for start in range(1, len(axes)):
        i = start
        for j in reversed(range(start)):
            inner, outer = axes[j], axes[i]
            if not strides[inner] or not strides[outer]:
                continue
            if strides[inner] < strides[outer]:
                break
            if strides[inner] > strides[outer] or shape[inner] > shape[outer]:
                axes[j], axes[i] = outer, inner
                i = j
    return tuple(reversed(axes))


@functools.lru_cache(64)
def _torch_device(device: tuple[str, int]) -> Any:
    torch = sys.modules["torch"]
    return torch.device("cpu") if device == CPU else torch.device(*device)


def empty(
    name: str,
    shape: Iterable[int],
    dtype: str,
    device: tuple[str, int],
    like_framework: str,
    strides_order: Iterable[int] | None = None,
) -> Array:
    """New compact memory. `strides_order` lists the axes outermost first; None is C order.

    On a device it is CuPy's, on the current device and stream.
    """
    what = blank(tuple(shape), dtype, None if strides_order is None else tuple(strides_order))
    owner, pointer = _allocate(what, device)
    return Array(name, pointer, what.shape, what.strides, dtype, device, False, like_framework, owner, owner)


def give(array: Array, u: Array) -> Any:
    """What `empty` made, as the type of `u`, over the same memory."""
    export = _Export(array)
    if u.framework == "torch":
        return sys.modules["torch"].from_dlpack(export)
    if u.framework == "jax":
        import jax.dlpack  # not an attribute of jax until imported
        import jax.experimental

        # JAX would round float64 to float32 where its flag is off: u came as float64, so this goes back as that.
        x64 = getattr(jax if hasattr(jax, "enable_x64") else jax.experimental, "enable_x64")  # noqa: B009
        with x64(True) if array.dtype == "float64" else contextlib.nullcontext():
            where = next(iter(u.source.devices()))
            if where.platform == "cpu" and where.id:  # not the first of JAX's CPU devices: this copies
                return jax.dlpack.from_dlpack(export, device=where)
            return jax.dlpack.from_dlpack(export)
    if u.framework == "tensorflow":
        if array.device[0] == "cuda":  # its import knows no streams
            sys.modules["cupy"].cuda.get_current_stream().synchronize()
        capsule = export.__dlpack__()
        if array.strides == compact(array.shape):
            _peek(capsule).strides = None  # it checks them more strictly than need be where an extent is 0
        tensorflow = sys.modules["tensorflow"]
        result = tensorflow.experimental.dlpack.from_dlpack(capsule)
        if array.device != CPU or result.device == u.source.device:
            return result
        with tensorflow.device(u.source.device):
            return tensorflow.identity(result)
    if u.framework == "other" and hasattr(u.source, "__array_namespace__"):
        namespace = u.source.__array_namespace__()
        if hasattr(namespace, "from_dlpack"):
            return namespace.from_dlpack(export)
    return array.owner.view(_bfloat16()) if array.dtype == "bfloat16" else array.owner


class _Export:
    """What a framework's from_dlpack is handed: NumPy's or CuPy's own capsule, with uint16 relabelled as bfloat16.

    So they bring the deleter, written in C, that is safe on any thread and when the interpreter shuts down.
    """

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, **wishes: Any) -> Any:
        capsule = self.array.owner.__dlpack__(**wishes)
        if self.array.dtype == "bfloat16":
            _peek(capsule).code = _BFLOAT
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.array.device
        return (1 if kind == "cpu" else 2), index


# ---- overlap -------------------------------------------------------------------------------------------------------

_AFFORDABLE = 1 << 16  # candidates, or elements, that an exact answer may look at: about a millisecond


def overlaps(a: Array, b: Array) -> bool:
    """Whether two arrays share a byte. Exact, unless that takes too long: then True when their bounds meet."""
    if a.device != b.device or not a.size or not b.size:
        return False
    (a_low, a_high), (b_low, b_high) = bounds(a), bounds(b)
    if a_high <= b_low or b_high <= a_low:
        return False
    try:  # nothing is read: views of device memory do as well
        a_bytes, b_bytes = (_view(x, f"|V{x.itemsize}", True) for x in (a, b))
        return np.shares_memory(a_bytes, b_bytes, max_work=_AFFORDABLE)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def overlapping(written: list[Array], read: Iterable[Array]) -> tuple[Array, Array] | None:
    """The first array to be written that shares a byte with another, read or written, and that other."""
    others = [(b, *bounds(b)) for b in read if b.size]
    for a in written:
        if not a.size:
            continue
        low, high = bounds(a)
        for b, b_low, b_high in others:
            if b_low < high and low < b_high and overlaps(a, b):
                return a, b
        others.append((a, low, high))
    return None


def overlaps_itself(a: Array) -> bool:
    """Whether two indices of one array reach the same element. Exact, unless that takes too long: then True."""
    if not a.size:
        return False
    axes = sorted([(abs(stride), extent) for stride, extent in zip(a.strides, a.shape, strict=True) if extent > 1])
    reach, nested = 0, True
    for stride, extent in axes:
        nested = nested and stride > reach  # each step of this axis clears all that the inner ones reach
        reach += stride * (extent - 1)
    if nested:
        return False
    if a.size > reach + 1 or a.size > _AFFORDABLE:
        return True
    offsets = np.zeros(1, np.int64)
    for stride, extent in axes:
        offsets = np.add.outer(offsets, stride * np.arange(extent)).ravel()
    return len(np.unique(offsets)) < a.size


def bounds(a: Array) -> tuple[int, int]:
    """The first byte of a, and the one after its last."""
    low, high = extent(a)
    return a.pointer + low, a.pointer + high


def extent(a: Array) -> tuple[int, int]:
    """The same, from the address of element [0, ..., 0]."""
    low, high = 0, 1
    for stride, count in zip(a.strides, a.shape, strict=True):
        if stride < 0:
            low += stride * (count - 1)
        else:
            high += stride * (count - 1)
    itemsize = a.itemsize
    return low * itemsize, high * itemsize


# ---- DLPack's C structures, by ctypes ------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


# prototypes of our own: setting argtypes on ctypes.pythonapi would change them for the whole process
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)  # called with the GIL held, as a capsule's own destructor would


class _Owner:
    """A managed tensor whose deleter is ours to call: once, when the last reference goes."""

    __slots__ = ("address", "deleter")

    def __init__(self, address: int, deleter: int | None) -> None:
        self.address = address
        self.deleter = _Deleter(deleter) if deleter else None

    def __del__(self) -> None:
        if self.deleter is not None:
            self.deleter(self.address)


def _managed(capsule: Any) -> tuple[bytes, int, _Managed | _ManagedVersioned]:
    for kind, structure in ((_VERSIONED, _ManagedVersioned), (_LEGACY, _Managed)):
        if _capsule_is_valid(capsule, kind):
            address = _capsule_pointer(capsule, kind)
            return kind, address, structure.from_address(address)
    raise TypeError(f"not a fresh DLPack capsule: {capsule!r}")


def _peek(capsule: Any) -> _Tensor:
    tensor: _Tensor = _managed(capsule)[2].tensor
    return tensor


def _consume(capsule: Any, name: str) -> tuple[_Tensor, _Owner, bool]:
    """A capsule's tensor, the owner that frees it, and whether it is read-only."""
    try:
        kind, address, managed = _managed(capsule)
    except TypeError as error:
        raise TypeError(f"{name}: its __dlpack__ returned something that is {error}") from error
    _capsule_rename(capsule, _USED[kind])
    owner = _Owner(address, managed.deleter)
    if kind == _VERSIONED and managed.major > 1:
        raise TypeError(f"{name} speaks DLPack {managed.major}.{managed.minor}, and cusru 1.x")
    return managed.tensor, owner, kind == _VERSIONED and bool(managed.flags & _READ_ONLY)


# ---- small parts ---------------------------------------------------------------------------------------------------


class _Memory:
    """Lends an address to NumPy, whose array then keeps `owner` alive."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def _view(a: Array, typestr: str, readonly: bool) -> np.ndarray:
    itemsize = a.itemsize
    strides = tuple([stride * itemsize for stride in a.strides])
    interface = {"data": (a.pointer, readonly), "shape": a.shape, "strides": strides, "typestr": typestr, "version": 3}
    return np.asarray(_Memory(interface, a.owner))


def compact(shape: tuple[int, ...], order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Strides without gaps, the axes in this order in memory, outermost first; None: C order."""
    strides, stride = [0] * len(shape), 1
    for axis in reversed(range(len(shape)) if order is None else order):
        strides[axis] = stride
        stride *= max(shape[axis], 1)
    return tuple(strides)


def _in_elements(obj: Any, name: str) -> tuple[int, ...]:
    """NumPy's or CuPy's strides, which are in bytes, in elements."""
    return _whole_elements(obj.strides, obj.shape, obj.itemsize or 1, name)


def _whole_elements(strides: tuple[int, ...], shape: tuple[int, ...], itemsize: int, name: str) -> tuple[int, ...]:
    for step, extent in zip(strides, shape, strict=True):
        if step % itemsize and extent > 1 and 0 not in shape:
            raise ValueError(f"{name} has strides of {strides} bytes: not whole elements of {itemsize} bytes")
    return tuple([step // itemsize for step in strides])


@functools.lru_cache(64)
def _itemsize(dtype: str) -> int:
    """Of a dtype that NumPy has, and so of each that cusru takes; else 1: whoever borrows one looks at no more than its name."""
    try:
        return max(np.dtype(_storage(dtype)).itemsize, 1)
    except TypeError:
        return 1


@functools.lru_cache(64)
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # NumPy composes it anew each time


@functools.lru_cache(64)
def _name_in_torch(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def storage(dtype: str) -> np.dtype[Any]:
    """NumPy's dtype for the memory of a dtype."""
    return np.dtype(_storage(dtype))


@functools.lru_cache(64)
def _storage(dtype: str) -> str:
    """NumPy's type string for the memory of a dtype."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).str


def _bfloat16() -> np.dtype[Any]:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError("bfloat16 NumPy and CuPy arrays need ml_dtypes: pip install ml_dtypes") from error
    dtype: np.dtype[Any] = np.dtype(bfloat16)
    return dtype


def _framework(obj: Any) -> str:
    kind: Any = type(obj)
    return _framework_of(kind)


@functools.lru_cache(256)
def _framework_of(kind: type) -> str:
    if issubclass(kind, np.ndarray):
        return "numpy"
    for framework, array in (("cupy", "ndarray"), ("torch", "Tensor"), ("jax", "Array"), ("tensorflow", "Tensor")):
        base = getattr(sys.modules.get(framework), array, None)
        if isinstance(base, type) and issubclass(kind, base):
            return framework
    return "other"


def _cupy(proven: bool) -> Any:
    """CuPy, and seen to work unless that is `proven`, as it is by any CuPy array."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(f"arrays on a CUDA device need CuPy: {INSTALL}") from error
    check_cupy_version(cupy.__version__)
    if not proven:
        _check_cuda()
    return cupy


@functools.cache  # of success: an exception is not cached
def check_cupy_version(version: str) -> None:
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (14, 2):
        raise ImportError(f"this is CuPy {version}, and cusru needs 14.2 or later: {INSTALL}")


@functools.cache  # of success: an exception is not cached
def _check_cuda() -> None:
    try:
        sys.modules["cupy"].cuda.runtime.getDeviceCount()
    except Exception as error:
        raise RuntimeError(f"CuPy finds no working CUDA ({error}). Is it the one for your driver? {INSTALL}") from error


def _device(kind: int, index: int, name: str) -> tuple[str, int]:
    if kind not in _DEVICES:
        where = _FOREIGN_DEVICES.get(kind, f"unknown (DLPack {kind})")
        raise ValueError(f"{name} is on {where} device {index}; cusru runs on CPUs and CUDA devices")
    return CPU if _DEVICES[kind] == "cpu" else ("cuda", index)


_TRACED = {("jax", "Tracer"), ("tensorflow", "SymbolicTensor"), ("keras", "KerasTensor"), ("torch", "Proxy")}


def _is_traced(obj: Any) -> bool:
    return any((base.__module__.partition(".")[0], base.__name__) in _TRACED for base in type(obj).__mro__)


def _no_array(obj: Any, name: str) -> TypeError:
    if _is_traced(obj):
        what = f"{name} is a traced value ({type_name(obj)}): it has no memory while jit, grad, vmap or the like trace"
        jax = any(base.__module__.startswith("jax") for base in type(obj).__mro__)
        return TypeError(f"{what}; call cusru.jax.sru, qrnn or linear_recurrence, which can be traced" if jax else what)
    hint = ": pass its .value()" if type(obj).__name__.endswith("Variable") else ""  # TensorFlow's
    return TypeError(f"{name} must be an array (NumPy's, or one that speaks DLPack), not {type_name(obj)}{hint}")


def type_name(obj: Any) -> str:
    kind = type(obj)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def device_name(device: tuple[str, int]) -> str:
    return "cpu" if device == CPU else f"{device[0]}:{device[1]}"
