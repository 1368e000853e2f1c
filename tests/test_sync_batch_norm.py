"""BatchNorm across processes, held to torch's on the whole batch in one. As a script this file starts them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from processes import ROOT, free_port, run
from torch import nn
from torch.nn import functional as F

from bench.parity import assert_parity
from kernels import BatchNorm, ranks, reference
from kernels.sync_batch_norm import SyncBatchNorm2d, convert_sync_batchnorm, sync_batch_norm
from mnv2 import MobileNetV2
from mnv2.config import TrainConfig
from mnv2.data import Batch
from mnv2.distributed import World, world
from mnv2.model import InvertedResidual, LayerShape
from mnv2.trainer import Trainer

SPLITS = {2: [(3, 3), (4, 1), (5, 0)], 3: [(1, 4, 2), (2, 0, 3)]}  # pictures of each process
C = 6


def whole(sizes, dtype, offset=1.0):
    """A batch and the gradient of what becomes of it, the same in all processes."""
    generator = torch.Generator().manual_seed(sum(sizes))
    x, dy = (torch.randn(sum(sizes), C, 9, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    x = (x * torch.linspace(0.5, 3, C)[:, None, None] + offset).to(dtype)
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy)]


def own(tensor, sizes, rank):
    return tensor.split(list(sizes))[rank]


def new_norm(dtype, momentum=0.1, affine=True, group=""):
    """A norm over C channels, its parameters in fp32 where x is in half precision."""
    dtype = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.linspace(*ends, C, dtype=dtype, requires_grad=True) for ends in ((0.5, 2), (-1, 1)))
    running = torch.linspace(-1, 1, C, dtype=dtype), torch.linspace(1, 2, C, dtype=dtype)
    parameters = (weight, bias) if affine else (None, None)
    return BatchNorm(*parameters, *running, torch.tensor(3), True, momentum, 1e-3, group)


def results(x, dy, norm):
    """Output, gradients and buffers of ``reference.batch_norm``."""
    x = x.detach().requires_grad_()
    y = reference.batch_norm(x, norm)
    y.backward(dy)
    parameters = {name: getattr(norm, name).grad for name in ("weight", "bias") if getattr(norm, name) is not None}
    return {"y": y.detach(), "dx": x.grad, **parameters, "mean": norm.running_mean, "var": norm.running_var}


def joined(here, name, tensor):
    """What one process would have got in place of every process's ``tensor``."""
    parts = here.gather(tensor)
    if name in ("y", "dx"):
        return torch.cat(parts)
    if name in ("weight", "bias"):
        return torch.stack(parts).sum(0)
    assert all(torch.equal(part, tensor) for part in parts), f"{name} differs between processes"
    return tensor


def check_operation(here, sizes, dtype, **how):
    x, dy = whole(sizes, dtype)
    norm = new_norm(dtype, **how, group=ranks.register(None))
    got = results(own(x, sizes, here.rank), own(dy, sizes, here.rank), norm)
    assert got["y"].is_contiguous(memory_format=torch.channels_last)
    assert got["dx"].is_contiguous(memory_format=torch.channels_last)
    assert int(norm.num_batches_tracked) == 4
    truth = results(x.double(), dy.double(), new_norm(torch.float64, **how))
    torchs = results(x, dy, new_norm(dtype, **how))
    scale = max(truth[name].abs().max().item() for name in ("dx", "weight", "bias") if name in truth)
    for name, tensor in got.items():
        label, tensor = f"{name}, {sizes} pictures, {dtype}, {how}", joined(here, name, tensor)
        if dtype == torch.float64:
            torch.testing.assert_close(tensor, truth[name], rtol=1e-12, atol=1e-12, msg=label)
        else:
            assert_parity(label, tensor, truth[name], torchs[name], None if name == "y" else scale)


def check_far_from_zero(here, sizes):
    """Statistics in fp32 of numbers whose mean is a thousand times their deviation."""
    x, dy = whole(sizes, torch.float32, offset=1000.0)
    norm = new_norm(torch.float32, 1.0, group=ranks.register(None))
    results(own(x, sizes, here.rank), own(dy, sizes, here.rank), norm)
    torch.testing.assert_close(norm.running_var.double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


def check_a_group_of_some(here):
    """Records come in the order of ranks, from the processes of the group alone."""
    assert ranks.gather(torch.tensor([here.rank]), ranks.register(None)).tolist() == [[i] for i in range(here.size)]
    group = dist.new_group([0, 1])
    name = ranks.register(group) if here.rank < 2 else None
    assert len(set(here.gather(name)[:2])) == 1
    if here.rank < 2:
        assert name == ranks.register(group) != ranks.DEFAULT
        record = torch.full((2, 3), float(here.rank), dtype=torch.float64)
        assert torch.equal(ranks.gather(record, name), torch.stack([torch.zeros(2, 3), torch.ones(2, 3)]).double())
    else:
        with pytest.raises(TypeError, match="group: expected a process group that this process is in"):
            ranks.register(group)


def gradients(network, x, labels):
    """Gradients of the summed loss, and buffers."""
    network.zero_grad()
    F.cross_entropy(network(x), labels, reduction="sum").backward()
    return {name: p.grad for name, p in network.named_parameters()}, dict(network.named_buffers())


def check_network(here, sizes):
    torch.manual_seed(5)
    plain = MobileNetV2(0.35, num_classes=5, dropout=0.0, backend="torch").double()
    network = convert_sync_batchnorm(deepcopy(plain))
    x, labels = torch.randn(sum(sizes), 3, 32, 32, dtype=torch.float64), torch.arange(sum(sizes)) % 5
    got, buffers = gradients(network, own(x, sizes, here.rank), own(labels, sizes, here.rank))
    expected, expected_buffers = gradients(plain, x, labels)
    for name, gradient in got.items():
        total = here.sum(gradient)
        torch.testing.assert_close(total, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected_buffers[name], rtol=1e-9, atol=1e-12)
    network.eval()
    if here.rank == 0:  # alone: in evaluation nobody waits for the others
        torch.testing.assert_close(network(x), plain.eval()(x))


def check_block(here, sizes, c):
    """The training block through the kernels, in the interpreter."""
    torch.manual_seed(7)
    shape = LayerShape("", "block", c, 3 * c, c, 4, 5, 4, 5, residual=True, expand_macs=1)
    plain = InvertedResidual(shape, padding="symmetric", norm_eps=1e-5, backend="triton", save="D")
    block = convert_sync_batchnorm(deepcopy(plain))
    x, dy = (torch.randn(sum(sizes), c, 4, 5) for _ in "xy")
    x = (x * torch.linspace(0.5, 2, len(x))[:, None, None, None] + 1).contiguous(memory_format=torch.channels_last)

    def results(module, x, dy):
        given = x.detach().requires_grad_()
        y = module(given)
        y.backward(dy)
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        return {"y": y.detach(), "dx": given.grad}, gradients, dict(module.named_buffers())

    got, gradients, buffers = results(block, own(x, sizes, here.rank), own(dy, sizes, here.rank))
    whole_batch = results(plain, x, dy) if here.rank == 0 else None  # once, as the interpreter is slow
    expected, expected_gradients, expected_buffers = here.share(whole_batch)
    for name, tensor in got.items():
        torch.testing.assert_close(joined(here, name, tensor), expected[name], rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(here.sum(gradient), expected_gradients[name], rtol=1e-3, atol=1e-3)
    for name, buffer in buffers.items():
        torch.testing.assert_close(joined(here, name, buffer), expected_buffers[name], rtol=1e-5, atol=1e-6)


def check_training(here):
    """``--sync_bn`` on parts of a batch takes the step that one process takes on all of it."""
    torch.manual_seed(6)
    images = torch.randn(4 * here.size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels, index = torch.arange(len(images)) % 4, torch.arange(len(images))
    start = MobileNetV2(0.35, 4, dropout=0.0)
    steps = []
    for sync_bn, place in ((True, here), (False, World())):
        config = TrainConfig(alpha=0.35, resize=32, max_lr=0.01, sync_bn=sync_bn)
        trainer = Trainer(deepcopy(start), config, place)
        trainer.start_epoch(0)
        batch = [t.chunk(place.size)[place.rank] for t in (images, labels, index)]
        trainer.step(iter([Batch(*batch)]))
        steps.append([p.detach() - q.detach() for p, q in zip(trainer._trained, start.parameters(), strict=True)])
    together, alone = (torch.cat([p.flatten() for p in step]) for step in steps)
    assert (together - alone).norm() < 1e-3 * alone.norm()


def process(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    with world("cpu") as here:
        for sizes in SPLITS[here.size]:
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                check_operation(here, sizes, dtype)
            check_operation(here, sizes, torch.float32, momentum=None)
            check_operation(here, sizes, torch.float32, affine=False)
            check_far_from_zero(here, sizes)
        check_a_group_of_some(here)
        check_network(here, SPLITS[here.size][1])
        check_block(here, SPLITS[here.size][-1], 8 if here.size == 3 else 40)  # T and S in one pass, or dZ1 stored
        if here.size == 2:
            check_training(here)


def main(processes):
    """Start the processes, which needn't import everything again."""
    os.environ.update(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    forked = [multiprocessing.get_context("fork").Process(target=process, args=(rank,)) for rank in range(processes)]
    for one in forked:
        one.start()
    for one in forked:
        one.join()
    return max(one.exitcode != 0 for one in forked)


@pytest.mark.parametrize("processes", SPLITS)
def test_processes_get_what_one_with_the_whole_batch_gets(processes):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = run("tests/test_sync_batch_norm.py", processes, PYTHONPATH=path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def alone():
    """The name of a group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ranks.register(None)
    dist.destroy_process_group()


@pytest.fixture
def shared(alone, monkeypatch):
    """The same, of which modules think that there are others in it."""
    monkeypatch.setattr(ranks, "active", lambda name: name)
    return alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_group_of_one_process(alone, dtype):
    x, dy = whole((3,), dtype)
    truth = results(x.double(), dy.double(), new_norm(torch.float64))
    torchs = results(x, dy, new_norm(dtype))
    got = results(x, dy, new_norm(dtype, group=alone))
    scale = max(truth[name].abs().max().item() for name in ("dx", "weight", "bias"))
    for name, tensor in got.items():
        assert_parity(name, tensor, truth[name], torchs[name], None if name == "y" else scale)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (True, True, True)], ids=str)
def test_gradients_are_the_derivatives(alone, needed):
    values = torch.randn(2, 3, 2, 3), torch.rand(3) + 0.5, torch.randn(3)
    x, weight, bias = (value.double().requires_grad_(need) for value, need in zip(values, needed, strict=True))

    def operation(*inputs):
        x, weight, bias = inputs
        return sync_batch_norm(x, BatchNorm(weight, bias, None, None, None, True, group=alone))

    assert torch.autograd.gradcheck(operation, (x, weight, bias))


def test_a_second_derivative_is_refused(alone):
    x = torch.randn(2, C, 3, 3, requires_grad=True)
    y = sync_batch_norm(x, new_norm(torch.float32, group=alone))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="sync_batch_norm: its gradients can't be differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("options", "statistics"),
    list(itertools.product([{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}], [True, False])),
    ids=str,
)
def test_the_module_follows_torchs_options(shared, options, statistics):
    plain, module = nn.BatchNorm2d(C, **options).double(), SyncBatchNorm2d(C, **options).double()
    assert module.group == shared
    for mode in (True, statistics, True):
        x = torch.randn(4, C, 3, 5, dtype=torch.float64) * 2 + 1
        torch.testing.assert_close(module.train(mode)(x), plain.train(mode)(x))
    for got, expected in zip(module.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_layouts_are_kept_and_gradients_of_one_number_accepted(alone, memory_format):
    x = torch.randn(2, C, 3, 4).contiguous(memory_format=memory_format).requires_grad_()
    y = sync_batch_norm(x, new_norm(torch.float32, group=alone))
    y.sum().backward()
    assert y.is_contiguous(memory_format=memory_format)
    assert x.grad.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0, atol=1e-5)


def test_no_numbers_in_any_process(alone):
    norm = new_norm(torch.float32, group=alone)
    x = torch.zeros(0, C, 3, 3, requires_grad=True)
    y = sync_batch_norm(x, norm)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(t.isfinite().all() for t in (norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))


def test_compiles_whole(shared):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU())
    module = convert_sync_batchnorm(deepcopy(plain))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4, 4)
    for network in (plain, compiled):
        network(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)
    for p, q in zip(plain.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(q, p)


def test_converting_keeps_everything_but_the_class():
    shared = nn.BatchNorm2d(C)
    special = type("Special", (nn.BatchNorm2d,), {})(C)
    network = nn.Sequential(nn.Conv2d(3, C, 1), shared, nn.Sequential(shared, nn.SyncBatchNorm(C)), special)
    network[2].eval()
    calls = []
    shared.register_forward_hook(lambda *_: calls.append("forward"))
    before = list(network.named_modules(remove_duplicate=False))
    names = [list(dict(getattr(network, kind)())) for kind in ("named_parameters", "named_buffers")]
    tensors = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    parameters = list(network.parameters())

    assert convert_sync_batchnorm(network) is network
    assert [(name, module.training) for name, module in before] == [
        (name, module.training) for name, module in network.named_modules(remove_duplicate=False)
    ]
    assert [list(dict(getattr(network, kind)())) for kind in ("named_parameters", "named_buffers")] == names
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == tensors
    assert all(one is other for one, other in zip(parameters, network.parameters(), strict=True))
    assert [type(module) for module in (network[1], network[2][0], network[2][1])] == 3 * [SyncBatchNorm2d]
    assert network[1] is network[2][0]
    assert network[3] is special
    network(torch.randn(2, 3, 4, 4))
    assert calls == 2 * ["forward"]

    again = list(network.modules())
    assert all(one is other for one, other in zip(convert_sync_batchnorm(network).modules(), again, strict=True))
    assert deepcopy(network)[1].group == network[1].group


def test_a_norm_itself_is_converted():
    norm = nn.BatchNorm2d(C).eval()
    converted = convert_sync_batchnorm(norm)
    assert type(converted) is SyncBatchNorm2d
    assert converted.weight is norm.weight
    assert not converted.training
    assert convert_sync_batchnorm(converted) is converted


def test_a_converted_networks_state_loads_into_a_plain_one():
    network = convert_sync_batchnorm(MobileNetV2(0.35, 4))
    MobileNetV2(0.35, 4).load_state_dict(network.state_dict())
    network.load_state_dict(MobileNetV2(0.35, 4).state_dict())


def test_without_processes_it_is_the_plain_module():
    plain, module = nn.BatchNorm2d(C), SyncBatchNorm2d(C)
    x = torch.randn(3, C, 4, 4)
    assert torch.equal(module(x), plain(x))
    assert torch.equal(module.running_var, plain.running_var)


def norm_and_block():
    """Modules with batch statistics: a norm by torch, and a block through the kernels."""
    shape = LayerShape("", "block", C, 3 * C, C, 9, 7, 9, 7, residual=True, expand_macs=1)
    return [nn.BatchNorm2d(C), InvertedResidual(shape, padding="symmetric", norm_eps=1e-5, backend="triton", save="D")]


@pytest.mark.parametrize("plain", norm_and_block(), ids=["norm", "block"])
@pytest.mark.parametrize("default", [True, False], ids=["default group", "another"])
def test_alone_in_its_group_a_process_gathers_nothing(alone, plain, default, device, monkeypatch):
    monkeypatch.setattr(ranks, "gather", None)
    plain = deepcopy(plain).to(device)
    module = convert_sync_batchnorm(deepcopy(plain), None if default else dist.new_group([0]))
    x, dy = (tensor.to(device) for tensor in whole((3,), torch.float32))
    found = []
    for network in (plain, module):
        given = x.detach().requires_grad_()
        y = network(given)
        y.backward(dy)
        found.append([y, given.grad, *(parameter.grad for parameter in network.parameters()), *network.buffers()])
    assert all(map(torch.equal, *found))


def test_alone_and_compiled_whole(alone):
    module = SyncBatchNorm2d(C, group=dist.new_group([0]))
    x = torch.randn(2, C, 4, 4)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), nn.BatchNorm2d(C)(x))


def test_groups_that_are_not_there_are_named():
    record = torch.zeros(3)
    with pytest.raises(RuntimeError, match="init_process_group to have been called, got 'default'"):
        ranks.gather(record, ranks.register(None))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert ranks.register(dist.group.WORLD) == ranks.register(None)
        group = dist.new_group([0])
        name = ranks.register(group)
        assert torch.equal(ranks.gather(record, name), record[None])
        module = SyncBatchNorm2d(C, group=group)
        dist.destroy_process_group(group)
        with pytest.raises(RuntimeError, match=f"got '{name}', which is gone"):
            module(torch.randn(2, C, 3, 3))
    finally:
        dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="init_process_group"):
        module(torch.randn(2, C, 3, 3))


@pytest.mark.parametrize(
    ("x", "norm", "message"),
    [
        (torch.zeros(2, C, 3, 3), new_norm(torch.float32), "norm: expected batch_stats and a group"),
        (torch.zeros(2, 4, 3, 3), new_norm(torch.float32, group="default"), r"norm.weight: expected x's 4 channels"),
        (torch.zeros(2, C), new_norm(torch.float32, group="default"), "x: expected 4 dimensions"),
    ],
    ids=["no-group", "other-channels", "no-image"],
)
def test_bad_arguments_are_named(x, norm, message):
    with pytest.raises(ValueError, match=message):
        sync_batch_norm(x, norm)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
