"""The whole network as cases for a GPU: ours, module by module in channels_last ("eager"), that through torch.compile.

Inference is in fp16: ours is the folded network; eager has half-precision weights; compiled is frozen, which folds
BatchNorm there too. A step of training is a forward under autocast in fp16, the loss, a backward and SGD, the same for
all; its learning rate is 0, so that the work is a step's and the weights stay. The truth is the network in fp32 (IEEE).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import DepthwiseConv2d
from kernels.roofline import device_of
from mnv2 import MobileNetV2, fold
from mnv2.model import InvertedResidual, layer_shapes

from .executions import MB, ours, rows_of, totals
from .gpu_tools import MIB, Case, Counted, Tools, ratios, with_graphs
from .parity import assert_alike
from .timing import Call, significant

OURS = "triton"  # the backend of our side
DTYPE = torch.float16
LOSS_SCALE = 1024.0  # gradients of fp16 would be lost without one; a fixed one needs no look at them
FLIPS = 2e-2  # share of a result that may change where rounding moves a number over an edge of ReLU6
CLASSES = 1000


class Plain(nn.Module):
    """The modules of a network one after the other, each convolution torch's own."""

    def __init__(self, model: MobileNetV2):
        super().__init__()
        self.model = copy.deepcopy(model)
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, DepthwiseConv2d):
                    setattr(module, name, _torchs(child))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of pictures in channels_last."""
        for layer in self.model.features:
            if isinstance(layer, InvertedResidual):
                x = x + layer.conv(x) if layer.shape.residual else layer.conv(x)
            else:
                x = layer(x)
        return self.model.classifier(x.mean((2, 3)))


def _torchs(conv: DepthwiseConv2d) -> nn.Conv2d:
    """The same convolution, of the same parameters, as torch's module."""
    made = nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1, groups=conv.groups, bias=False)
    made.weight = conv.weight
    return made


@torch.no_grad()
def settle(model: MobileNetV2, x: Tensor) -> None:
    """Give ``model`` the running statistics of ``x``: with those of a new one logits are 1e-9, and all look alike."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the average over all batches: of this one alone
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()


@dataclass(frozen=True)
class NetworkJob:
    """A variant of the network, a batch, and whether it trains."""

    alpha: float
    resize: int
    batch: int
    training: bool

    def __str__(self) -> str:
        return f"{'training step' if self.training else 'inference'} alpha {self.alpha} {self.resize} px"

    def name(self, batch: int) -> str:
        """Of the case of ``batch`` pictures."""
        return f"{self}, fp16, batch {batch}"


@dataclass(frozen=True)
class NetworkCase(Case):
    """A case whose calls without a graph take so many bytes of memory beyond weights and pictures."""

    peak: Mapping[str, int] = field(default_factory=dict)


def network_case(job: NetworkJob, tools: Tools, batch: int) -> NetworkCase:
    """All sides of a network, compiled, warmed up and captured."""
    torch.manual_seed(0)
    model = MobileNetV2(job.alpha, CLASSES, dropout=0.0, backend="torch").to(tools.device)
    x = torch.randn(batch, 3, job.resize, job.resize, device=tools.device)
    x = x.contiguous(memory_format=torch.channels_last)
    calls, check = (training if job.training else inference)(model, x, tools)
    for call in calls.values():
        call()
    peak = {name: tools.peak(call) for name, call in calls.items()}
    return NetworkCase(job.name(batch), batch, with_graphs(calls, tools), check, _counted(job, tools, batch), peak)


def _counted(job: NetworkJob, tools: Tools, batch: int) -> Counted:
    """Bytes of all layers: ours by our formulas, torch's as each reads its inputs and writes its output once."""
    rows = rows_of(ours, layer_shapes(job.alpha, job.resize), batch, job.training)
    touched = round(totals(rows, batch)["network"] * batch * MB)
    return Counted(touched, touched / device_of(tools.device).bandwidth, "bytes alone")


Sides = tuple[dict[str, Call], Callable[[Mapping[str, Any]], None]]


def inference(model: MobileNetV2, x: Tensor, tools: Tools) -> Sides:
    """Calls that give logits, and their check."""
    settle(model, x)
    network = fold(model, DTYPE)
    network.backend = OURS
    network.warmup(len(x), x.shape[2], progress=False)
    exact, plain, half = Plain(model), Plain(model).to(DTYPE), x.to(DTYPE)
    compiled = tools.compiled(Plain(model).to(DTYPE))
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled(half)

    def logits(side: Callable[[Tensor], Tensor]) -> tuple[Tensor]:
        with torch.no_grad():
            return (side(half),)

    def check(results: Mapping[str, Any]) -> None:
        with torch.no_grad():
            truth = exact(x)
        for side, (found,) in results.items():
            assert_near(f"logits, {side}", found, truth, results["eager"][0])

    sides = {"ours": network, "eager": plain, "compiled": compiled}
    return {name: functools.partial(logits, side) for name, side in sides.items()}, check


def gradients(
    network: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor, labels: Tensor, *, half: bool
) -> tuple[Tensor, ...]:
    """Loss and gradients, these ``LOSS_SCALE`` times too large."""
    # A cast that is remembered over a capture would be read by replays after its memory is another's.
    with torch.autocast(x.device.type, DTYPE, enabled=half, cache_enabled=False):
        logits = network(x)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
    return loss.detach(), *torch.autograd.grad(loss * LOSS_SCALE, parameters)


class Step:
    """A step of training of a network."""

    def __init__(self, network: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, labels: Tensor):
        self._network, self._x, self._labels = network, x, labels
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.SGD(self._parameters, lr=0.0, momentum=0.9)

    def __call__(self) -> tuple[Tensor, ...]:
        """Loss and gradients."""
        loss, *grads = gradients(self._network, self._parameters, self._x, self._labels, half=True)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad
        self._optimizer.step()
        return loss, *grads


def training(model: MobileNetV2, x: Tensor, tools: Tools) -> Sides:
    """Calls that make a step and give the loss and the gradients, and their check."""
    labels = torch.randint(CLASSES, (len(x),), device=x.device)
    model.train()
    mine = copy.deepcopy(model)
    mine.backend = OURS
    mine.warmup(len(x), x.shape[2], DTYPE, progress=False)
    exact, plain, other = Plain(model), Plain(model), Plain(model)
    sides = {"ours": (mine, mine), "eager": (plain, plain), "compiled": (tools.compiled(other), other)}

    def check(results: Mapping[str, Any]) -> None:
        loss, *grads = gradients(exact, list(exact.parameters()), x, labels, half=False)
        for side, result in results.items():
            assert_alike(f"loss, {side}", result[0], loss.double(), results["eager"][0], loss.item())
        for number, truth in enumerate(grads, 1):
            for side, result in results.items():
                assert_near(f"gradient {number}, {side}", result[number], truth, results["eager"][number])

    return {name: Step(network, trained, x, labels) for name, (network, trained) in sides.items()}, check


def assert_near(name: str, got: Tensor, truth: Tensor, eager: Tensor) -> None:
    """Hold logits or a parameter's gradient, by the mean error, to four times eager's and what flips of ReLU6 do.

    It is wider than an operation's rule, as a network amplifies how each layer happens to round. Of a bias that
    BatchNorm follows the gradient is zero in truth, and nothing but rounding is compared.
    """
    assert got.dtype == eager.dtype, f"{name}: type {got.dtype}, expected {eager.dtype}"
    error, theirs = ((one.double() - truth.double()).square().mean().sqrt().item() for one in (got, eager))
    allowed = 4 * theirs + FLIPS * truth.double().square().mean().sqrt().item()
    assert error <= allowed, f"{name}: mean error {error:.3e}, allowed {allowed:.3e}"  # as NaN never is


def row_of(case: NetworkCase, seconds: Mapping[str, list[float]], tools: Tools) -> dict[str, Any]:
    """Figures of a case: pictures a second of each side, with a graph too, and memory."""
    rates = {f"{name}_images_per_s": significant(case.batch / median(times)) for name, times in seconds.items()}
    return {
        "case": case.name,
        **rates,
        **{f"{name}_peak_mib": significant(peak / MIB) for name, peak in case.peak.items()},
        "counted_mb_per_image": significant(case.counted.touched / case.batch / MB),
        "copy_gb_per_s": significant(tools.bandwidth / 1e9),
        "bound_images_per_s": significant(case.batch / case.counted.seconds),
        "bound_by": case.counted.binds,
        "ratios": ratios(case.name, seconds, "ms", 1e3) + memory_ratios(case),
    }


def memory_ratios(case: NetworkCase) -> list[dict[str, Any]]:
    """Of memory that ours takes over a peer's."""
    mib = {name: [peak / MIB] for name, peak in case.peak.items()}
    return ratios(case.name, mib, "MiB", 1.0, what="peak memory")
