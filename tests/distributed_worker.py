"""Trains a LoTR in one of several processes: ``torchrun tests/distributed_worker.py OUT``."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from lotrtensor.peft import LotrConfig
from lotrtensor.peft.experts import Experts
from lotrtensor.torch import param_groups
from tests.peft_models import bert, config, ids

MODES = ["ddp", "fsdp2", "accelerate"]
if find_spec("deepspeed"):  # which no extra installs
    MODES.append("deepspeed")
# Models hold their experts in 3-D parameters since transformers 5.
EXPERTS_MODES = ["ddp", "fsdp2"] if int(version("transformers").partition(".")[0]) >= 5 else []
STEPS = 5
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_model(seed: int = 0) -> nn.Module:
    """A PEFT model; the seed draws the factors."""
    base = bert(**NO_DROPOUT)
    torch.manual_seed(seed)
    return get_peft_model(base, config(group_by="qv=query|value"))


def experts_base() -> nn.Module:
    """A model with more experts a layer than a process's tokens are sent to."""
    from tests.moe_models import tiny

    return tiny("qwen3_moe", torch.float32, num_experts=32)


def make_experts(seed: int = 0) -> nn.Module:
    """The same with an adapter, whose factors all layers share; the seed draws them."""
    from tests.moe_models import TARGETS

    base = experts_base()
    torch.manual_seed(seed)
    groups = "up=gate_up_proj,down=down_proj"
    return get_peft_model(base, LotrConfig(r=(3, 4), target_parameters=TARGETS, group_by=groups))


def batches(rank: int, world: int, outputs: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This process's rows of every batch of eight, and what their outputs shall be."""
    generator = torch.Generator().manual_seed(7)
    rows = [
        (ids(8, 6, seed=k), torch.randn(8, 6, outputs, generator=generator)) for k in range(STEPS)
    ]
    return [(x[rank::world], target[rank::world]) for x, target in rows]


def optimiser_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW on factors and cores."""
    return torch.optim.AdamW(param_groups(model, 1e-2))


def train(
    model: nn.Module,
    rank: int = 0,
    world: int = 1,
    accelerator: Any = None,
    *,
    outputs: int = 32,
) -> list[float]:
    """Train and return the loss of every step, averaged over processes."""
    engine = hasattr(model, "backward")  # DeepSpeed's has its optimiser in it
    optimiser: Any = model if engine else optimiser_of(model)
    backward: Any = model.backward if engine else torch.Tensor.backward
    if accelerator is not None:
        model, optimiser = accelerator.prepare(model, optimiser)
        backward = accelerator.backward
    losses = []
    for x, target in batches(rank, world, outputs):
        loss = (model(x)[0] - target).square().mean()
        optimiser.zero_grad()
        backward(loss)
        optimiser.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def count_idle(model: nn.Module) -> list[int]:
    """Return a list that every call of a layer's experts adds to: those without any token."""
    found: list[int] = []

    def count(experts: nn.Module, args: tuple[torch.Tensor, ...], _: Any) -> None:
        found.append(experts.get_base_layer().num_experts - len(args[1].unique()))

    for module in model.modules():
        if isinstance(module, Experts):
            module.register_forward_hook(count)
    return found


def zero3(model: nn.Module, world: int) -> nn.Module:
    """DeepSpeed's engine, which shards parameters, gradients and optimiser."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 8 // world,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser_of(model), config=config)
    return engine


def adapter_state(model: nn.Module, mode: str) -> dict[str, torch.Tensor]:
    """Adapter tensors, gathered where they are sharded."""
    if mode == "deepspeed":
        import deepspeed

        own = {n: p for n, p in model.named_parameters() if "lotr_" in n}
        with deepspeed.zero.GatheredParameters(list(own.values())):
            return {name: p.detach().clone() for name, p in own.items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    state = get_model_state_dict(model, options=options)
    return {key: value.clone() for key, value in state.items() if "lotr_" in key}


def equal_on_all_ranks(state: dict[str, torch.Tensor]) -> bool:
    """Whether all processes hold the same bits."""
    for value in state.values():
        first = value.clone()
        dist.broadcast(first, 0)
        same = torch.tensor(float(torch.equal(first, value)))
        dist.all_reduce(same)
        if same.item() != dist.get_world_size():
            return False
    return True


def shard(model: nn.Module, layers: nn.ModuleList, world: int) -> None:
    """Give all processes the parameters of the first, and each its part of them."""
    for parameter in model.parameters():  # which, unlike DDP, fully_shard does not do
        dist.broadcast(parameter.data, 0)
    mesh = init_device_mesh("cpu", (world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def run(mode: str, out: Path) -> None:
    """Train as ``mode`` says; rank 0 saves the adapter and a report."""
    accelerator = None
    if mode == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model(seed=rank)  # drawn apart on purpose: the wrapper has to bring them together
    wrapped: nn.Module = model
    if mode == "ddp":
        wrapped = DistributedDataParallel(model)
    elif mode == "fsdp2":
        shard(model, model.base_model.model.encoder.layer, world)
    elif mode == "deepspeed":
        wrapped = zero3(model, world)
    losses = train(wrapped, rank, world, accelerator)
    trained = [p for p in model.parameters() if p.requires_grad]
    sharded = sum(type(p).__name__ == "DTensor" or hasattr(p, "ds_tensor") for p in trained)
    if mode == "fsdp2":  # every process writes its own shard
        dcp.save(get_model_state_dict(model), checkpoint_id=out / "shards")
    state = adapter_state(model, mode)
    report = {
        "losses": losses,
        "equal": equal_on_all_ranks(state),
        "factors": sum("lotr_factors" in key for key in state),
        "sharded": sharded,
        "trained": len(trained),
    }
    if rank == 0:
        model.save_pretrained(out, state_dict=state)
        (out / "report.json").write_text(json.dumps(report))


def run_experts(mode: str, out: Path) -> None:
    """Train experts as ``mode`` says; rank 0 saves the adapter and a report."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_experts(seed=rank)
    idle = count_idle(model)
    wrapped: nn.Module = model
    if mode == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        shard(model, model.base_model.model.model.layers, world)
    losses = train(wrapped, rank, world, outputs=64)
    state = adapter_state(model, mode)
    report = {"losses": losses, "equal": equal_on_all_ranks(state), "idle": idle}
    if rank == 0:
        model.save_pretrained(out, state_dict=state)
        (out / "report.json").write_text(json.dumps(report))


def main(out: Path) -> None:
    """Train in every mode, one after the other: starting processes takes longest."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for mode in MODES:
        run(mode, out / mode)
    for mode in EXPERTS_MODES:
        run_experts(mode, out / f"experts-{mode}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is written. On a busy machine gloo's threads can outlive the interpreter, which then
    # aborts in its last moment: leave without it.
    sys.stdout.flush()
    os._exit(0)
