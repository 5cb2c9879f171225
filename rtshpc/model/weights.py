"""Weights in and out of a detector, always strict: a tensor too many, too few or of another shape is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from rtshpc.core.errors import RtshpcError, unknown
from rtshpc.model.detector import Detector

ONE = "backbone.bottom_up."
"""Prefix of the backbone in a detector of one modality (Detectron2's)."""

SEVERAL = "backbone.bottom_ups."
"""Prefix of the backbones in a detector of several modalities; the modality's name follows."""

FUSION = "backbone.fusion."


class WeightsError(RtshpcError):
    """Weights do not fit the detector."""


def load_strict(module: nn.Module, state: Mapping[str, Tensor], place: str) -> None:
    """Copy a state dict into a module.

    Args:
        module: detector or part of one.
        state: tensors by the module's names; a detector of one modality takes Detectron2's names.
        place: where the weights come from, for the message.

    Raises:
        WeightsError: names the missing and the unexpected tensors, and those of another shape.
    """
    check_fit(module.state_dict(), state, place)
    module.load_state_dict(dict(state), strict=True)


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], place: str) -> None:
    """Raise WeightsError, which names all that is missing, unexpected or misshapen, unless `state` can replace `own`.

    Args:
        own: tensors of the module by name; only their shapes count.
        state: tensors to put in their place.
        place: where `state` comes from, for the message.
    """
    wrong = [
        f"{name} is {tuple(state[name].shape)}, must be {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = [
        listed("missing", (name for name in own if name not in state)),
        listed("unexpected", (name for name in state if name not in own)),
        listed("of another shape", wrong),
    ]
    found = "; ".join(fault for fault in faults if fault)
    if found:
        raise WeightsError(f"{place}: weights do not fit the model: {found}")


def load_backbone(detector: Detector, modality: str, state: Mapping[str, Tensor], place: str = "weights") -> None:
    """Copy the backbone of a detector of one modality into this detector's backbone of `modality`.

    Args:
        detector: of one modality or several.
        modality: whose backbone to fill.
        state: state dict of the other detector (the rest of it is not used).
        place: where the weights come from, for the message.

    Raises:
        WeightsError: no such modality, no backbone in `state`, or tensors that do not fit.
    """
    backbones = detector.backbone.backbones()
    if modality not in backbones:
        raise WeightsError(unknown("modality", modality, backbones))
    load_strict(backbones[modality], _below(state, ONE), f"{place}: backbone of {modality}")


def load_heads(detector: Detector, state: Mapping[str, Tensor], place: str = "weights") -> None:
    """Copy pyramid, proposals and heads of another detector; backbones and fusion stay as they are.

    Raises:
        WeightsError: the tensors do not fit.
    """
    own = detector.state_dict()
    kept = {name: tensor for name, tensor in own.items() if _outside(name)}
    given = {name: tensor for name, tensor in state.items() if not _outside(name)}
    load_strict(detector, {**kept, **given}, f"{place}: pyramid and heads")


def trainable_state(detector: Detector) -> dict[str, Tensor]:
    """All weights and buffers but those of frozen backbones: what a checkpoint has to hold."""
    state = detector.state_dict()
    if not detector.frozen:
        return state
    return {name: tensor for name, tensor in state.items() if not name.startswith((ONE, SEVERAL))}


def load_trainable(detector: Detector, state: Mapping[str, Tensor], place: str = "checkpoint") -> None:
    """Copy what `trainable_state` gave back into a detector of the same kind.

    Raises:
        WeightsError: the tensors do not fit.
    """
    wanted = set(trainable_state(detector))
    kept = {name: tensor for name, tensor in detector.state_dict().items() if name not in wanted}
    load_strict(detector, {**kept, **state}, place)


def _outside(name: str) -> bool:
    """Whether a tensor belongs to a backbone or to the fusion."""
    return name.startswith((ONE, SEVERAL, FUSION))


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def listed(word: str, names: Iterable[str], most: int = 5) -> str:
    """`2 missing (a, b)`, cut after `most` names; empty without any."""
    found = list(names)
    more = f", and {len(found) - most} more" if len(found) > most else ""
    return f"{len(found)} {word} ({', '.join(found[:most])}{more})" if found else ""
