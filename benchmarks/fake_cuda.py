"""Training steps without a GPU, on fake tensors with device, dtype and shape, but no memory and no values.

with fake_tensors() as count:                # on fake CUDA, mixed devices or dtypes raise
    network = to_fake(SRNDeblurNet(), "cuda")
    network(torch.empty(1, 3, 64, 64, device="cuda"))
print(count.tflop, count.gigabytes, count.kernels, count.peak, count.syncs)

The backward engine needs a real device: on fake CUDA, `backward` only creates gradients of the right shapes.
Whole steps are counted on fake CPU tensors, with `like_cuda` for the operations that differ on CUDA.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Operations that only allocate memory.
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
# The CPU's attention -> CUDA's, which has the same FLOPs.
ON_CUDA = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}
# Operations that autocast runs in float32 on CUDA, but not or only partly on a CPU.
FLOAT32 = {
    *(F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.interpolate, F.softplus, F.mse_loss, F.l1_loss),
    *(F.smooth_l1_loss, F.binary_cross_entropy_with_logits),
    *(torch.exp, torch.log, torch.pow, torch.Tensor.exp, torch.Tensor.log, torch.Tensor.pow),
    *(torch.Tensor.sum, torch.sum, torch.Tensor.softmax),
}


class FakeMode(FakeTensorMode):
    """Fake mode that never initializes CUDA, even while `torch.cuda.is_available` is patched to True."""

    avoid_device_init = True


class Count(TorchDispatchMode):
    """Counter of the work that operations on fake tensors would do. GB are 10^9 bytes.

    `kernels` counts operations that compute or copy, not views and plain allocations. `moved` is the bytes
    that they read and write. `held` and `peak` are the current and maximum bytes of all tensors. Tensors from
    their own generator, and results that depend only on these, belong to the CPU and are not counted.
    `syncs` counts reads of a CUDA tensor's value, which wait for the device (except float16's one check for
    overflow). Such a read returns 0.5 for a float, 0 for an integer, True for a bool.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.moved = self.kernels = self.syncs = self.held = self.peak = self.trained = 0
        self._storages: dict[int, int] = {}  # bytes of each live storage
        self._host: set[int] = set()

    @property
    def tflop(self) -> float:
        return self.flops / 1e12

    @property
    def gigabytes(self) -> float:
        return self.moved / 1e9

    @property
    def peak_gb(self) -> float:
        return self.peak / 1e9

    def restart(self) -> None:
        """Reset the counts; tensors in memory remain counted in `held`."""
        self.flops = self.moved = self.kernels = self.syncs = 0
        self.peak = self.held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        result = func(*args, **kwargs)
        if func.namespace in ("aten", "c10d"):
            self._add(func, args, kwargs, result)
        return result

    def _number(self, tensor: Tensor) -> bool | int | float:
        self.syncs += tensor.is_cuda
        if tensor.dtype == torch.bool:
            return True
        return 0.5 if tensor.is_floating_point() else 0

    def _add(self, func, args: tuple, kwargs: dict, result) -> None:
        enter = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        keys = {_key(tensor) for tensor in enter}
        fresh = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and _key(leaf) not in keys]
        on_host = keys <= self._host if keys else kwargs.get("generator") is not None
        for tensor in fresh:
            self._hold(tensor, on_host)
        written = _written(func, args, kwargs)
        if any(t.is_cuda for t in enter) and any(not t.is_cuda for t in (*fresh, *written)):
            self.syncs += func.overloadpacket in (aten._to_copy, aten.copy_)
        if on_host or not (fresh or written) or func.overloadpacket in ALLOCATIONS:
            return
        outputs = {id(tensor) for tensor in written}
        only_written = func.overloadpacket in (aten.copy_, aten._foreach_copy_, aten.fill_, aten.zero_)
        if only_written or any(argument.is_out for argument in func._schema.arguments):
            read = [tensor for tensor in enter if id(tensor) not in outputs]
        else:
            read = enter
        self.kernels += 1
        self.moved += sum(map(_size, [*read, *fresh, *written]))
        if func.overloadpacket in (aten.convolution, aten.convolution_backward):
            self._relayout([tensor for tensor in enter if tensor.ndim == 4])
        formula = flop_registry.get(ON_CUDA.get(func.overloadpacket, func.overloadpacket))
        if formula:
            self.flops += formula(*args, **kwargs, out_val=result)

    def _relayout(self, tensors: list[Tensor]) -> None:
        """Count cuDNN's copies: it convolves in channels_last if one operand is, and converts the others."""
        last = torch.channels_last
        if any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in tensors):
            copied = [_size(t) for t in tensors if not t.is_contiguous(memory_format=last)]
            self.kernels += len(copied)
            self.moved += 2 * sum(copied)
            self.peak = max(self.peak, self.held + sum(copied))

    def _hold(self, tensor: Tensor, on_host: bool) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._storages:
            return
        self._storages[key] = 0 if on_host else storage.nbytes()
        self.held += self._storages[key]
        self.peak = max(self.peak, self.held)
        if on_host:
            self._host.add(key)
        weakref.finalize(storage, self._release, key).atexit = False

    def leave_on_host(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors as CPU memory, not as the device's."""
        for key in map(_key, tensors):
            self.held -= self._storages[key]
            self._storages[key] = 0
            self._host.add(key)

    def _release(self, key: int) -> None:
        self.held -= self._storages.pop(key)
        self._host.discard(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory; an expanded one is stored once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _written(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """List the arguments that an operation writes to."""
    if not func._schema.is_mutable:
        return []
    places = zip(func._schema.arguments, args, strict=False)
    values = [value for argument, value in places if argument.alias_info and argument.alias_info.is_write]
    values += [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class LikeCuda(TorchFunctionMode):
    """Function mode in which CPU tensors behave as on CUDA: autocast runs FLOAT32 in float32, norms copy
    strided inputs (GroupNorm to NCHW), and RMSNorm is one kernel each way, like LayerNorm."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = ([_float32(v) for v in args], {k: _float32(v) for k, v in kwargs.items()})
        if func in (F.group_norm, F.layer_norm, F.rms_norm):
            args = (args[0].contiguous(), *args[1:])
        return (F.layer_norm if func is F.rms_norm else func)(*args, **kwargs)


def _float32(value):
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _leaves(node) -> Iterator[Tensor]:
    """Yield the parameters below a node of the autograd graph, each once."""
    seen, ahead = set(), [node]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        ahead.extend(following for following, _ in node.next_functions)


def _backward(loss: Tensor, *args, **kwargs) -> None:
    """Create gradients of the right shapes, since the backward engine needs a real device."""
    for parameter in _leaves(loss.grad_fn):
        parameter.grad = torch.empty_like(parameter)


_real_engine = torch.autograd._engine_run_backward


def _engine_like_cuda(*args, **kwargs):
    """Run backward in LikeCuda for recomputed operations, since no function mode is active in `backward`."""
    with LikeCuda():
        return _real_engine(*args, **kwargs)


def _step_of_scaler(scaler, optimizer, state: dict, *args, **kwargs):
    return optimizer.step(*args, **kwargs)


_real_from_numpy = torch.from_numpy


def _from_numpy(array: np.ndarray) -> Tensor:
    return torch.empty(array.shape, dtype=_real_from_numpy(array).dtype)


def _to_numpy(tensor: Tensor, *args, **kwargs) -> np.ndarray:
    if tensor.is_cuda:
        raise TypeError("a CUDA tensor has no numpy array: copy it to the CPU first")
    falling = np.linspace(0.9, 0.1, tensor.numel()) if tensor.is_floating_point() else 0
    array = np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))
    array.flat = falling  # like a noise schedule, since samplers divide by its differences
    return array


def _swap(parameter: Tensor, other: Tensor) -> None:
    """Swap tensors for nn.Module.to; torch's own version rejects fake parameters with references."""
    parameter.data, parameter.fake_device = other.data, other.fake_device


@contextmanager
def fake_tensors(like_cuda: bool = False) -> Iterator[Count]:
    """Make all new tensors fake, and let torch report CUDA as available.

    Raises ValueError if torch was built without CUDA.
    """
    if not torch.backends.cuda.is_built():
        raise ValueError("fake CUDA tensors need the CUDA build of torch, which this is not")
    count, state = Count(), torch.get_rng_state()
    patches = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda *args: (9, 0),
        "torch.cuda.is_bf16_supported": lambda *args, **kwargs: True,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.amp.GradScaler._maybe_opt_step": _step_of_scaler,
        "torch.utils.swap_tensors": _swap,
        "torch.get_rng_state": lambda: state,
        "torch.set_rng_state": lambda state: None,
        "torch.from_numpy": _from_numpy,
        "torch.Tensor.numpy": _to_numpy,
        "torch.Tensor.pin_memory": lambda tensor: tensor,
        "ldm.data.image.is_finite": lambda image: True,
        "torch.utils._foreach_utils._foreach_supported_types": [Tensor, nn.Parameter, FakeTensor],
    }
    if like_cuda:
        patches["torch.autograd._engine_run_backward"] = _engine_like_cuda
    else:
        patches["torch.Tensor.backward"] = _backward
    entered = [mock.patch(name, value) for name, value in patches.items()]
    for patch in entered:
        patch.start()
    try:
        with FakeMode(), count, LikeCuda() if like_cuda else nullcontext():
            yield count
    finally:
        for patch in reversed(entered):
            patch.stop()


def is_fake() -> bool:
    """Return whether new tensors are fake."""
    return isinstance(torch.empty(0), FakeTensor)


def to_fake(module: nn.Module, device: str = "cuda", dtype: torch.dtype | None = None) -> nn.Module:
    """Replace a module's parameters and buffers in place by fake ones; it may be on the meta device."""
    for part in module.modules():
        if hasattr(part, "_device"):  # Lightning modules store their device
            part._device = torch.device(device)
        for name, value in part._parameters.items():
            if value is not None:
                kind = dtype if dtype and value.dtype == torch.float32 else value.dtype
                new = torch.empty(value.shape, dtype=kind, device=device)
                part._parameters[name] = nn.Parameter(new, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
    return module
