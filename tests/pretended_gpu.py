"""A CPU that passes for a GPU, so that what only a GPU refuses is refused without one.

Every tensor's memory is marked with where it would lie; operations, `.to(device)` and `device=` carry the marks on. As
on a GPU, an operation on tensors from both places is a RuntimeError, and NumPy's view of one on the GPU a TypeError.
Where the CPU would wait until the GPU has done all that is queued is noted. Of a GPU's arithmetic, memory and speed
this says nothing.
"""

import contextlib
import os
import sys
import types

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
TO_SEE = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.bincount}


class Marks:
    """Which memory would lie on the GPU."""

    def __init__(self):
        self.places = {}  # address: (weak reference, True on the GPU); while that lives, no other gets the address

    def on_gpu(self, tensor):
        return self.places.get(tensor.untyped_storage()._cdata, (None, False))[1]

    def put(self, tensor, on_gpu):
        storage = tensor.untyped_storage()
        self.places[storage._cdata] = StorageWeakRef(storage), on_gpu
        return tensor


class Moved(torch.autograd.Function):
    """A copy at another place; its gradient is copied back."""

    @staticmethod
    def forward(ctx, tensor, marks, on_gpu, how):
        ctx.marks, ctx.dtype = marks, tensor.dtype
        ctx.on_gpu = marks.on_gpu(tensor)
        return marks.put(tensor.detach().to(copy=True, **how), on_gpu)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.marks.put(gradient.to(ctx.dtype, copy=True), ctx.on_gpu), None, None, None


class Operations(TorchDispatchMode):
    def __init__(self, marks, wait):
        super().__init__()
        self.marks, self.wait = marks, wait

    def __torch_dispatch__(self, operation, _, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        on_gpu = self.place(operation, args, kwargs, tensors)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                address = tensor.untyped_storage()._cdata
                views = address in known or (operation.overloadpacket is aten.set_ and address in self.marks.places)
                if not views:
                    self.marks.put(tensor, on_gpu)
        return result

    def place(self, operation, args, kwargs, tensors):
        """Whether the result lies on the GPU; RuntimeError where a GPU would refuse."""
        places = [self.marks.on_gpu(tensor) for tensor in tensors]
        device = kwargs.get("device")
        going_back = torch._C._current_graph_task_id() != -1  # there PyTorch asks for the device of the real memory
        if operation.overloadpacket is aten.copy_:
            if places[0] != places[1] and not any(args[2:]):
                self.wait(operation)
            return places[0]
        if operation.overloadpacket is aten._to_copy:
            return places[0] if device is None else torch.device(device).type == "cuda"
        if operation in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if places[0] and any(index.dtype == torch.bool or not self.marks.on_gpu(index) for index in indices):
                self.wait(operation)
            tensors = [tensors[0], *(index for index in indices if self.marks.on_gpu(index)), *args[2:3]]
        large = {self.marks.on_gpu(tensor) for tensor in tensors if tensor.dim()}
        if len(large) > 1 or (large == {False} and any(places)):
            shapes = ", ".join(
                f"{tuple(tensor.shape)} on the {'CG'[self.marks.on_gpu(tensor)]}PU" for tensor in tensors
            )
            raise RuntimeError(f"Expected all tensors to be on the same device: {operation} of {shapes}")
        if operation.overloadpacket in TO_SEE and any(places):
            self.wait(operation)
        if device is not None and not (going_back and (any(places) or not places)):
            return torch.device(device).type == "cuda"
        return any(places) or (going_back and not places)


class Functions(TorchFunctionMode):
    def __init__(self, marks, wait):
        super().__init__()
        self.marks, self.wait = marks, wait

    def __torch_function__(self, function, _, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or CPU).type == "cuda":
            if isinstance(args[0], torch.Tensor):
                return args[0].to(**kwargs)
            self.wait(name)
            return self.marks.put(function(*args, **kwargs | {"device": CPU}).clone(), True)
        if not args or not isinstance(args[0], torch.Tensor):
            return function(*args, **kwargs)
        tensor, on_gpu = args[0], self.marks.on_gpu(args[0])
        if function == torch.Tensor.device.__get__:
            return GPU if on_gpu else CPU
        if function == torch.Tensor.is_cuda.__get__:
            return on_gpu
        if name in ("numpy", "__array__") and on_gpu:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "tolist" and on_gpu:
            self.wait(name)
        if name == "pin_memory":
            return tensor
        if name in ("to", "cpu", "cuda"):
            return self.moved(tensor, on_gpu, name, args[1:], kwargs)
        return function(*args, **kwargs)

    def moved(self, tensor, on_gpu, name, args, kwargs):
        copy, target = kwargs.pop("copy", False), on_gpu
        if name != "to":
            target, dtype, non_blocking, layout = name == "cuda", None, kwargs.get("non_blocking", False), None
        elif args and isinstance(args[0], torch.Tensor):
            target, dtype, layout = self.marks.on_gpu(args[0]), args[0].dtype, kwargs.get("memory_format")
            non_blocking = kwargs.get("non_blocking", False)
        else:
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
            target = on_gpu if device is None else device.type == "cuda"
        how = {"dtype": tensor.dtype if dtype is None else dtype, "memory_format": layout or torch.preserve_format}
        if target == on_gpu:
            return tensor.to(copy=copy, **how)
        if not non_blocking:
            self.wait(name)
        return Moved.apply(tensor, self.marks, target, how)


class Event:
    """A torch.cuda.Event; `wait` is told of synchronize()."""

    def __init__(self, wait):
        self.wait = wait

    def record(self, stream=None):
        pass

    def synchronize(self):
        self.wait("synchronize")

    def elapsed_time(self, other):
        return 1.0


def caller():
    """(file, function) of the innermost frame that is neither PyTorch's nor of this file."""
    frame, torch_folder = sys._getframe(1), os.path.dirname(torch.__file__)
    while frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(torch_folder):
        frame = frame.f_back
    return os.path.basename(frame.f_code.co_filename), frame.f_code.co_name


@contextlib.contextmanager
def pretended_gpu(monkeypatch):
    """Within it torch.cuda has a GPU. Gives a list, which grows by a line for each place where the CPU would wait."""
    waits, marks = [], Marks()

    def wait(what):
        file, function = caller()
        waits.append(f"{file} {function}: {what}")

    def deepcopy(tensor, memo, plain=torch.Tensor.__deepcopy__):
        copied = plain(tensor, memo)
        return marks.put(copied, marks.on_gpu(tensor))

    def grouped(lists, indices=False, plain=torch._C._group_tensors_by_device_and_dtype):
        groups = plain(lists, indices).items()
        return {(GPU if marks.on_gpu(group[0][0][0]) else CPU, dtype): group for (_, dtype), group in groups}

    properties = types.SimpleNamespace(name="pretended GPU", total_memory=16 << 30)
    gpu = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "synchronize": lambda device=None: wait("synchronize"),
        "Event": lambda enable_timing=False: Event(wait),
        "reset_peak_memory_stats": lambda device=None: None,
        "mem_get_info": lambda device=None: (8 << 30, 16 << 30),
        **dict.fromkeys(("max_memory_allocated", "memory_allocated", "memory_reserved"), lambda device=None: 5_000_000),
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": lambda states: None,
    }
    with monkeypatch.context() as patch:
        for name, value in gpu.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.Tensor, "__deepcopy__", deepcopy)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
        with Functions(marks, wait), Operations(marks, wait):
            yield waits
