"""Two gloo processes: the same losses as one process, the same factors in both, one whole file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this PyTorch has no gloo", allow_module_level=True)

from peft import PeftModel  # noqa: E402
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402

import lotrtensor as lt  # noqa: E402
from tests.distributed_worker import (  # noqa: E402
    EXPERTS_MODES,
    MODES,
    NO_DROPOUT,
    STEPS,
    experts_base,
    make_experts,
    make_model,
    train,
)
from tests.peft_models import THIRD_PARTY, bert, lotr_layers, output  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(THIRD_PARTY), pytest.mark.slow]

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote, a directory a mode."""
    out = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], torch.Tensor]:
    """Losses of one process on whole batches, and what the trained model computes."""
    model = make_model()
    losses = train(model)
    assert losses[-1] < losses[1]
    return losses, output(model)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one(trained: Path, mode: str, alone) -> None:
    losses, expected = alone
    report = json.loads((trained / mode / "report.json").read_text())
    assert report["losses"] == pytest.approx(losses, rel=1e-5)
    assert report["equal"]
    assert report["factors"] == 4  # U and V of two groups
    assert report["sharded"] == (report["trained"] if mode in ("fsdp2", "deepspeed") else 0)
    loaded = PeftModel.from_pretrained(bert(**NO_DROPOUT), trained / mode)
    torch.testing.assert_close(output(loaded), expected, rtol=1e-3, atol=1e-3)
    groups = lt.load(trained / mode).groups
    assert [len(group.modules) for group in groups] == [6, 3]


@pytest.mark.parametrize("mode", EXPERTS_MODES)
def test_two_processes_train_experts_as_one(trained: Path, mode: str) -> None:
    model = make_experts()
    losses = train(model, outputs=64)
    assert losses[-1] < losses[0]
    report = json.loads((trained / f"experts-{mode}" / "report.json").read_text())
    assert report["losses"] == pytest.approx(losses, rel=1e-5)
    assert report["equal"]
    assert len(report["idle"]) == STEPS * 2  # layers
    assert min(report["idle"]) > 0  # cores that one process has no gradient of but zeros
    loaded = PeftModel.from_pretrained(experts_base(), trained / f"experts-{mode}")
    torch.testing.assert_close(output(loaded), output(model), rtol=1e-3, atol=1e-3)


def test_the_shards_of_two_processes_are_one_checkpoint(trained: Path, tmp_path: Path) -> None:
    dcp_to_torch_save(trained / "fsdp2" / "shards", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt")
    model = make_model(seed=9)
    model.load_state_dict(whole)
    loaded = PeftModel.from_pretrained(bert(**NO_DROPOUT), trained / "fsdp2")
    assert torch.equal(output(model), output(loaded))
    layers = lotr_layers(model).values()
    assert len({id(layer.lotr_shared["default"]) for layer in layers}) == 2
