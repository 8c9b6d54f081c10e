"""Trains a LoTR in one of several processes: ``torchrun tests/distributed_worker.py OUT``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from lotrtensor.torch import param_groups
from tests.peft_models import bert, config, ids

MODES = ("ddp", "fsdp2", "accelerate")
STEPS = 5
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make_model(seed: int = 0) -> nn.Module:
    """A PEFT model; the seed draws the factors."""
    base = bert(**NO_DROPOUT)
    torch.manual_seed(seed)
    return get_peft_model(base, config(group_by="qv=query|value"))


def batches(rank: int, world: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This process's rows of every batch of eight."""
    generator = torch.Generator().manual_seed(7)
    rows = [(ids(8, 6, seed=k), torch.randn(8, 6, 32, generator=generator)) for k in range(STEPS)]
    return [(x[rank::world], target[rank::world]) for x, target in rows]


def train(model: nn.Module, rank: int = 0, world: int = 1, accelerator: Any = None) -> list[float]:
    """Train and return the loss of every step, averaged over processes."""
    optimiser: Any = torch.optim.AdamW(param_groups(model, 1e-2))
    if accelerator is not None:
        model, optimiser = accelerator.prepare(model, optimiser)
    losses = []
    for x, target in batches(rank, world):
        loss = (model(x)[0] - target).square().mean()
        optimiser.zero_grad()
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimiser.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Adapter tensors, gathered where they are sharded."""
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
        for parameter in model.parameters():  # which, unlike DDP, fully_shard does not do
            dist.broadcast(parameter.data, 0)
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.base_model.model.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    losses = train(wrapped, rank, world, accelerator)
    state = adapter_state(model)
    report = {
        "losses": losses,
        "equal": equal_on_all_ranks(state),
        "factors": sum("lotr_factors" in key for key in state),
        "sharded": sum(type(p).__name__ == "DTensor" for p in model.parameters()),
    }
    if rank == 0:
        model.save_pretrained(out, state_dict=state)
        (out / "report.json").write_text(json.dumps(report))


def main(out: Path) -> None:
    """Train in every mode, one after the other: starting processes takes longest."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for mode in MODES:
        run(mode, out / mode)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is written. On a busy machine gloo's threads can outlive the interpreter, which then
    # aborts in its last moment: leave without it.
    sys.stdout.flush()
    os._exit(0)
