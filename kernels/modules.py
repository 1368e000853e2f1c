"""Depthwise convolution as a module, and its way into networks that others have written."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import common, reference
from .depthwise import depthwise_conv2d, runs_kernels


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(channels, channels, 3, groups=channels)`` that runs ``depthwise_conv2d``.

    Arguments, parameters, state dict and initialisation are ``nn.Conv2d``'s. ``padding`` is 1 or "same", which at
    stride 2 (where ``nn.Conv2d`` has no "same") is TensorFlow's. With the kernels a bias costs a pass of its own.

    Raises:
        ValueError: the arguments describe another convolution than a depthwise 3x3 of stride 1 or 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ):
        common.check_choice("backend", backend, common.BACKENDS)
        rule = padding
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            1 if padding == "same" else padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]  # a string to its callers
            device,
            dtype,
        )
        if problem := _not_depthwise(self):
            raise ValueError(problem)
        self.padding_rule = "same" if rule == "same" else "symmetric"
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[N, C, H, W]``, or one ``[C, H, W]``, to as many channels of ``ceil(H / stride)`` rows."""
        if x.dim() == 3:
            return self(x.unsqueeze(0)).squeeze(0)
        stride, padding, bias = self.stride[0], self.padding_rule, self.bias
        if bias is None or runs_kernels(x, self.weight, stride, self.backend):
            y = depthwise_conv2d(x, self.weight, stride=stride, padding=padding, backend=self.backend)
            return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)
        return reference.conv2d(x, self.weight, bias, stride=stride, groups=self.groups, padding=padding)

    def extra_repr(self) -> str:
        """``nn.Conv2d``'s, with the rule where padding is TensorFlow's, and the backend."""
        rule = ", padding_rule='same'" if self.padding_rule == "same" else ""
        return f"{super().extra_repr()}{rule}, backend={self.backend!r}"


class Replacement(NamedTuple):
    """What ``replace_depthwise`` did: names of the modules it swapped, and why it left other grouped convolutions."""

    swapped: tuple[str, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} depthwise convolutions swapped: {', '.join(self.swapped) or 'none'}"]
        return "\n".join(lines + [f"kept {name}: {reason}" for name, reason in self.kept.items()])


def replace_depthwise(model: nn.Module, backend: str = "auto") -> Replacement:
    """Swap every depthwise 3x3 ``nn.Conv2d`` inside ``model`` for a ``DepthwiseConv2d``, in place.

    The new module holds the same parameters, hooks and training flag under the same name, so state dicts, optimizers
    and exponential averages are not disturbed. timm's ``Conv2dSame`` is swapped too, with TensorFlow's padding. Other
    grouped convolutions are kept, with a reason: 5x5, dilated, other classes derived from ``nn.Conv2d``.

    The kernels want channels_last activations: give the model ``model.to(memory_format=torch.channels_last)`` and such
    inputs, or ``backend="auto"`` runs torch's convolution.

    Args:
        model: any network; ``model`` itself is not replaced, only what it contains.
        backend: of the new modules; see ``depthwise_conv2d``.

    Returns:
        What was swapped and what was kept; print it.
    """
    common.check_choice("backend", backend, common.BACKENDS)
    made: dict[nn.Module, DepthwiseConv2d] = {}  # a module that stands in two places is swapped for one
    swapped, kept = [], {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.Conv2d) or module.groups == 1 or isinstance(module, DepthwiseConv2d):
            continue
        if reason := _not_replaceable(module) or ("it is the model itself" if module is model else None):
            kept[name] = reason
            continue
        if module not in made:
            made[module] = _with_kernels(module, backend)
        model.set_submodule(name, made[module])
        swapped.append(name)
    return Replacement(tuple(swapped), kept)


def _is_timm_same(conv: nn.Conv2d) -> bool:
    return type(conv).__name__ == "Conv2dSame" and type(conv).__module__.startswith("timm.")


def _not_replaceable(conv: nn.Conv2d) -> str | None:
    if type(conv) is not nn.Conv2d and not _is_timm_same(conv):
        return f"its class is {type(conv).__module__}.{type(conv).__name__}, not nn.Conv2d"
    if "forward" in conv.__dict__ or conv._compiled_call_impl is not None:
        return "its forward has been replaced or compiled"
    return _not_depthwise(conv, any_padding=_is_timm_same(conv))


def _not_depthwise(conv: nn.Conv2d, any_padding: bool = False) -> str | None:
    """What of ``conv`` is not a depthwise 3x3 convolution of stride 1 or 2 with a frame of zeros."""
    channels = conv.in_channels
    wanted: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("out_channels", conv.out_channels, (channels,)),
        ("groups", conv.groups, (channels,)),
        ("kernel_size", conv.kernel_size, ((3, 3),)),
        ("stride", conv.stride, ((1, 1), (2, 2))),
        ("dilation", conv.dilation, ((1, 1),)),
        ("padding_mode", conv.padding_mode, ("zeros",)),
    ]
    if not any_padding:
        wanted.append(("padding", conv.padding, ((1, 1), "same")))
    for name, got, choices in wanted:
        if got not in choices:
            return f"{name}: expected {' or '.join(map(str, choices))} for a depthwise 3x3 convolution, got {got!r}"
    return None


def _with_kernels(conv: nn.Conv2d, backend: str) -> DepthwiseConv2d:
    """A ``DepthwiseConv2d`` that shares everything ``conv`` is: parameters, buffers, hooks, flags."""
    module = DepthwiseConv2d.__new__(DepthwiseConv2d)
    module.__dict__ = conv.__dict__.copy()
    module.padding_rule = "same" if _is_timm_same(conv) else "symmetric"
    module.backend = backend
    return module
