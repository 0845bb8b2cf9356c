"""Several processes of one training: two on the CPU, with the environment that a launcher gives them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import training_toys
from fettle.errors import UsageError
from fettle.picture_order import PictureOrder
from fettle.processes import Processes, is_main_process, process_device
from fettle.protocols import Step
from fettle.training import learning_rate
from training_toys import ToyMethod, ToyPictures, toy_config

SCRIPT = Path(training_toys.__file__)
STEPS = 4


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_two(out: Path, *arguments: str) -> list[dict[str, Tensor]]:
    """What each of two processes wrote."""
    out.mkdir()
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    return [load_file(out / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes of `one_loss` keep their training's state."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def one_loss(tmp_path_factory: pytest.TempPathFactory, kept: Path) -> list[dict[str, Tensor]]:
    return run_two(tmp_path_factory.mktemp("one") / "out", str(STEPS), "1", "1", str(kept))


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """The first process gives two losses a step, the second one."""
    return run_two(tmp_path_factory.mktemp("unequal") / "out", str(STEPS), "2", "1")


def by_hand(num_losses: tuple[int, int]) -> tuple[ToyMethod, list[float]]:
    """One process that averages the gradients of both ranks itself; its losses by update."""
    method, pictures = ToyMethod(toy_config(steps=STEPS)), ToyPictures()
    own = [p for name, p in method.named_parameters() if not name.startswith("backbone.")]
    optimizer = torch.optim.AdamW(own, weight_decay=method.config.weight_decay)
    order = PictureOrder(pictures.products, "none", 0)
    by_step: list[float] = []
    for number in range(STEPS):
        steps = [Step(number, STEPS, 0, rank) for rank in range(2)]
        optimizer.param_groups[0]["lr"] = learning_rate(method.config, steps[0])
        method.train()
        method.backbone.eval()
        rounds: list[float] = []
        random: list[Tensor | None] = [None, None]
        for update in range(max(num_losses)):
            gradients: list[list[Tensor]] = []
            values: list[float] = []
            for rank, step in enumerate(steps):
                if update >= num_losses[rank]:
                    continue
                if random[rank] is None:
                    torch.manual_seed(step.stream_seed("torch"))
                else:
                    torch.set_rng_state(random[rank])
                batch = pictures.batch(order.indices(number, 4, rank, 2), pictures=number % 2 == 1)
                method.num_losses = num_losses[rank]
                loss = method.loss_of_part(batch, step, update)
                random[rank] = torch.get_rng_state()
                optimizer.zero_grad()
                loss.value.backward()
                gradients.append([p.grad.clone() for p in own if p.grad is not None])
                values.append(float(loss.value.detach()))
            trained = [p for p in own if p.grad is not None]
            for parameter, *parts in zip(trained, *gradients, strict=True):
                parameter.grad = torch.stack(parts).mean(dim=0)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            method.after_step(steps[0])
            rounds.append(sum(values) / len(values))
        by_step.append(sum(rounds) / len(rounds))
    return method, by_step


def weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: found[name] for name in ToyMethod(toy_config()).state_dict()}


@pytest.mark.parametrize(
    ("name", "num_losses"),
    [("one_loss", (1, 1)), pytest.param("unequal", (2, 1), marks=pytest.mark.slow)],
)
def test_two_processes_are_one_that_averages_gradients(
    name: str, num_losses: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    found: list[dict[str, Tensor]] = request.getfixturevalue(name)
    expected, losses = by_hand(num_losses)
    first, second = (weights(part) for part in found)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        assert torch.allclose(first[key], tensor, atol=1e-6), key
    assert float(found[0]["loss"]) == pytest.approx(losses[-1], rel=1e-5)  # the last tenth is the last step


def test_each_process_draws_its_own_perturbation(one_loss: list[dict[str, Tensor]]) -> None:
    first, second = (part["first_noise"] for part in one_loss)
    assert torch.equal(first, torch.randn(first.shape, generator=Step(0, STEPS, 0, 0).generator("noise")))
    assert torch.equal(second, torch.randn(first.shape, generator=Step(0, STEPS, 0, 1).generator("noise")))
    assert not torch.equal(first, second)


def test_figures_are_of_both_processes(one_loss: list[dict[str, Tensor]]) -> None:
    assert [int(part["processes"]) for part in one_loss] == [2, 2]
    assert one_loss[0]["loss"].equal(one_loss[1]["loss"])
    method = ToyMethod(toy_config())
    method.load_state_dict(weights(one_loss[0]))
    method.eval()
    with torch.no_grad():
        parts = [method.held_out_loss(ToyPictures(5, seed=1).batch(part)) for part in ([0, 1, 2, 3], [4])]
    expected = 0.8 * float(parts[0].value) + 0.2 * float(parts[1].value)
    assert [float(part["held_out"]) for part in one_loss] == pytest.approx([expected] * 2, rel=1e-6)


def test_only_the_first_process_speaks(one_loss: list[dict[str, Tensor]]) -> None:
    assert int(one_loss[0]["words"]) > 0
    assert int(one_loss[1]["words"]) == 0


@pytest.mark.slow
def test_finished_training_is_taken_up_by_all(
    one_loss: list[dict[str, Tensor]], kept: Path, tmp_path: Path
) -> None:
    again = run_two(tmp_path / "again", str(STEPS), "1", "1", str(kept))
    assert all(torch.equal(again[1][name], tensor) for name, tensor in weights(one_loss[0]).items())
    assert "first_noise" not in again[1]
    assert int(again[0]["words"]) == 1


def test_main_process_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_process()
    monkeypatch.setenv("RANK", "0")
    assert is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert process_device("cuda") == "cuda:3"
    assert process_device("cuda:1") == "cuda:1"
    assert process_device("cpu") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert process_device("cuda") == "cuda"


class Others:
    """An accelerator whose other process always holds another number."""

    def __init__(self, combine: Callable[[Tensor], Tensor]) -> None:
        self.combine = combine

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "mean"
        return self.combine(tensor)


def test_processes_with_other_weights_are_refused() -> None:
    differing = Processes(Others(lambda own: (2 * own + 1) / 2), torch.device("cpu"), 0, 2, "fp32")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="do not hold the same weights"):
        differing.check_agree("weights", 7, "Give both the same seed.")
    alike = Processes(Others(lambda own: own), torch.device("cpu"), 0, 2, "fp32")  # type: ignore[arg-type]
    alike.check_agree("weights", 7, "Give both the same seed.")
