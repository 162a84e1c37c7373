"""Gated MLPs, down(act(gate(x)) * up(x)), that keep less for the backward pass.

Autograd keeps gate(x), act(gate(x)), up(x) and their product: four tensors of the widest size in
the model. Only gate(x) and up(x) are needed; the other two are computed again in the backward
pass, an elementwise operation each. A module is taken only if one traced forward shows exactly this
structure, and if outputs and gradients then agree with those of its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from adarank_fast.adapters.groups import may_be_repeated
from adarank_fast.adapters.swapped import Swapped
from adarank_fast.undo import undone
from adarank_kernels.lora.op import is_watched

aten = torch.ops.aten
ACTIVATIONS = (aten.silu.default, aten.gelu.default)
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


class Structure:
    """How a module computes down(act(gate(x)) * up(x)).

    Attributes:
        first, second: names of the children that make the factors, in the order of their calls.
        gate_is_first: whether the first is the one that is activated.
        down: name of the last child.
        activate: the activation, as the traced forward called it.
        activation_module: the child that it was called by, or None.
        code: of the forward that was traced.
    """

    def __init__(self, trace: _Trace, code: object) -> None:
        (gate, up), self.down = trace.factors, trace.down
        self.first, self.second = (n for n in trace.calls if n in (gate, up))
        self.gate_is_first = self.first == gate
        self.activate, self.activation_module, self.code = trace.activate, trace.activation, code

    def holds(self, module: nn.Module, plain_class: type) -> bool:
        """Whether the module still computes what was traced."""
        act = self.activation_module
        return getattr(getattr(plain_class, "forward", None), "__code__", None) is self.code and (
            act is None or (not has_hooks(act) and any(act is m for m in module.children()))
        )


class _GatedMLP(Swapped):
    """Mixed in before a module's class."""

    HIDDEN = "_adarank_mlp"
    PLAIN: ClassVar[dict[type, type]] = {}
    _adarank_mlp: Structure

    def forward(self, *args: Tensor, **kwargs: object) -> Tensor:
        structure: Structure = self.__dict__["_adarank_mlp"]
        if (
            len(args) != 1
            or kwargs
            or torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or is_watched(args[0])
            or may_be_repeated()
            or not structure.holds(self, self.plain_class())  # type: ignore[arg-type]
        ):
            output: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
            return output
        return _compute(self, structure, args[0])


def _compute(module: Any, structure: Structure, x: Tensor) -> Tensor:
    children = module._modules
    first, second = children[structure.first](x), children[structure.second](x)
    gate, up = (first, second) if structure.gate_is_first else (second, first)
    down = children[structure.down]
    if not (gate.requires_grad or up.requires_grad) or not _plain_tensors(gate, up):
        unpacked: Tensor = down(structure.activate(gate) * up)
        return unpacked
    activated = structure.activate(gate)
    recipe = _Recipe(structure.activate, gate, up, [*down.parameters()])
    with saved_tensors_hooks(recipe.pack, recipe.unpack):
        recipe.know(activated, recipe.activated)
        product = activated * up
        recipe.know(product, recipe.product)
        output: Tensor = down(product)
    recipe.known.clear()  # addresses are used anew
    return output


def _plain_tensors(*tensors: Tensor) -> bool:
    return all(type(t) is Tensor and t.is_contiguous() for t in tensors)


Packed = Tensor | tuple[Callable[[], Tensor], torch.Size]  # or how it is computed again


class _Recipe:
    """What stands for act(gate) and act(gate) * up in the graph: how to compute them again."""

    def __init__(
        self,
        activate: Callable[[Tensor], Tensor],
        gate: Tensor,
        up: Tensor,
        parameters: Sequence[Tensor],
    ) -> None:
        self.activate, self.gate, self.up = activate, gate, up
        self.known: dict[int, tuple[Tensor, Callable[[], Tensor]]] = {}
        self.versions = [(t, t._version) for t in (gate, up, *parameters)]
        self.waiting: Tensor | None = None

    def know(self, tensor: Tensor, again: Callable[[], Tensor]) -> None:
        self.known[tensor.data_ptr()] = tensor, again

    def pack(self, tensor: Tensor) -> Packed:
        tensor_and_rule = self.known.get(tensor.data_ptr())
        if tensor_and_rule is None:
            return tensor
        whole, again = tensor_and_rule
        same = tensor.numel() == whole.numel() and tensor.dtype is whole.dtype
        if not same or not tensor.is_contiguous():
            return tensor
        return again, tensor.shape

    def unpack(self, packed: Packed) -> Tensor:
        for tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: a {tuple(tensor.shape)} tensor of a gated MLP is at "
                    f"version {tensor._version}; expected version {version}"
                )
        if isinstance(packed, Tensor):
            return packed
        again, shape = packed
        with torch.no_grad(), torch.autocast(self.gate.device.type, enabled=False):
            return again().view(shape)

    def product(self) -> Tensor:
        self.waiting = self.activate(self.gate.detach())
        return self.waiting * self.up.detach()

    def activated(self) -> Tensor:
        waiting, self.waiting = self.waiting, None
        return self.activate(self.gate.detach()) if waiting is None else waiting


class _Trace(TorchDispatchMode):
    """One forward: which children were called on what, and which operators ran between them."""

    def __init__(self, module: nn.Module) -> None:
        TorchDispatchMode.__init__(self)
        self.module = module
        self.linears = {name: m for name, m in module.named_children() if _is_linear(m)}
        self.calls: dict[str, tuple[Tensor, Tensor]] = {}
        self.operators: list[
            tuple[Callable[..., Tensor], tuple[object, ...], dict[str, object], Tensor]
        ] = []
        self.inside = self.repeated = False
        others = [m for m in module.children() if not _is_linear(m)]
        self.activation = others[0] if others else None

    def __torch_dispatch__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        if not self.inside:
            self.operators.append((func, args, kwargs or {}, output))
        return output

    def run(self, x: Tensor) -> object:
        def before(*_: object) -> None:
            self.inside = True

        def after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                self.inside = False
                self.repeated |= name in self.calls
                self.calls[name] = inputs[0], output

            return hook

        handles = [m.register_forward_pre_hook(before) for m in self.linears.values()]
        handles += [m.register_forward_hook(after(name)) for name, m in self.linears.items()]
        try:
            with self, torch.no_grad():
                return self.module(x)
        finally:
            for handle in handles:
                handle.remove()

    def matches(self, x: Tensor, output: object) -> bool:
        """Whether it was exactly down(act(gate(x)) * up(x)), each result passed on unchanged."""
        if len(self.calls) != 3 or len(self.operators) != 2 or self.repeated:
            return False
        (act, act_args, act_kwargs, activated), (mul, factors, _, product) = self.operators
        if act not in ACTIVATIONS or mul is not aten.mul.Tensor or len(act_args) != 1:
            return False
        made_by = {id(y): name for name, (_, y) in self.calls.items()}
        others = [f for f in factors if f is not activated]
        gate = made_by.get(id(act_args[0]))
        up = made_by.get(id(others[0])) if len(others) == 1 else None
        down = next((n for n, (given, _) in self.calls.items() if given is product), None)
        if None in (gate, up, down) or len({gate, up, down}) != 3:
            return False
        assert gate is not None and up is not None and down is not None
        if any(self.calls[n][0] is not x for n in (gate, up)) or self.calls[down][1] is not output:
            return False
        self.factors, self.down = (gate, up), down
        self.activate: Callable[[Tensor], Tensor] = lambda t: act(t, **act_kwargs)
        return True


def _is_linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks hang on the module itself, which would see other calls."""
    return any(getattr(module, name) for name in HOOKS)


def _find(module: nn.Module) -> Structure | None:
    """The module's structure, if it is a gated MLP whose own forward gives the same numbers."""
    if "forward" in module.__dict__ or has_hooks(module):
        return None
    sizes: set[int] = {cast(int, m.in_features) for m in module.children() if _is_linear(m)}
    others = sum(not _is_linear(m) for m in module.children())
    weights = [p for p in module.parameters() if p.is_floating_point()]
    if others > 1 or not weights or type(weights[0].data) is not Tensor:
        return None
    dtype, device = weights[0].dtype, weights[0].device
    generator = torch.Generator().manual_seed(0)
    for size in sorted(sizes):  # gate's and up's, not down's
        x = torch.randn(1, 4, size, generator=generator).to(device, dtype)
        trace = _Trace(module)
        try:
            output = trace.run(x)
        except Exception:  # the other size, or no forward of one tensor
            continue
        if trace.matches(x, output):
            structure = Structure(trace, type(module).forward.__code__)
            module.eval()  # one dropout mask is not another
            return structure if _agrees(module, structure, x) else None
    return None


def _agrees(module: nn.Module, structure: Structure, x: Tensor) -> bool:
    wanted = [p for p in module.parameters() if p.requires_grad]
    results = []
    with torch.enable_grad():
        for forward in (module.forward, lambda given: _compute(module, structure, given)):
            given = x.clone().requires_grad_()
            output = forward(given)
            grads = torch.autograd.grad(output.sin().sum(), [given, *wanted], allow_unused=True)
            results.append([output, *grads])
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 2e-2
    return all(
        (a is None and b is None)
        or (a is not None and b is not None and torch.allclose(a, b, tolerance, tolerance))
        for a, b in zip(*results, strict=True)
    )


def recompute_gated_mlps(model: nn.Module) -> int:
    """Give every gated MLP of the model a forward that keeps less; how many there are now.

    Modules are run a few times on four random rows; torch's generators are left as they were.
    """
    for module in list(model.modules()):
        if isinstance(module, Swapped) or sum(map(_is_linear, module.children())) != 3:
            continue
        training = {m: m.training for m in module.modules()}
        devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
        with undone(partial(_set_modes, training)), torch.random.fork_rng(devices=devices):
            module.train()  # a dropout between the factors is to be seen
            structure = _find(module)
        if structure is None:
            continue
        plain = type(module)
        swapped = next((cls for cls, old in _GatedMLP.PLAIN.items() if old is plain), None)
        if swapped is None:
            swapped = type(plain.__name__, (_GatedMLP, plain), {"__module__": __name__})
            _GatedMLP.PLAIN[swapped] = plain
        vars(module)["_adarank_mlp"] = structure
        module.__class__ = swapped
    return sum(1 for _ in gated_mlps(model))


def _set_modes(training: Mapping[nn.Module, bool]) -> None:
    for module, mode in training.items():
        module.training = mode


def restore_gated_mlps(model: nn.Module) -> None:
    """Their own classes again."""
    for module in gated_mlps(model):
        module.__class__ = _GatedMLP.PLAIN[type(module)]
        module.__dict__.pop("_adarank_mlp", None)


def gated_mlps(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forward computes a gated MLP as one step."""
    return (m for m in list(model.modules()) if isinstance(m, _GatedMLP))
