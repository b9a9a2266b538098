"""A task's modules -> shards among the workers (FSDP2), and sums over what is then distributed.

Each worker holds its slice of every parameter and gathers a block's whole weights only while the block computes. What
it sees of gradients is its slice of their mean, averaged at the end of each backward pass; passes add up.
"""

import copy
from collections.abc import Iterable

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from craftor.tasks import Task

BLOCKS = (BasicTransformerBlock, ResnetBlock2D, CLIPEncoderLayer)
"""What is gathered at once; the rest of a module is one more block."""


def shard(task: Task, device: torch.device) -> nn.ModuleDict:
    """Shard what trains, and the UNet whether it trains or not, in place over all workers.

    Returns a copy of what trains that has its structure and no weights: to write what the shards make together.
    """
    parts = dict.fromkeys([*task.module.values(), task.diffuser.unet])
    for part in parts:
        part.to(memory_format=torch.contiguous_format)  # no other can be sharded
    blank = nn.ModuleDict({name: _blank(part) for name, part in task.module.items()})
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in parts:
        for module in [*(m for m in part.modules() if isinstance(m, BLOCKS)), part]:
            # The outermost too: what an optimiser step has changed is never read from before it.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for module in part.modules():
            if isinstance(module, PreTrainedModel):
                # It looks its hidden states up by its class, and sharding has given it another.
                _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
    return blank


def _blank(module: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device; none is copied on the way."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def kept(modules: nn.ModuleDict) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint has by name: all of a part that trains whole, of LoRA only its matrices."""
    found = {}
    for part, module in modules.items():
        adapted = any(isinstance(m, BaseTunerLayer) for m in module.modules())
        for name, parameter in module.named_parameters():
            if parameter.requires_grad or not adapted:
                found[f"{part}.{name}"] = parameter
    return found


def whole(tensor: Tensor) -> Tensor:
    """The tensor that shards make together; all workers call it together. Any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This worker's shard. Any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_of_squares(tensors: Iterable[Tensor]) -> float:
    """Over all elements of all tensors; all workers call it together where those are sharded."""
    total, sharded = 0.0, None
    for tensor in tensors:
        sharded = tensor if isinstance(tensor, DTensor) else sharded
        total += local(tensor).square().sum().item()
    if sharded is not None:
        message = torch.tensor(total, dtype=torch.float64, device=sharded.device)
        torch.distributed.all_reduce(message)
        total = message.item()
    return total
