"""Stand-ins for a GPU on a machine that has none: they fail where a GPU would complain of a tensor's device.

`fake_gpu`: FakeTensors of PyTorch, which have shapes and devices but no values. A PyTorch that was built for CUDA asks
the driver in every backward pass, so that without one only the forward pass is made (`BACKWARD` says so).
`pretend_gpu`: tensors that say they lie on a GPU and compute on the CPU; backward too, and values can be looked at."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from conftest import everywhere
from ltnb import augment, core, ldmlr_published

GPU = torch.device("cuda:0")
BACKWARD = torch.cuda.is_available() or not torch.backends.cuda.is_built()  # of FakeTensors
FREE = ("_to_copy", "copy_", "lift_fresh")  # operations whose inputs may lie on several devices


class Generator(torch.Generator):
    "A generator that draws on the CPU and says which device it is for"

    def __new__(cls, device="cpu"):
        g = super().__new__(cls)
        g.at = torch.device(device)
        return g

    def __init__(self, device="cpu"):
        super().__init__()

    @property
    def device(self):
        return self.at


class CheckGenerators(TorchFunctionMode):
    "What a GPU refuses and its stand-ins would not: a generator of another device"

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out, g = func(*args, **(kwargs or {})), (kwargs or {}).get("generator")
        if isinstance(g, Generator) and out.device.type != g.device.type:
            raise RuntimeError(f"Expected a '{out.device.type}' device type for generator but found '{g.device.type}'")
        return out


def check_indices(func, args):  # the same for indices, which may also lie on the CPU
    if func.overloadpacket.__name__ not in ("index", "index_put", "index_put_", "_unsafe_index"):
        return
    if any(i is not None and i.device.type not in ("cpu", args[0].device.type) for i in args[1]):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")


class CheckIndices(TorchDispatchMode):
    "`check_indices` of every operation"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        check_indices(func, args)
        return func(*args, **(kwargs or {}))


def move(module, fn, recurse=True):
    "`Module._apply` with new parameters, as a tensor of one kind cannot become one of another"
    for m in module.children() if recurse else ():
        m._apply(fn)
    for own in (module._parameters, module._buffers):
        for k, v in own.items():
            if v is None:
                continue
            with torch.no_grad():
                new = fn(v)
            own[k] = new if new is v or own is module._buffers else torch.nn.Parameter(new, v.requires_grad)
    return module


@contextlib.contextmanager
def stand_ins(monkeypatch):
    "Generators, and what asks CUDA itself; tables that are kept for the process are made anew"
    tables = (augment._level_table, augment._policy_table)
    with monkeypatch.context() as m:
        m.setattr(torch, "Generator", Generator)
        m.setattr(torch.nn.Module, "_apply", move)
        everywhere(m, "dropout_seeded", lambda *key, device: contextlib.nullcontext())
        m.setattr(ldmlr_published, "seeded", lambda *key, device="cpu": core.seeded(*key))
        for table in tables:
            table.cache_clear()
        try:
            with CheckGenerators():
                yield m
        finally:
            for table in tables:
                table.cache_clear()


@contextlib.contextmanager
def fake_gpu(monkeypatch):
    "A block in which tensors have no values, and may lie on a GPU"
    with stand_ins(monkeypatch) as m, FakeTensorMode(allow_non_fake_inputs=True), CheckIndices():
        if not BACKWARD:
            m.setattr(torch.Tensor, "backward", lambda self: None)
        yield


class OnGPU(torch.Tensor):
    "A tensor that says it lies on a GPU; `held` has its values. PyTorch below Python takes it for one on the CPU"

    device, is_cuda, is_cpu = (property(lambda self, v=v: v) for v in (GPU, True, False))

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            dtype=held.dtype,
            storage_offset=held.storage_offset(),
            device="cpu",
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.tolist:
            return args[0].held.tolist()
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype), device=GPU)
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.cpu:
                return torch.ops.aten._to_copy(args[0], device=torch.device("cpu"))
            if func is torch.Tensor.to:
                return _to(*args, **kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def _to(x, *args, **kwargs):  # Tensor.to, which looks at the device below Python
    if args and isinstance(args[0], torch.Tensor):
        device, dtype, layout = args[0].device, args[0].dtype, None
    else:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type == x.device.type:
        return torch.Tensor.to(x, dtype or x.dtype, memory_format=layout)
    more = {} if layout is None else {"memory_format": layout}
    return torch.ops.aten._to_copy(x, dtype=dtype, device=device, **more)


def _on_gpu(x):
    return isinstance(x, OnGPU)


def _result_on_gpu(func, args, kwargs):  # inputs on two devices are refused
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    asked, name = kwargs.get("device"), func.overloadpacket.__name__
    if asked is not None and (asked.type == "cuda" or name == "_to_copy"):
        return asked.type == "cuda"
    if not tensors:
        return PretendMode.in_backward  # what a derivative makes lies where its inputs do
    if name.startswith("index") or name in FREE:
        return _on_gpu(tensors[0])
    if any(map(_on_gpu, tensors)) and any(not _on_gpu(t) and t.dim() for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")
    return any(map(_on_gpu, tensors))


def compute(func, args, kwargs):
    "One operation: devices are checked, and the values computed on the CPU"
    check_indices(func, args)
    gpu = _result_on_gpu(func, args, kwargs)
    held_args, held_kwargs = tree_map(lambda x: x.held if _on_gpu(x) else x, (args, kwargs))
    if kwargs.get("device") is not None:
        held_kwargs["device"] = torch.device("cpu")
    out = func(*held_args, **held_kwargs)
    known = {id(x.held): x for x in tree_leaves((args, kwargs)) if _on_gpu(x)}  # what was changed in place stays itself

    def wrap(x):
        if not gpu or not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else OnGPU(x)

    return tree_map(wrap, out)


class PretendMode(TorchDispatchMode):
    "`compute` of every operation, also of those that make tensors"

    in_backward = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def _backward(real):
    def backward(self, *args, **kwargs):
        PretendMode.in_backward = _on_gpu(self)
        try:
            return real(self, *args, **kwargs)
        finally:
            PretendMode.in_backward = False

    return backward


@contextlib.contextmanager
def pretend_gpu(monkeypatch):
    "A block in which tensors may say that they lie on a GPU, and have values"
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with stand_ins(monkeypatch) as m, PretendMode():
            m.setattr(torch.cuda, "_lazy_init", lambda: None)
            m.setattr(torch.Tensor, "backward", _backward(torch.Tensor.backward))
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
