"""The captured call: a value that has not been computed yet.

When a chain has a kernel, its collectors do not compute when they are called. They hand
back a `DeferredOutput`, which carries the call. If it reaches the chain's `FusedModule`
untouched, the kernel takes the captured inputs and the member never runs. If anything else
touches it first, the member runs, once, on the inputs it was given and in the context it
was called in, and everything goes on as if nothing had been fused.

The call travels in the value itself. So threads, recursion and exceptions cannot mix two
calls up, and a call nobody uses is freed like any other object.
"""

from __future__ import annotations

import copy
import inspect
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import BuiltinMethodType, FrameType, MemberDescriptorType, MethodType, UnionType
from typing import Any

import torch
from torch import Tensor, nn

from .code import is_calling_torch, is_reading_class, types_asked_for
from .context import Context, SavedTensorHooks, calling_context
from .errors import DeferredUseError
from .tracing import look_at_trace, trace_again
from .uses import OF_GRADIENT

IMMUTABLE = (  # No set: Dynamo of torch 2.8 cannot look a type up in one.
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)
# What is asked for the gradient of a value that is no leaf.
_DIFFERENTIATING = (torch.autograd.grad, torch.autograd.backward)
_DYNAMO = os.path.join(os.path.dirname(torch.__file__), "_dynamo")


class NotCapturableError(Exception):
    """A call whose inputs could change unnoticed before its value is used; the text says which."""


class CapturedCall:
    """One call of one collector: what was called, with what, and in which context.

    Args:
        run: computes the value; called as `run(module, args, kwargs)`.
        module: the collector.
        origin: knows the collector's `path`, `form` and `speculation`.
        weights: parameters and buffers the value depends on.
        context: the context of the call.
    """

    def __init__(
        self,
        run: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Any],
        module: nn.Module,
        origin: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: list[Tensor],
        context: Context,
    ) -> None:
        if holds_none(args, kwargs):
            # No value can stand for None: `is` asks nobody.
            raise NotCapturableError("got None, which it may return as it is")
        known = self.weights = len(weights)
        self.run = run
        self.module = module
        self.origin = origin
        self.args = args
        self.kwargs = kwargs
        self.tensors = weights
        self.context = context
        self.versions: list[tuple[int, bool]] | None = None
        self.copied: list[int] = []
        self.done = False
        self.replaced_in_graph = False
        self.value: Any = None
        if torch.compiler.is_dynamo_compiling():
            if not known:
                raise NotCapturableError("has no weights and may return its input as it is")
            look_at_trace(self)
            self._copy_inputs(every=True)
            return
        for value in args:
            _note(value, weights)
        for name in kwargs:
            _note(kwargs[name], weights)
        try:
            self.versions = [(tensor._version, tensor.requires_grad) for tensor in weights]
        except RuntimeError:  # Inference tensors do not count their modifications.
            if not known:
                # It may return its input or a view of it, and the copy would not be that.
                raise NotCapturableError(
                    "has no weights and got an inference tensor, which it may return as it is"
                ) from None
            self._copy_inputs(every=False)
            self.copied = _storages((self.args, self.kwargs))
            if any(weight.is_inference() for weight in weights[:known]):
                raise NotCapturableError("has a weight that is an inference tensor") from None
            self.tensors = [tensor for tensor in weights if not tensor.is_inference()]
            self.versions = [(tensor._version, tensor.requires_grad) for tensor in self.tensors]

    def _copy_inputs(self, every: bool) -> None:
        """Keep copies of the tensors whose modifications cannot be counted.

        Those are inference tensors, and all tensors while torch.compile traces; Inductor removes
        the copy again where nothing modifies the original.
        """
        self.args = _copied(self.args, every)
        self.kwargs = {name: _copied(self.kwargs[name], every) for name in self.kwargs}

    @property
    def path(self) -> str:
        """Where the collector is, for messages."""
        return self.origin.path  # type: ignore[no-any-return]

    def result(self) -> Any:
        """The member's own output, computed on first use."""
        if not self.done:
            args = computed(self.args)
            kwargs = computed(self.kwargs)
            self.check_unmodified()
            reason = self._why_not_plain_still()
            if reason is not None:
                self._refuse_changed(reason)
            now = calling_context()
            if now == self.context:
                self.value = self.run(self.module, args, kwargs)
            else:
                self.value = self._result_elsewhere(now, args, kwargs)
            if self.copied:
                self._check_no_alias(self.value)
            self.done = True
            self.args, self.kwargs, self.tensors = (), {}, []
        return self.value

    def _check_no_alias(self, value: Any) -> None:
        """Refuse a value that shares memory with the copy of an input instead of the input."""
        if not set(self.copied).isdisjoint(_storages(value)):
            raise DeferredUseError(
                f"{self.path!r} returned a view of its input, which was copied because inference "
                f"tensors do not count their modifications. Use torch.no_grad. "
                f"{_way_out(self.path)}"
            )

    def settle(self) -> None:
        """Compute the value while that is still possible."""
        if self.done:
            return
        if self._is_as_it_was() and self._why_not_plain_still() is None:
            self.result()

    def settle_for_compiled_code(self) -> None:
        """Compute the value of a call in eager mode before torch.compile traces its use.

        A trace cannot count modifications. Later calls run at once, or every one is traced anew.
        """
        if self.versions is None or self.done:
            return
        self.origin.speculation.used_in_compiled_code = True
        self.settle()

    def give_away(self) -> None:
        """Note, and say, that others get the value itself.

        What the output of a kernel in its place depends on is the kernel's input. So the gradient
        of the value itself lacks what comes by way of the kernel. From the next call on the
        members run.
        """
        if not self._lacks_gradient():
            return
        speculation = self.origin.speculation
        if speculation.needs_gradient:
            return
        speculation.needs_gradient = True
        warnings.warn(
            f"The output of {self.path!r} is given to others, where the code did not tell that it "
            f"would be, after the kernel has taken its place in the graph. In this call its "
            f"own gradient, and what a hook on it gets, lack what comes through the kernel; the "
            f"gradients of parameters and inputs have it. From the next call on the modules run "
            f"where gradients are recorded.",
            stacklevel=2,
        )

    def _lacks_gradient(self) -> bool:
        """Whether a kernel is in the graph in the place of the value, which requires a gradient."""
        if not self.replaced_in_graph:
            return False
        return any(isinstance(v, Tensor) and v.requires_grad for v in _flat(self.result()))

    def check_gradient_known(self) -> None:
        """Raise if the gradient of the value itself would lack what comes by way of a kernel."""
        if self._lacks_gradient():
            self.origin.speculation.needs_gradient = True
            raise DeferredUseError(
                f"The gradient of the output of {self.path!r} is asked for after the kernel has "
                f"taken its place in the graph: it would lack what comes through the kernel. From "
                f"now on the modules run where gradients are recorded: call the model again, or "
                f"under torch.no_grad(). {_way_out(self.path)}"
            )

    def check_unmodified(self) -> None:
        """Raise if an input or a weight was modified in place or replaced since the call."""
        if not self._is_as_it_was():
            self._refuse_modified()

    def _is_as_it_was(self) -> bool:
        if torch.compiler.is_dynamo_compiling():
            if self.versions is not None:
                return False  # Or it would have been computed before.
            look_at_trace(self)
            return True
        if self.versions is None:
            return True
        now = [(tensor._version, tensor.requires_grad) for tensor in self.tensors]
        if now != self.versions:
            return False
        form = self.origin.form
        return form is None or form.holds_same_weights(self.module, self.tensors[: self.weights])

    def _why_not_plain_still(self) -> str | None:
        """Why the module may not compute now what it would have computed at its call."""
        form = self.origin.form
        if form is None or self.versions is None or torch.compiler.is_dynamo_compiling():
            return None
        return form.why_not_plain(self.module, "", [])  # type: ignore[no-any-return]

    def _refuse_modified(self) -> None:
        raise DeferredUseError(
            f"An input or a weight of {self.path!r} was modified in place or replaced after "
            f"the module was called and before its output was used, so the captured call would "
            f"see the new values. {_way_out(self.path)}"
        )

    def _refuse_changed(self, reason: str) -> None:
        raise DeferredUseError(
            f"{self.path!r} was changed after it was called and before its output was used: it"
            f"{reason}. The captured call would run it as it is now. {_way_out(self.path)}"
        )

    def _result_elsewhere(self, now: Context, args: Any, kwargs: Any) -> Any:
        """Compute the value under the grad mode, autocast and hooks of the call itself."""
        grad, autocast, transforms, *rest = self.context
        if transforms != now[2]:
            self._refuse_mode()
        if not rest or torch.compiler.is_dynamo_compiling():
            device = self._device_type()
            with torch.set_grad_enabled(grad), torch.autocast(device, enabled=autocast):
                return self.run(self.module, args, kwargs)
        inference, forward_ad, hooks, *modes = rest[:5]
        now_inference, now_forward_ad, now_hooks, *now_modes = now[3:8]
        if modes != now_modes:
            self._refuse_mode()
        if grad and forward_ad and not now_forward_ad and not now_inference:
            _refuse_in_autograd_function(self)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(torch.autocast(self._device_type(), enabled=False))
            if hooks != now_hooks:
                stack.enter_context(SavedTensorHooks(hooks))
            return self.run(self.module, args, kwargs)

    def _device_type(self) -> str:
        return self.tensors[0].device.type if self.tensors else "cpu"

    def _refuse_mode(self) -> None:
        raise DeferredUseError(
            f"The output of {self.path!r} is used for the first time under another torch.func "
            f"transform, TorchFunctionMode or TorchDispatchMode than the one the module was called "
            f"under. {_way_out(self.path)}"
        )


class DeferredOutput:
    """The output of a captured call, or one element of it. Touch it and it is computed."""

    # A plain class without `__slots__`: torch.compile traces nothing else through.
    def __init__(self, call: CapturedCall, index: int | None = None) -> None:
        self.__dict__["_captured_call"] = call
        self.__dict__["_output_index"] = index

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` asks when the type itself is not the answer.

        Code in Python gets the answer of the real value. C++ code that asks would believe the
        answer and read a tensor that is not there, so it gets an error. torch.compile itself
        sees the plain object that it can trace.
        """
        frame = sys._getframe(1)
        if "_captured_call" not in self.__dict__:
            return DeferredOutput
        if _is_compiling():
            self.__dict__["_captured_call"].settle_for_compiled_code()
            return DeferredOutput
        if _is_of_dynamo(frame):
            return DeferredOutput
        value = materialise(self)
        if not isinstance(value, Tensor):
            return type(value)
        if is_reading_class(frame):
            return type(value)
        if is_calling_torch(frame):
            return DeferredOutput  # It goes on to `__torch_function__`.
        asked = types_asked_for(frame)
        if asked is not None and all(map(_asks_in_python, _flat(asked))):
            return type(value) if isinstance(value, asked) else DeferredOutput
        path = self.__dict__["_captured_call"].path
        raise DeferredUseError(
            f"The output of {path!r} went into compiled code, such as an autograd.Function, or "
            f"into code that asks for its class in a way that cannot be read, before it reached "
            f"the fused module (called from {frame.f_code.co_filename}:{frame.f_lineno}). It "
            f"stands for a call that has not run, and compiled code would take it for a tensor. If "
            f"this is a checkpoint around a part of the block, checkpoint the whole block, with "
            f"use_reentrant=False. {_way_out(path)}"
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _DIFFERENTIATING:
            for call in captured_in((args, kwargs)):
                call.check_gradient_known()
        deferred: list[DeferredOutput] = []
        if not torch.compiler.is_dynamo_compiling():
            deferred += _deferred_in((args, kwargs))
        result = func(*materialise(args), **materialise(dict(kwargs or {})))
        for value in deferred:
            _give_away_itself(value, result)
        return result

    def __getattr__(self, name: str) -> Any:
        if name in ("_captured_call", "_output_index"):
            raise AttributeError(name)
        if name in OF_GRADIENT:
            self.__dict__["_captured_call"].check_gradient_known()
        value = getattr(materialise(self), name)
        if not self.__dict__["_captured_call"].replaced_in_graph:
            return value
        if not isinstance(value, (MethodType, BuiltinMethodType)):
            return _give_away_itself(self, value)
        return lambda *args, **kwargs: _give_away_itself(self, value(*args, **kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(materialise(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(materialise(self), name)

    def __copy__(self) -> Any:
        return copy.copy(materialise(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        value = materialise(self)
        is_tensor = isinstance(value, Tensor)
        return value.__reduce_ex__(protocol) if is_tensor else (_identity, (value,))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return materialise(self).__array__(*args, **kwargs)

    def __dir__(self) -> Iterable[str]:
        return dir(materialise(self))


def materialise(value: Any, seen: dict[int, Any] | None = None) -> Any:
    """The value with every `DeferredOutput` in it computed.

    Looks into tuples, lists, dicts and dataclasses, such as `ModelOutput`. Lists, dicts and
    dataclasses keep their identity; what holds nothing deferred is returned as it is. `seen`
    has the containers that were looked into already, by id.
    """
    kind = type(value)
    if kind is Tensor:
        return value
    if kind is DeferredOutput:
        if torch.compiler.is_dynamo_compiling():
            trace_again(value.__dict__["_captured_call"])
        return _value_of_output(value)
    if kind in IMMUTABLE or isinstance(value, Tensor):
        return value
    if isinstance(value, tuple):
        return _materialised_tuple(value, seen)
    fields = getattr(kind, "__dataclass_fields__", None)
    if not isinstance(value, (dict, list)) and fields is None:
        return value
    if not torch.compiler.is_dynamo_compiling():  # It knows no `id` of a container.
        seen = {} if seen is None else seen
        if id(value) in seen:
            return value
        seen[id(value)] = value
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            item = value[key]
            real = materialise(item, seen)
            if real is not item:
                _replace_item(value, key, item, real)
        return value
    for name in fields or ():
        item = getattr(value, name, None)
        real = materialise(item, seen)
        if real is not item:
            object.__setattr__(value, name, real)
    return value


def _replace_item(container: Any, key: Any, before: Any, after: Any) -> None:
    try:
        container[key] = after
    except Exception:  # It does not let others write to it.
        kind: Any = dict if isinstance(container, dict) else list
        kind.__setitem__(container, key, after)
        own = getattr(container, "__dict__", {})
        if own.get(key) is before:
            own[key] = after


def _materialised_tuple(value: tuple[Any, ...], seen: dict[int, Any] | None) -> Any:
    traced = torch.compiler.is_dynamo_compiling()
    if not traced:
        seen = {} if seen is None else seen
        if id(value) in seen:
            return seen[id(value)]
    items = [materialise(item, seen) for item in value]
    result: Any = value
    if not all(new is old for new, old in zip(items, value, strict=True)):
        result = _tuple_like(value, items)
    if seen is not None and not traced:
        seen[id(value)] = result
    return result


def _tuple_like(value: Any, items: list[Any]) -> Any:
    kind = type(value)
    if kind is tuple:
        return tuple(items)
    if torch.compiler.is_dynamo_compiling():
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    # Past a `__new__` of its own, which made these items of others.
    made: Any = tuple.__new__(kind, items)
    if own := getattr(value, "__dict__", None):
        made.__dict__.update(own)
    return made


def computed(value: Any) -> Any:
    """The arguments of a call with the deferred values among them computed.

    For the members themselves: unlike `materialise`, it does not count as a use by others.
    """
    if type(value) is DeferredOutput:
        return _value_of_output(value)
    if type(value) is tuple:
        return tuple([computed(item) for item in value])
    if type(value) is list:
        return [computed(item) for item in value]
    if type(value) is dict:
        return {name: computed(value[name]) for name in value}
    return value


def captured_in(value: Any) -> Iterator[CapturedCall]:
    """The calls whose outputs are in a value, or in containers in it."""
    for deferred in _deferred_in(value):
        yield deferred.__dict__["_captured_call"]


def _deferred_in(value: Any) -> Iterator[DeferredOutput]:
    pending, seen = [value], set()
    while pending:
        value = pending.pop()
        if type(value) is DeferredOutput:
            yield value
        if type(value) in (Tensor, DeferredOutput, *IMMUTABLE) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (dict, tuple, list)):
            pending.extend(value.values() if isinstance(value, dict) else value)
        fields = getattr(type(value), "__dataclass_fields__", ())
        own = getattr(value, "__dict__", {})  # An object may compute, or refuse, what is asked.
        pending.extend(own[name] for name in fields if name in own)
        pending.extend(getattr(value, name, None) for name in fields if _is_slot(value, name))


def _is_slot(value: Any, name: str) -> bool:
    found = inspect.getattr_static(type(value), name, None)
    return isinstance(found, MemberDescriptorType)


def _give_away_itself(deferred: DeferredOutput, result: Any) -> Any:
    """What an operation on a value returns; noted if the value itself is in it."""
    call: CapturedCall = deferred.__dict__["_captured_call"]
    if call.replaced_in_graph:
        value = _value_of_output(deferred)
        items = result if isinstance(result, (tuple, list)) else (result,)
        if any(item is value for item in items):
            call.give_away()
    return result


def _value_of_output(deferred: DeferredOutput) -> Any:
    result = deferred.__dict__["_captured_call"].result()
    index = deferred.__dict__["_output_index"]
    return result if index is None else result[index]


def holds_deferred(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call was given a deferred value directly."""
    for value in args:
        if type(value) is DeferredOutput:
            return True
    return any(type(kwargs[name]) is DeferredOutput for name in kwargs)


def holds_none(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call was given None, by itself or in a tuple."""
    for value in [*args, *[kwargs[name] for name in kwargs]]:
        if value is None or (type(value) is tuple and holds_none(value, {})):
            return True
    return False


def _note(value: Any, tensors: list[Tensor]) -> None:
    """Add the tensors in a captured input to `tensors`; refuse what could change unnoticed."""
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        tensors.append(value)
    elif kind is tuple:
        for item in value:
            _note(item, tensors)
    elif kind is not DeferredOutput and kind not in IMMUTABLE:
        raise NotCapturableError(f"got a {kind.__name__}, which may change before it is used")


def _copied(value: Any, every: bool) -> Any:
    kind = type(value)
    if kind is tuple:
        return tuple([_copied(item, every) for item in value])
    if kind is Tensor or kind is nn.Parameter:
        if not every and not value.is_inference():
            return value
        return value.clone()
    if kind is not DeferredOutput and kind not in IMMUTABLE:
        raise NotCapturableError(f"got a {kind.__name__}, which may change before it is used")
    return value


def _storages(value: Any) -> list[int]:
    """Where the tensors in a value are in memory."""
    if isinstance(value, Tensor):
        return [value.untyped_storage().data_ptr()] if value.numel() else []
    items = value.values() if isinstance(value, dict) else value
    if isinstance(items, (tuple, list, type({}.values()))):
        return [where for item in items for where in _storages(item)]
    return []


def _refuse_in_autograd_function(call: CapturedCall) -> None:
    tensors = [*call.tensors, *call.module.parameters()]
    if any(tensor.requires_grad for tensor in tensors):
        raise DeferredUseError(
            f"The output of {call.path!r} is used for the first time inside an autograd.Function, "
            f"such as a reentrant checkpoint, where its gradient would be lost. Checkpoint the "
            f"whole block, with use_reentrant=False. {_way_out(call.path)}"
        )


def _is_compiling() -> bool:
    """Whether torch.compile is at work here: it asks itself, or by code of others."""
    return torch._guards.CompileContext.current_compile_id() is not None


def _is_of_dynamo(frame: FrameType) -> bool:
    """Whether torch.compile asks, in its own code or in that of a guard."""
    code = frame.f_code
    guard = code.co_filename == "<string>" and code.co_varnames[:1] == ("L",)
    return guard or code.co_filename.startswith(_DYNAMO)


def _flat(asked: Any) -> list[Any]:
    if isinstance(asked, tuple):
        return [cls for item in asked for cls in _flat(item)]
    return list(asked.__args__) if isinstance(asked, UnionType) else [asked]


def _asks_in_python(cls: Any) -> bool:
    """Whether `isinstance` with this class reads `__class__` only; `torch.FloatTensor` reads on."""
    check = inspect.getattr_static(type(cls), "__instancecheck__", None)
    return check is type.__instancecheck__ or inspect.isfunction(check) or type(cls) is type(Tensor)


def _way_out(path: str) -> str:
    return f"To run these modules unfused: unfuse_modules(model, [{path!r}])."


def _identity(value: Any) -> Any:
    return value


def _forward_operators() -> None:
    """Give `DeferredOutput` the operators, which Python looks up on the class."""

    def unary(op: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda self: _give_away_itself(self, op(materialise(self)))

    def binary(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda self, other: op(materialise(self), materialise(other))

    def reflected(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda self, other: op(materialise(other), materialise(self))

    for name in (
        "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor",
        "lshift", "rshift",
    ):  # fmt: skip
        op = getattr(operator, f"__{name}__")
        setattr(DeferredOutput, f"__{name}__", binary(op))
        setattr(DeferredOutput, f"__r{name}__", reflected(op))
        setattr(DeferredOutput, f"__i{name}__", binary(getattr(operator, f"__i{name}__")))
    setattr(DeferredOutput, "__divmod__", binary(divmod))
    setattr(DeferredOutput, "__rdivmod__", reflected(divmod))
    for name in ("lt", "le", "eq", "ne", "gt", "ge", "contains", "getitem", "delitem"):
        setattr(DeferredOutput, f"__{name}__", binary(getattr(operator, f"__{name}__")))
    for name in ("neg", "pos", "abs", "invert", "index"):
        setattr(DeferredOutput, f"__{name}__", unary(getattr(operator, f"__{name}__")))
    conversions = (bool, int, float, complex, len, iter, reversed, hash, repr, str)
    for function in conversions:
        setattr(DeferredOutput, f"__{function.__name__}__", unary(function))
    setattr(DeferredOutput, "__format__", binary(format))
    setattr(
        DeferredOutput,
        "__setitem__",
        lambda self, key, value: operator.setitem(
            materialise(self), materialise(key), materialise(value)
        ),
    )


_forward_operators()
