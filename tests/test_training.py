"""The training loop: schedule, order of pictures, what is kept, resuming, early stop, what it says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from fettle import training
from fettle.checkpoint import read_state
from fettle.errors import ConfigError, DataError, FettleError
from fettle.picture_order import PictureOrder
from fettle.protocols import Run, Step
from fettle.training import TrainingConfig, learning_rate, planned_steps
from training_toys import ToyMethod, ToyPictures, fitted, same_bits, toy_config, train_toy


def rates(config: TrainingConfig, total: int) -> list[float]:
    return [learning_rate(config, Step(number, total)) for number in range(total)]


# Learning rate and length


def test_step_schedule_drops_to_a_tenth_after_four_fifths() -> None:
    found = rates(TrainingConfig(lr=1e-4, schedule="step", warmup=0), 100)
    assert found[:80] == [1e-4] * 80
    assert found[80:] == pytest.approx([1e-5] * 20)


def test_warmup_rises_linearly_from_one_nth() -> None:
    found = rates(TrainingConfig(lr=1.0, schedule="constant", warmup=0.05), 200)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10:] == [1.0] * 190


def test_stages_have_the_published_rates() -> None:
    """CFLOW-AD: 25 stages, the first two rising from a tenth to where the cosine is at the third."""
    found = rates(TrainingConfig(lr=2e-4, schedule="stages", warmup=0.5), 25 * 8)
    assert found[0] == pytest.approx(2e-5)
    assert found[15] == pytest.approx(2e-5 + (1.968615e-4 - 2e-5) * 15 / 16, rel=1e-5)
    assert found[16] == found[23] == pytest.approx(1.968615e-4, rel=1e-6)
    assert found[12 * 8] == pytest.approx(1.0637e-4, rel=1e-4)
    assert found[24 * 8] == found[-1] == pytest.approx(9.877e-7, rel=1e-3)


def test_cosine_falls_from_the_full_rate_to_zero() -> None:
    found = rates(TrainingConfig(lr=1.0, schedule="cosine", warmup=0.1), 100)
    assert found[10] == 1.0
    assert found[55] == pytest.approx(0.5)
    assert found[10:] == sorted(found[10:], reverse=True)
    assert 0 < found[-1] < 1e-3


def test_epochs_become_steps_of_all_processes() -> None:
    config = TrainingConfig(epochs=3, batch=8)
    assert planned_steps(config, 100) == 38
    assert planned_steps(config, 100, processes=2) == 19
    assert planned_steps(TrainingConfig(steps=7), 100) == 7


# Order of the pictures


def test_an_epoch_shows_every_view_once() -> None:
    order = PictureOrder(["a"] * 12, "none", seed=3)
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in order.indices(step, 4)] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]


def test_order_is_a_function_of_the_step() -> None:
    products = ["a", "b", "b", "b", "b"]
    forwards, backwards = PictureOrder(products, "equal", 1), PictureOrder(products, "equal", 1)
    steps = range(9)
    assert [forwards.indices(s, 3) for s in steps] == [backwards.indices(s, 3) for s in reversed(steps)][::-1]


def test_processes_share_one_batch() -> None:
    order = PictureOrder(["a"] * 10, "none", seed=0)
    assert order.indices(5, 3, 0, 2) + order.indices(5, 3, 1, 2) == order.indices(5, 6)


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert Counter(PictureOrder(["a"] * 3, "none", seed=0).indices(0, 9)) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize(("balance", "share"), [("none", 0.1), ("sqrt", 0.25), ("equal", 0.5)])
def test_balance_sets_how_often_a_product_comes(balance: str, share: float) -> None:
    order = PictureOrder(["rare"] * 10 + ["common"] * 90, balance, seed=0)  # type: ignore[arg-type]
    drawn = [index for step in range(200) for index in order.indices(step, 50)]
    assert sum(index < 10 for index in drawn) / len(drawn) == pytest.approx(share, abs=0.02)


def test_one_product_is_never_drawn_with_replacement() -> None:
    assert sorted(PictureOrder(["a"] * 20, "equal", seed=0).indices(0, 20)) == list(range(20))


# The optimiser


def test_a_step_is_adamw_on_the_clipped_gradient() -> None:
    method, twin = (ToyMethod(toy_config(steps=3, clip=0.05, warmup=0.0)) for _ in range(2))
    pictures = ToyPictures()
    train_toy(method, Run(seed=5), pictures=pictures)
    own = [p for name, p in twin.named_parameters() if not name.startswith("backbone.")]
    optimizer = torch.optim.AdamW(own, lr=0.01, weight_decay=twin.config.weight_decay)
    order = PictureOrder(pictures.products, "none", 5)
    for number in range(3):
        step = Step(number, 3, seed=5)
        optimizer.param_groups[0]["lr"] = learning_rate(twin.config, step)
        twin.train()
        twin.backbone.eval()
        torch.manual_seed(step.stream_seed("torch"))
        batch = pictures.batch(order.indices(number, 4), pictures=number == 1)
        (loss,) = twin.losses(batch, step)
        optimizer.zero_grad()
        loss.value.backward()
        nn.utils.clip_grad_norm_(own, 0.05)
        optimizer.step()
        twin.after_step(step)
    assert same_bits(method, twin)


def test_backbone_and_parameters_without_gradient_stay() -> None:
    method, _ = fitted(Run(), weight_decay=0.5)
    assert torch.equal(method.backbone.frozen, torch.ones(3))
    assert torch.equal(method.unused, torch.ones(2))
    assert not method.training
    assert method.up.weight.grad is None


def test_each_loss_is_an_optimiser_step() -> None:
    seen: list[torch.Tensor] = []
    method = ToyMethod(toy_config(steps=1), num_losses=4)
    method.before_step = lambda step: seen.append(method.up.weight.detach().clone())
    train_toy(method, Run())
    assert len(seen) == 4
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_average_of_the_weights_is_what_is_kept() -> None:
    weights: list[torch.Tensor] = []
    method = ToyMethod(toy_config(steps=15, ema=0.3, schedule="constant"))
    first = average = method.up.weight.detach().clone()
    own_after_step = method.after_step

    def after_step(step: Step) -> None:
        own_after_step(step)
        weights.append(method.up.weight.detach().clone())

    method.after_step = after_step  # type: ignore[method-assign]
    train_toy(method, Run())
    for t, weight in enumerate(weights):
        decay = min(0.3, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(method.up.weight, average, atol=1e-6)
    assert not torch.allclose(method.up.weight, weights[-1], atol=1e-3)
    assert not torch.allclose(method.up.weight, first, atol=1e-3)


def test_seed_gives_the_bits_and_another_seed_others() -> None:
    assert same_bits(fitted(Run(seed=1))[0], fitted(Run(seed=1))[0])
    assert not same_bits(fitted(Run(seed=1))[0], fitted(Run(seed=2))[0])


def test_training_leaves_the_callers_random_state() -> None:
    method = ToyMethod(toy_config(steps=3))
    torch.manual_seed(11)
    before = torch.get_rng_state()
    train_toy(method, Run())
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_is_used_where_asked_for_and_losses_stay_float32() -> None:
    fp32, bf16 = fitted(Run(), precision="fp32"), fitted(Run(), precision="bf16")
    assert (fp32[1].facts["precision"], bf16[1].facts["precision"]) == ("fp32", "bf16")
    assert bf16[0].up.weight.dtype == torch.float32
    assert not same_bits(fp32[0], bf16[0])
    assert bf16[1].facts["loss"] == pytest.approx(fp32[1].facts["loss"], rel=0.05)


def test_precision_auto_is_float32_on_a_cpu() -> None:
    assert fitted(Run(), steps=1, precision="auto")[1].facts["precision"] == "fp32"


def test_loss_in_half_precision_is_refused() -> None:
    method = ToyMethod(toy_config())
    real = method.losses
    method.losses = lambda batch, step: (  # type: ignore[method-assign]
        loss._replace(value=loss.value.bfloat16()) for loss in real(batch, step)
    )
    with pytest.raises(TypeError, match="bfloat16"):
        train_toy(method, Run())


def test_second_training_in_one_process_is_like_the_first() -> None:
    """accelerate's singletons neither carry a precision over nor stay behind."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    own = Accelerator(cpu=True, mixed_precision="no")
    first, _ = fitted(Run(), steps=2, precision="bf16")
    second, _ = fitted(Run(), steps=2)
    third, _ = fitted(Run(), steps=2, precision="bf16")
    assert same_bits(first, third)
    assert not same_bits(first, second)
    assert own.mixed_precision == "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert same_bits(fitted(Run(), steps=2)[0], second)
    assert AcceleratorState._shared_state == {}


# Early stop


def test_early_stop_keeps_the_best_weights() -> None:
    curve = {number: abs(number - 12) + 1.0 for number in range(1, 101)}  # best after step 12
    method = ToyMethod(toy_config(steps=100, early_stop=0.2))
    done = 0
    at_best: dict[str, torch.Tensor] = {}
    own = method.held_out_loss

    def after_step(step: Step) -> None:
        nonlocal done
        done = step.number + 1
        if done == 12:
            at_best.update({name: tensor.clone() for name, tensor in method.state_dict().items()})

    method.after_step = after_step  # type: ignore[method-assign]
    method.held_out_loss = lambda batch: own(batch)._replace(  # type: ignore[method-assign]
        value=torch.tensor(curve[done]), baseline=2.0
    )
    record = train_toy(method, Run(), held=True)
    assert record.facts["stopped_at"] == 32
    assert record.facts["best_step"] == 12
    assert record.facts["steps"] == 100
    assert record.facts["views_seen"] == 32 * 4
    assert record.facts["held_out_loss"] == 1.0
    assert record.facts["held_out_normalised_loss"] == 0.5
    assert all(torch.equal(at_best[name], tensor) for name, tensor in method.state_dict().items())


def test_without_early_stop_held_out_pictures_are_looked_at_once_and_change_nothing() -> None:
    plain, plain_record = fitted(Run())
    method = ToyMethod(toy_config())
    own, seen = method.held_out_loss, []
    method.held_out_loss = lambda batch: seen.append(len(batch.valid)) or own(batch)  # type: ignore[method-assign, func-returns-value]
    record = train_toy(method, Run(), held=True)
    assert seen == [4, 1]
    assert same_bits(method, plain)
    assert plain_record.facts["held_out_normalised_loss"] is None
    batches = [ToyPictures(5, seed=1).batch(range(4)), ToyPictures(5, seed=1).batch([4])]
    with torch.no_grad():
        parts = [own(batch) for batch in batches]
    expected = 0.8 * float(parts[0].value) + 0.2 * float(parts[1].value)
    assert record.facts["held_out_loss"] == pytest.approx(expected, rel=1e-6)


def test_early_stop_without_held_out_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="early_stop"):
        fitted(Run(), early_stop=0.1)


# What it says


def test_words_come_at_tenths_with_the_mean_since() -> None:
    words: list[str] = []
    calls: list[tuple[str, int, int]] = []
    run = Run(say=words.append, progress=lambda what, done, total: calls.append((what, done, total)))
    _, record = fitted(run, steps=20)
    assert calls == [("training", done, 20) for done in range(1, 21)]
    assert len(words) == 10
    assert words[0].startswith("Step 2 of 20: loss ")
    assert words[-1] == (
        f"Step 20 of 20: loss {record.facts['loss']:.3g}, "
        f"normalised {record.facts['normalised_loss']:.2f} (1 = the mean)."
    )


def test_facts_say_what_was_done() -> None:
    _, record = fitted(Run())
    assert record.facts["views_seen"] == 80
    assert record.facts["processes"] == 1
    assert record.facts["stopped_at"] is None
    assert json.loads(json.dumps(record.facts, allow_nan=False)) == record.facts


def test_a_model_that_has_learnt_only_the_mean_is_named() -> None:
    def warnings(num_views: int, **settings: float) -> list[str]:
        method = ToyMethod(toy_config(**settings))
        return train_toy(method, Run(), pictures=ToyPictures(num_views)).warnings

    assert "little more than the mean picture" in warnings(20, steps=5, lr=1e-6)[0]
    assert warnings(19, steps=5, lr=1e-6) == []  # so few fit their mean too well
    assert warnings(20, steps=300) == []


def test_pictures_without_variation_have_no_normalised_loss() -> None:
    method, pictures = ToyMethod(toy_config(steps=3)), ToyPictures()
    pictures.tokens = torch.ones_like(pictures.tokens)
    words: list[str] = []
    record = train_toy(method, Run(say=words.append), pictures=pictures)
    assert record.facts["normalised_loss"] is None
    assert math.isfinite(record.facts["loss"])  # type: ignore[arg-type]
    assert "normalised" not in words[-1]


def test_loss_that_is_no_number_names_step_and_remedy_and_keeps_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY_SECONDS", 0)
    method = ToyMethod(toy_config())

    def spoil(step: Step) -> None:
        method.scale = math.nan if step.number == 6 else 1.0

    method.before_step = spoil
    with pytest.raises(FettleError, match=r"loss at step 7 of 20 is not a number\. Lower lr \(it is 0\.01\)"):
        train_toy(method, Run(training_dir=tmp_path))
    found = read_state(tmp_path)
    assert found is not None
    assert found[0].step == 6


def test_gradient_that_is_no_number_never_reaches_the_weights() -> None:
    method = ToyMethod(toy_config(clip=0))
    method.up.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FettleError, match="gradient of the loss at step 1"):
        train_toy(method, Run())
    assert torch.isfinite(method.up.weight).all()


def test_no_picture_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no good picture"):
        train_toy(ToyMethod(toy_config()), Run(), pictures=ToyPictures(0))


def test_step_without_a_loss_is_a_data_error() -> None:
    method = ToyMethod(toy_config())
    method.losses = lambda batch, step: iter(())  # type: ignore[method-assign]
    with pytest.raises(DataError, match="step 1 of 20"):
        train_toy(method, Run())


# The log


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), purge_orphaned_data=True)
    log.Reload()
    return {tag: {e.step: e.value for e in log.Scalars(tag)} for tag in log.Tags()["scalars"]}


def test_log_holds_the_curves(tmp_path: Path) -> None:
    _, record = fitted(Run(log_dir=tmp_path), held=True, clip=0.0, warmup=0.0)
    found = scalars(tmp_path)
    names = {"loss", "normalised_loss", "learning_rate", "gradient_norm"}
    assert set(found) == {f"training/{name}" for name in names} | {"held_out/normalised_loss"}
    assert sorted(found["training/loss"]) == list(range(1, 21))
    assert found["training/learning_rate"][16] == pytest.approx(0.01)
    assert found["training/learning_rate"][17] == pytest.approx(0.001)
    assert found["held_out/normalised_loss"] == pytest.approx({20: record.facts["held_out_normalised_loss"]})
    last = [found["training/loss"][step] for step in (19, 20)]
    assert sum(last) / 2 == pytest.approx(record.facts["loss"], rel=1e-5)


def test_log_changes_no_weight(tmp_path: Path) -> None:
    assert same_bits(fitted(Run(log_dir=tmp_path))[0], fitted(Run())[0])


def test_log_without_tensorboard_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    method = ToyMethod(toy_config())
    with pytest.raises(ConfigError, match=r'pip install "fettle\[board\]"'):
        train_toy(method, Run(log_dir=tmp_path))
    assert method.noise == []


# Start-up


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("processes", "torch"),
        ("training_config", "torch"),
        ("training", "accelerate"),
        ("training", "tensorboard"),
    ],
)
def test_import_stays_light(module: str, absent: str) -> None:
    code = f"import sys, fettle.{module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
