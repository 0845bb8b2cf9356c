"""The parts of a detector as a model folder keeps them: JSON values and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

import torch
from pydantic import TypeAdapter
from torch import Tensor

from fettle.backbones import registry as backbones
from fettle.calibration import Calibration
from fettle.exported import ExportedMethod, ExportFacts
from fettle.fitting import FittedParts
from fettle.images.framing import Frame
from fettle.judged import Calibrations
from fettle.methods.registry import find_method
from fettle.model_folder import StoredModel
from fettle.protocols import BackboneSpec, Json, Method
from fettle.refine.facts import RefineFacts
from fettle.refine.references import References
from fettle.refining import ForRefiners
from fettle.runtimes import open_graph


def pack(parts: FittedParts) -> tuple[dict[str, Json], dict[str, Mapping[str, Tensor]]]:
    """The manifest's content and the tensors by part, for `model_folder.write_model`."""
    method, calibrations, kept = parts.method, parts.calibrations, parts.for_refiners
    tensors: dict[str, Mapping[str, Tensor]] = {
        "backbone": method.backbone.state_dict(),
        "method": learnt_tensors(method),
    }
    for fold, own in enumerate(parts.fold_methods):
        tensors[f"fold{fold}"] = learnt_tensors(own)
    if kept is not None and kept.references is not None:
        tensors["references"] = kept.references.state()
    content: dict[str, Json] = {
        "method": method.name,
        "config": method.config.model_dump(mode="json"),
        "levels": list(method.levels),
        "backbone": cast("dict[str, Json]", asdict(method.backbone.spec)),
        "frame": parts.frame.model_dump(mode="json"),
        "calibration": calibrations.shared.model_dump(mode="json"),
        "product_calibrations": {
            name: own.model_dump(mode="json") for name, own in calibrations.by_product.items()
        },
        "refine": None if kept is None else kept.facts.model_dump(mode="json"),
        "product_refine": {}
        if kept is None
        else {name: own.model_dump(mode="json") for name, own in kept.product_facts.items()},
        "card": parts.card,
    }
    return content, tensors


def pack_exported(parts: FittedParts, facts: ExportFacts) -> dict[str, Json]:
    """The manifest's content of a model whose method is a graph; refiners have no use for it."""
    content, _ = pack(parts)
    return {**content, "refine": None, "product_refine": {}, "export": facts.model_dump(mode="json")}


def unpack(stored: StoredModel) -> FittedParts:
    """What `pack` or `pack_exported` packed, on the CPU.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: something is missing, or is not what it should be.
        UsageError: a graph's engine is not installed. ModelFolderError: it cannot read the graph.
    """
    content = stored.content
    method_class = find_method(str(content["method"]))
    config = method_class.Config.model_validate(content["config"])
    levels = tuple(cast("list[str]", content["levels"]))
    frame = Frame.model_validate(content["frame"])
    spec = _backbone_spec(content["backbone"], frame)
    if not all(spec.level(name) for name in levels):
        raise ValueError(f"its backbone has no levels {levels}")
    calibration = Calibration.model_validate(content["calibration"])
    by_product = {
        name: Calibration.model_validate(own)
        for name, own in _objects(content, "product_calibrations").items()
    }
    for_refiners = _for_refiners(
        content.get("refine"),
        _objects(content, "product_refine"),
        stored.tensors.get("references"),
    )
    card = content["card"]
    if not isinstance(card, dict):
        raise TypeError("its card is no object")
    calibrations = Calibrations(calibration, by_product)
    if "export" in content:
        facts = ExportFacts.model_validate(content["export"])
        graph = open_graph(facts.format, stored.graph, facts.outputs)
        exported = ExportedMethod(method_class.name, config, levels, spec, facts, graph)
        card = {**card, "export": facts.model_dump(mode="json")}
        return FittedParts(cast(Method, exported), (), frame, calibrations, card, None)
    backbone = backbones.restore_backbone(spec, levels, stored.tensors["backbone"])
    num_folds = sum(part.startswith("fold") for part in stored.tensors)
    names = ["method", *(f"fold{number}" for number in range(num_folds))]
    methods = [method_class(backbone, config, levels) for _ in names]
    for method, name in zip(methods, names, strict=True):
        load_learnt(cast(torch.nn.Module, method), stored.tensors[name])
        cast(torch.nn.Module, method).eval()  # a method may then compute with what it learnt
    return FittedParts(methods[0], tuple(methods[1:]), frame, calibrations, card, for_refiners)


def _objects(content: Mapping[str, Json], key: str) -> dict[str, Json]:
    """An object in the content; empty where an older model lacks it."""
    found = content.get(key, {})
    if not isinstance(found, dict):
        raise TypeError(f"its {key} are no object")
    return found


def _for_refiners(
    facts: Json, product_facts: Mapping[str, object], references: Mapping[str, Tensor] | None
) -> ForRefiners | None:
    """What a model folder keeps for refiners; None in one that was written before they were."""
    if facts is None:
        return None
    return ForRefiners(
        RefineFacts.model_validate(facts),
        None if references is None else References.of(references),
        {name: RefineFacts.model_validate(own) for name, own in product_facts.items()},
    )


def learnt_tensors(method: Method) -> dict[str, Tensor]:
    """What a method learnt, without its backbone; trained weights in what the configuration says."""
    state = {name: t for name, t in method.state_dict().items() if not name.startswith("backbone.")}
    if getattr(method.config, "stored", "fp32") == "fp16":  # they were rounded as the training ended
        trained = {name for name, p in cast(torch.nn.Module, method).named_parameters() if p.requires_grad}
        state |= {name: tensor.half() for name, tensor in state.items() if name in trained}
    return state


def load_learnt(method: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set what a method learnt. Buffers take the stored shape, since a memory's size is learnt too, and so do
    parameters that have no rows yet."""
    own = {name for name in method.state_dict() if not name.startswith("backbone.")}
    if own != set(state):
        raise ValueError(f"its tensors are {sorted(state)}, not {sorted(own)}")
    buffers = dict(method.named_buffers())
    for name, tensor in state.items():
        place, _, last = name.rpartition(".")
        module = method.get_submodule(place)
        if name in buffers:
            if (tensor.dtype, tensor.ndim) != (buffers[name].dtype, buffers[name].ndim):
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
            setattr(module, last, tensor)
            continue
        parameter = getattr(module, last)
        if (
            parameter.numel() == 0
            and parameter.ndim == tensor.ndim
            and parameter.shape[-1] == tensor.shape[-1]
        ):
            # of a grid that was not known yet
            parameter.data = tensor.to(parameter.dtype)
        elif parameter.shape == tensor.shape:
            parameter.data.copy_(tensor)
        else:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}")


def _backbone_spec(fields: Json, frame: Frame) -> BackboneSpec:
    """A stored backbone's description, which the stored frame must fit."""
    spec = TypeAdapter(BackboneSpec).validate_python(fields)
    step = spec.side_step
    if step < 1 or frame.height % step or frame.width % step:
        raise ValueError(f"its backbone cannot take {frame.height} x {frame.width} px")
    if not min(spec.std) > 0 or any(min(level.channels, level.stride) < 1 for level in spec.levels):
        raise ValueError("its backbone's channels, strides or std are not above 0")
    return spec
