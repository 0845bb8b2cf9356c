"""Light modules stay light: start-up is part of the product."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "timm", "scipy", "pyarrow", "faiss")


def loaded_by(statement: str) -> set[str]:
    """Heavy packages that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}; import sys; print(*(n for n in {HEAVY!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "fettle",
        "fettle.cli.main",
        "fettle.inspection",
        "fettle.protocols",
        "fettle.metrics",
        "fettle.calibration",
        "fettle.datasets.open",
        "fettle.images.framing",
        "fettle.images.decode",
        "fettle.report.run_folder",
    ],
)
def test_light_module_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_public_names_are_found_when_they_are_used() -> None:
    code = "import fettle; assert all(getattr(fettle, name) for name in fettle.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_public_name_is_an_attribute_error() -> None:
    import fettle

    with pytest.raises(AttributeError, match="Detektor"):
        fettle.Detektor  # noqa: B018
