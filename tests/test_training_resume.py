"""Training that is stopped and goes on: the state on disk, signals, what is done about damage."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fettle import training
from fettle.checkpoint import STATE_FILE, read_state, signals_held
from fettle.protocols import FitRecord, Run, Step
from fettle.training import forget
from training_toys import ToyMethod, ToyPictures, fitted, same_bits, toy_config, train_toy


def stop_at(method: ToyMethod, number: int, error: BaseException, *, loss: int = 0) -> None:
    """Let the method raise at a loss of a step."""
    calls = Counter[int]()

    def raise_there(step: Step) -> None:
        calls[step.number] += 1
        if step.number == number and calls[number] == loss + 1:
            raise error

    method.before_step = raise_there


@pytest.mark.parametrize(
    ("held", "num_losses", "changes"),
    [
        (False, 1, {}),
        (False, 1, {"ema": 0.9}),
        (False, 4, {"schedule": "cosine", "balance": "sqrt"}),
        (True, 2, {"ema": 0.8, "early_stop": 0.3, "lr": 0.1, "weight_decay": 0.0}),
    ],
    ids=["plain", "average", "several losses", "early stop"],
)
def test_resumed_training_gives_the_same_bits(
    tmp_path: Path, held: bool, num_losses: int, changes: dict[str, object]
) -> None:
    whole, whole_record = fitted(Run(), num_losses=num_losses, held=held, **changes)
    run = Run(training_dir=tmp_path / "state")
    stopped = ToyMethod(toy_config(**changes), num_losses=num_losses)
    stop_at(stopped, 7, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train_toy(stopped, run, held=held)
    words: list[str] = []
    resumed, record = fitted(replace(run, say=words.append), num_losses=num_losses, held=held, **changes)
    assert words[0] == "The training goes on from step 7 of 20."
    assert same_bits(resumed, whole)
    assert without_time(record) == without_time(whole_record)


def without_time(record: FitRecord) -> FitRecord:
    return FitRecord({**record.facts, "seconds": 0}, record.warnings)


def test_error_between_two_losses_leaves_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "KEEP_EVERY_SECONDS", 0)
    stopped = ToyMethod(toy_config(), num_losses=2)
    stop_at(stopped, 7, KeyboardInterrupt(), loss=1)
    with pytest.raises(KeyboardInterrupt):
        train_toy(stopped, Run(training_dir=tmp_path))
    resumed, _ = fitted(Run(training_dir=tmp_path), num_losses=2)
    assert resumed.noise[0].equal(stopped.noise[7])
    assert same_bits(resumed, fitted(Run(), num_losses=2)[0])


def test_finished_training_returns_at_once(tmp_path: Path) -> None:
    first, record = fitted(Run(training_dir=tmp_path), held=True, early_stop=0.5)
    words: list[str] = []
    again, same_record = fitted(Run(training_dir=tmp_path, say=words.append), held=True, early_stop=0.5)
    assert again.noise == []
    assert same_bits(again, first)
    assert same_record == record
    assert not again.training
    assert [word.split(":")[0] for word in words] == ["This training was finished already"]


@pytest.mark.parametrize("other", ["lr", "seed", "pictures", "products", "held out"])
def test_state_of_another_training_is_not_used(tmp_path: Path, other: str) -> None:
    fitted(Run(training_dir=tmp_path))
    words: list[str] = []
    run = Run(seed=int(other == "seed"), training_dir=tmp_path, say=words.append)
    method = ToyMethod(toy_config(lr=0.02 if other == "lr" else 0.01))
    pictures = ToyPictures(
        seed=int(other == "pictures"), products=["b"] * 12 if other == "products" else None
    )
    train_toy(method, run, pictures=pictures, held=other == "held out")
    assert "is of another training" in words[0]
    assert len(method.noise) == 20


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no header"])
def test_damaged_state_is_named_and_the_training_starts_anew(tmp_path: Path, damage: str) -> None:
    stopped = ToyMethod(toy_config())
    stop_at(stopped, 7, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train_toy(stopped, Run(training_dir=tmp_path))
    path = tmp_path / STATE_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 255
    kept = {"cut": data[:-40], "flipped": data, "empty": b"", "no header": b"\x02\0\0\0\0\0\0\0{}"}[damage]
    path.write_bytes(kept)
    words: list[str] = []
    method, _ = fitted(Run(training_dir=tmp_path, say=words.append))
    assert "is damaged" in words[0]
    assert "starts anew" in words[0]
    assert same_bits(method, fitted(Run())[0])


def test_state_of_another_shape_is_not_used(tmp_path: Path) -> None:
    """Same settings, but the method was prepared to other sizes."""
    fitted(Run(training_dir=tmp_path))
    other = ToyMethod(toy_config())
    other.momentum = torch.zeros(2, 2)
    other.after_step = lambda step: None  # type: ignore[method-assign]
    words: list[str] = []
    train_toy(other, Run(training_dir=tmp_path, say=words.append))
    assert "does not fit the method" in words[0]
    assert len(other.noise) == 20


def test_state_is_kept_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_at: list[int] = []
    method = ToyMethod(toy_config(steps=5))

    def look(step: Step) -> None:
        found = read_state(tmp_path)
        kept_at.append(-1 if found is None else found[0].step)

    method.before_step = look
    monkeypatch.setattr(training, "KEEP_EVERY_SECONDS", 0)
    train_toy(method, Run(training_dir=tmp_path))
    assert kept_at == [-1, 1, 2, 3, 4]


def test_state_holds_no_pickle(tmp_path: Path) -> None:
    fitted(Run(training_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    size = int.from_bytes((tmp_path / STATE_FILE).read_bytes()[:8], "little")
    header = json.loads((tmp_path / STATE_FILE).read_bytes()[8 : 8 + size])
    assert set(json.loads(header["__metadata__"]["fettle"])) >= {"fingerprint", "step", "sha256"}


def test_folder_that_takes_no_state_does_not_end_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    words: list[str] = []
    method, _ = fitted(Run(training_dir=tmp_path / "file" / "state", say=words.append))
    assert same_bits(method, fitted(Run())[0])
    assert "could not be written" in words[-1]
    assert len(words) == 11  # ten of progress, one of this


def test_forget_removes_states_and_nothing_else(tmp_path: Path) -> None:
    for name in ("", "fold0"):
        fitted(Run(training_dir=tmp_path / "state" / name), steps=1)
    forget(tmp_path / "state")
    assert not (tmp_path / "state").exists()
    fitted(Run(training_dir=tmp_path / "state"), steps=1)
    (tmp_path / "state" / "notes.txt").write_text("mine")
    forget(tmp_path / "state")
    forget(tmp_path / "never")
    forget(None)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["notes.txt"]


def test_interrupt_waits_for_the_end_of_the_step(tmp_path: Path) -> None:
    method = ToyMethod(toy_config(), num_losses=4)

    def once(step: Step) -> None:
        if step.number == 7 and len(method.noise) == 8:
            method.before_step = lambda step: None
            os.kill(os.getpid(), signal.SIGINT)

    method.before_step = once
    with pytest.raises(KeyboardInterrupt):
        train_toy(method, Run(training_dir=tmp_path))
    found = read_state(tmp_path)
    assert found is not None
    assert (found[0].step, found[0].updates) == (8, 32)
    assert same_bits(fitted(Run(training_dir=tmp_path), num_losses=4)[0], fitted(Run(), num_losses=4)[0])


def test_second_interrupt_comes_through_at_once() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), signals_held():
        signal.raise_signal(signal.SIGINT)
        reached = True
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second signal was held")
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
