from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from samples import settled
from torch import nn

from kernels.sync_batch_norm import SyncBatchNorm2d
from mnv2 import MobileNetV2
from mnv2.config import TrainConfig
from mnv2.data import Batch
from mnv2.distributed import World
from mnv2.engine import Progress, settle, train_steps
from mnv2.errors import RunError
from mnv2.precision import autocast, input_dtype, numerics
from mnv2.trainer import AveragedWeights, Trainer


def batches(count, size=4):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = torch.randn(size, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
        yield Batch(x, torch.randint(4, (size,), generator=generator), torch.arange(size))


def network() -> MobileNetV2:
    torch.manual_seed(0)
    return MobileNetV2(0.35, 4, dropout=0.0)


def trained(given, steps, model=None, **settings) -> tuple[Trainer, Progress]:
    """A trainer after ``steps`` steps of the batches ``given``."""
    config = TrainConfig(alpha=0.35, resize=32, **settings)
    trainer, progress = Trainer(model or network(), config, World()), Progress()
    trainer.start_epoch(0)
    assert list(train_steps(trainer, given, progress, steps)) == list(range(1, steps + 1))
    settle(progress, trainer, World())
    return trainer, progress


def plain_sgd(steps, *, clip=math.inf, size=4):
    """Weights after each step, and the losses, of SGD on smoothed cross-entropy written out."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    losses, history = [], [deepcopy(model.state_dict())]
    for batch in batches(steps, size):
        loss = nn.functional.cross_entropy(model(batch.images), batch.labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        if norm > clip:
            for gradient in gradients:
                gradient *= clip / norm
        optimizer.step()
        losses.append(loss.item())
        history.append(deepcopy(model.state_dict()))
    return losses, history


def test_steps_are_sgd_on_smoothed_cross_entropy():
    trainer, progress = trained(batches(3), 3, max_lr=0.05)
    losses, history = plain_sgd(3)
    assert progress.losses == losses
    assert progress.mean_loss == math.fsum(losses) / 3
    assert progress.step == 3
    assert all(torch.equal(tensor, history[-1][name]) for name, tensor in trainer.network.state_dict().items())


def test_four_batches_of_16_are_one_of_64():
    """Of the same pictures, where BatchNorm's statistics don't depend on the batch."""

    def still():
        model = settled(network()).double()
        for part in (model, model.features, model.classifier):
            part.train = lambda mode=True, part=part: part  # all of it is trained, in eval mode
        return model

    whole = next(batches(1, 64))
    whole = Batch(whole.images.double(), whole.labels, whole.numbers)
    parts = [Batch(*(tensor[start : start + 16] for tensor in whole)) for start in range(0, 64, 16)]
    before = still().state_dict()
    large, large_progress = trained([whole], 1, still(), max_lr=0.1, batch_size=64)
    small, small_progress = trained(parts, 1, still(), max_lr=0.1, batch_size=16, grad_accum_steps=4)
    assert small_progress.losses == pytest.approx(large_progress.losses, rel=1e-6)
    for name, parameter in large.network.named_parameters():
        step = parameter - before[name]
        assert step.norm() > 0
        assert (small.network.get_parameter(name) - parameter).norm() <= 1e-5 * step.norm(), name


def test_batches_of_one_step_are_given_back_before_the_next():
    seen = []

    def given():
        for batch in batches(6):
            seen.append(len(seen))
            yield batch

    config = TrainConfig(alpha=0.35, resize=32, grad_accum_steps=3)
    trainer, progress = Trainer(network(), config, World()), Progress()
    trainer.start_epoch(0)
    for step in train_steps(trainer, given(), progress, 2):
        assert len(seen) == 3 * step
    assert len(progress.pending) == 2


def test_the_average_follows_its_formula():
    _, history = plain_sgd(4)
    trainer, _ = trained(batches(4), 4, max_lr=0.05, ema_decay=0.7)
    average = trainer.ema.network.state_dict()
    for name, tensor in average.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, history[-1][name])
            continue
        expected = history[0][name].double()
        for weights in history[1:]:
            expected = 0.7 * expected + 0.3 * weights[name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
    assert any("running_var" in name for name in average)
    assert not torch.equal(average["classifier.1.weight"], history[-1]["classifier.1.weight"])


def test_the_average_is_a_network_of_its_own():
    model = network()
    average = AveragedWeights(model, 0.9)
    assert not average.network.training
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    pairs = zip(average.network.parameters(), model.parameters(), strict=True)
    assert all(p.data_ptr() != q.data_ptr() and p.stride() == q.stride() for p, q in pairs)


def test_gradients_are_clipped_together():
    losses, history = plain_sgd(2, clip=0.5)
    trainer, progress = trained(batches(2), 2, max_lr=0.05, clip_grad_norm=0.5)
    assert progress.losses == pytest.approx(losses, rel=1e-4)
    moved = [trainer.network.get_parameter(name) - history[0][name] for name, _ in network().named_parameters()]
    # First step at most 0.05 * 0.5, the second with momentum 0.9 at most 0.05 * (0.9 * 0.5 + 0.5).
    assert 0 < torch.stack([step.norm() for step in moved]).norm() <= 0.05 * (0.5 + 0.95) * 1.001
    _, unclipped = plain_sgd(2)
    assert not torch.allclose(trainer.network.classifier[1].weight, unclipped[-1]["classifier.1.weight"])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_computes_in_it_and_keeps_weights_in_fp32(precision, dtype):
    seen = []
    model = network()
    model.features[3].register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    trainer, progress = trained(batches(1, 16), 1, model, max_lr=0.01, precision=precision)
    assert set(seen) == {dtype}
    assert {parameter.dtype for parameter in trainer.network.parameters()} == {torch.float32}
    _, exact = trained(batches(1, 16), 1, max_lr=0.01)
    assert progress.losses == pytest.approx(exact.losses, rel=0.03)
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    assert input_dtype(precision) == (torch.float16 if precision == "fp16" else torch.float32)


def test_the_scaler_leaves_out_a_step_whose_gradients_overflow():
    config = TrainConfig(alpha=0.35, resize=32, precision="fp16", clip_grad_norm=1.0)
    trainer = Trainer(network(), config, World())
    trainer.start_epoch(0)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 1e38})
    before = deepcopy(trainer.network.classifier.state_dict())
    trainer.step(batches(1))
    assert all(torch.equal(before[name], p) for name, p in trainer.network.classifier.state_dict().items())
    assert trainer.scaler.get_scale() == pytest.approx(5e37)


def test_frozen_features_stay_to_the_bit():
    before = deepcopy(network().state_dict())
    trainer, _ = trained(batches(2), 2, freeze="features", pretrained="x.pth")
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("features."), name
    assert not trainer.network.features.training
    assert trainer.network.classifier.training
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 2


def test_a_loss_that_is_not_finite_stops_training():
    with pytest.raises(RunError, match=r"the loss of step [23] is (nan|inf): try a lower learning rate"):
        trained(batches(4), 4, max_lr=1e30)


def test_a_weight_that_is_not_finite_stops_training():
    """The last step's loss is finite, the update behind it is not."""
    trainer, progress = Trainer(network(), TrainConfig(alpha=0.35, resize=32), World()), Progress()
    trainer.start_epoch(0)
    trainer.optimizer.param_groups[0]["lr"] = math.inf
    list(train_steps(trainer, batches(1), progress, 1))
    with pytest.raises(RunError, match="a weight is no longer finite"):
        settle(progress, trainer, World())


def test_state_comes_back_to_the_bit_and_settings_do_not():
    settings = {"optimizer": "rmsprop", "ema_decay": 0.9, "precision": "fp16", "max_lr": 0.01}
    trainer, _ = trained(batches(3), 3, **settings)
    state = deepcopy(trainer.state())
    other = Trainer(MobileNetV2(0.35, 4, dropout=0.0), TrainConfig(alpha=0.35, momentum=0.5, **settings), World())
    other.load(state)
    assert other.optimizer.param_groups[0]["momentum"] == 0.5
    again = other.state()
    for name in ("model", "ema"):
        assert all(torch.equal(tensor, again[name][key]) for key, tensor in state[name].items())
    assert again["scaler"] == state["scaler"]
    for number, values in state["optimizer"]["state"].items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again["optimizer"]["state"][number][key]))


def test_synchronised_norms_in_one_process_are_plain_ones():
    trainer, progress = trained(batches(2), 2, max_lr=0.05, sync_bn=True)
    assert sum(isinstance(module, SyncBatchNorm2d) for module in trainer.network.modules()) == 52
    assert progress.losses == pytest.approx(plain_sgd(2)[0], rel=1e-4)


@pytest.mark.parametrize("deterministic", [False, True])
def test_numerics_are_put_back(deterministic):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    with numerics(deterministic):
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == before


def test_full_precision_is_left_alone():
    with autocast("fp32", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
