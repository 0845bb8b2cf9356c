"""Methods by name. One line a method; others join by the entry point group `fettle.methods`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import cast

from pydantic import BaseModel, ValidationError

from fettle.errors import ConfigError, UsageError, first_failing, nearest_name
from fettle.protocols import Method

_HOME = {
    "agpnet": "fettle.methods.agpnet:AGPNet",
    "cflow": "fettle.methods.cflow:Cflow",
    "fpfnet": "fettle.methods.fpfnet:FPFNet",
    "padim": "fettle.methods.padim:Padim",
    "patchcore": "fettle.methods.patchcore:PatchCore",
    "tfanet": "fettle.methods.tfanet:TFANet",
    "uniad": "fettle.methods.uniad:Uniad",
}


def method_names() -> tuple[str, ...]:
    """Every method that is installed."""
    return tuple(sorted(_HOME | _joined()))


def find_method(name: str) -> type[Method]:
    """The class of a method. An unknown name is refused with the nearest right one."""
    homes = _HOME | _joined()
    if name not in homes:
        raise UsageError(f"There is no method '{name}'.", nearest_name(name, homes))
    module, attribute = homes[name].split(":")
    return cast("type[Method]", getattr(import_module(module), attribute))


def make_config(method: type[Method], preset: str, settings: dict[str, object]) -> BaseModel:
    """A preset's configuration with single fields changed.

    Raises:
        UsageError: no such preset. ConfigError: no such field, or a value that it does not take.
    """
    if preset not in method.presets:
        raise UsageError(
            f"Method '{method.name}' has no preset '{preset}'.", nearest_name(preset, method.presets)
        )
    config = method.presets[preset].config
    known = type(config).model_fields
    for field in settings:
        if field not in known:
            raise ConfigError(f"Method '{method.name}' has no field '{field}'.", nearest_name(field, known))
    try:
        return type(config).model_validate({**config.model_dump(), **settings})
    except ValidationError as error:
        place, given, why = first_failing(error)
        if not place:
            raise ConfigError(
                f"Method '{method.name}': {why}.", "Correct what was given with --set."
            ) from error
        raise ConfigError(
            f"Field '{place}' of method '{method.name}' cannot be {given!r}: {why}.",
            "Correct the value given with --set.",
        ) from error


def _joined() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group="fettle.methods")}
