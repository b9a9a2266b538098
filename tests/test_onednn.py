"""Layers that multiply through oneDNN are PyTorch's own, forth and back, and leave alone what they do not serve."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from craftor.onednn import FLOPS, SMALL, Linear, Pointwise, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is without oneDNN")
LAYERS = {
    "linear": (nn.Linear(96, 160), (4, 64, 96)),
    "without bias": (nn.Linear(160, 96, bias=False), (256, 160)),
    "1x1": (nn.Conv2d(96, 160, 1), (2, 96, 12, 12)),
    "1x1 channels last": (nn.Conv2d(96, 160, 1).to(memory_format=torch.channels_last), (2, 96, 12, 12)),
}


def served(layer: nn.Module) -> nn.Module:
    changed = nn.Sequential(copy.deepcopy(layer))
    use_onednn(changed)
    assert isinstance(changed[0], Linear | Pointwise)
    return changed[0]


def random(*shape: int, like: nn.Module) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    last = isinstance(like, nn.Conv2d) and like.weight.is_contiguous(memory_format=torch.channels_last)
    return found.contiguous(memory_format=torch.channels_last) if last else found


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_numbers_and_gradients_are_those_of_pytorch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = random(*shape, like=layer)
    found = []
    for own in (served(layer), layer):
        leaf = inputs.clone().requires_grad_()
        output = own(leaf)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        found.append((output, *torch.autograd.grad(output, [leaf, *own.parameters()], direction)))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 1e-6 * theirs.norm()


def test_only_what_asks_for_gradient_gets_it() -> None:
    layer = served(nn.Linear(96, 160)).requires_grad_(False)
    leaf = torch.randn(256, 96, requires_grad=True)
    layer(leaf).sum().backward()
    assert leaf.grad is not None and layer.weight.grad is None and layer.bias.grad is None


def test_small_products_and_other_precisions_are_pytorchs() -> None:
    layer = nn.Linear(96, 160)
    ours = served(layer)
    rows = torch.randn(SMALL // (96 * 160), 96)  # one row less than is served
    assert torch.equal(ours(rows), layer(rows))
    many = torch.randn(256, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(many).dtype == torch.bfloat16 and torch.equal(ours(many), layer(many))
    assert torch.equal(ours.double()(many.double()), layer.double()(many.double()))


def test_convolutions_that_are_no_products_stay() -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(8, 8, 1, groups=2))
    use_onednn(module)
    assert all(type(layer) is nn.Conv2d for layer in module)


def test_their_operations_are_counted() -> None:
    layer, rows = served(nn.Linear(96, 160)), torch.randn(4, 64, 96, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        layer(rows).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 64 * 96 * 160
