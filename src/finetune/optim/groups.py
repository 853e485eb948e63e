"""Which parameters decay, which share a learning rate, and which weights a low-rank optimizer projects.

Everything here is a pure function of a model and a few strings; nothing is changed on the model.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from finetune.errors import ArgumentError, nearest

ParameterGroup = dict[str, Any]

_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_OUTPUT_LAYERS = {"lm_head", "score", "classifier", "qa_outputs"}


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Returns the names of the parameters that weight decay applies to.

    Left out: everything inside an `nn.LayerNorm`, and every name that contains `bias` or a spelling of "norm".
    Names and their order agree with `transformers.Trainer.get_decay_parameter_names`.
    """
    return [name for name in _names_outside_layer_norms(model, "") if not _NOT_DECAYED.search(name.lower())]


def _names_outside_layer_norms(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        if not isinstance(child, nn.LayerNorm):
            yield from _names_outside_layer_norms(child, f"{prefix}{name}.")
    yield from (f"{prefix}{name}" for name in module._parameters)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    decay_names: Sequence[str] | None = None,
    learning_rates: Mapping[str, float] | None = None,
) -> list[ParameterGroup]:
    """Returns the groups for an optimizer: first the decayed parameters, then the others.

    Both groups exist even when one is empty and keep the order of `model.named_parameters()`, so an `optimizer.pt`
    crosses over between this package and transformers. `learning_rates` maps regular expressions (searched in the
    parameter name, first match wins) to learning rates; each adds a group with its own `lr` after the group it was
    taken from. Parameters that live on different device meshes get groups of their own, because fused and foreach
    kernels cannot span meshes.

    Raises `ArgumentError` for a pattern that matches no trainable parameter.
    """
    decayed = set(decay_parameter_names(model) if decay_names is None else decay_names)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    pattern_of = _assign_patterns([name for name, _ in trainable], learning_rates or {})
    groups: list[ParameterGroup] = []
    for wants_decay in (True, False):
        members = [(name, p) for name, p in trainable if (name in decayed) is wants_decay]
        decay = weight_decay if wants_decay else 0.0
        ordinary = [p for name, p in members if pattern_of[name] is None]
        groups.append({"params": ordinary, "weight_decay": decay})
        for pattern, rate in (learning_rates or {}).items():
            chosen = [p for name, p in members if pattern_of[name] == pattern]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "lr": rate})
    return _split_by_mesh(groups)


def _assign_patterns(names: Sequence[str], rates: Mapping[str, float]) -> dict[str, str | None]:
    """Returns, for each name, the first pattern found in it."""
    compiled = [(pattern, _compile(pattern, "optim_args")) for pattern in rates]
    assigned = {name: next((text for text, rx in compiled if rx.search(name)), None) for name in names}
    for pattern, rx in compiled:
        if not any(rx.search(name) for name in names):
            raise ArgumentError(
                f"`optim_args` gives a learning rate for `{pattern}`, which matches no trainable parameter."
                f"{nearest(pattern, names)} Change the pattern after `lr@`."
            )
    return assigned


def _split_by_mesh(groups: list[ParameterGroup]) -> list[ParameterGroup]:
    meshes = {_mesh(p) for group in groups for p in group["params"]}
    if len(meshes) <= 1:
        return groups
    split: list[ParameterGroup] = []
    for group in groups:
        by_mesh: dict[Any, list[Tensor]] = defaultdict(list)
        for p in group["params"]:
            by_mesh[_mesh(p)].append(p)
        split.extend({**group, "params": params} for params in by_mesh.values())
    return split


def _mesh(parameter: Tensor) -> Any:
    return getattr(parameter, "device_mesh", None)


def partition(
    groups: Sequence[ParameterGroup], selections: Sequence[tuple[Iterable[Tensor], ParameterGroup]]
) -> list[ParameterGroup]:
    """Returns the groups, each split into its unselected parameters and one part per selection.

    A part carries the keys of its group and of the selection. Empty parts are left out.
    """
    key_of = {id(p): i for i, (members, _) in enumerate(selections) for p in members}
    parts: list[ParameterGroup] = []
    for group in groups:
        members: list[Tensor] = list(group["params"])
        for i, extra in [(None, {}), *((i, extra) for i, (_, extra) in enumerate(selections))]:
            chosen = [p for p in members if key_of.get(id(p)) == i]
            if chosen:
                parts.append({**group, **extra, "params": chosen})
    return parts


def target_weight_names(model: nn.Module, targets: Any, optim: str) -> list[str]:
    """Returns the names of the trainable linear weights that `targets` (`optim_target_modules`) selects.

    `"all-linear"` selects every linear layer except the output layer. Any other string is a regular expression for
    the whole module name. In a list, each entry selects modules whose name contains it or matches it as a whole
    regular expression, as in transformers. Modules that are not linear are passed over in silence, because a pattern
    such as `"attn"` is meant to reach the linear layers inside.

    Raises `ArgumentError` when `targets` is missing or of another type, and for each pattern that selects nothing.
    """
    linear = _linear_modules(model)
    if isinstance(targets, str):
        if targets.replace("_", "-") == "all-linear":
            head = _output_layer(model)
            chosen = {name for name, m in linear.items() if m is not head and name.split(".")[-1] not in _OUTPUT_LAYERS}
            _require_match(chosen, targets, optim, linear)
        else:
            rx = _compile(targets, "optim_target_modules")
            chosen = {name for name in linear if rx.fullmatch(name)}
            _require_match(chosen, targets, optim, linear)
    elif isinstance(targets, (list, tuple)) and targets and all(isinstance(t, str) for t in targets):
        chosen = set()
        for pattern in targets:
            found = {name for name in linear if pattern in name} | _full_matches(pattern, linear)
            _require_match(found, pattern, optim, linear)
            chosen |= found
    else:
        raise ArgumentError(
            f"`optim={optim}` needs `optim_target_modules`: a list of module names or regular expressions, one regular "
            f"expression, or 'all-linear'. Given: {targets!r}."
        )
    return [f"{name}.weight".removeprefix(".") for name in linear if name in chosen]


def _linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the linear modules with a trainable 2-D weight, in model order; GPT-2's `Conv1D` is linear too."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if isinstance(weight := module.weight, Tensor) and weight.requires_grad and weight.dim() == 2
    }


def _output_layer(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _full_matches(pattern: str, names: Mapping[str, Any]) -> set[str]:
    rx = _compile(pattern, "optim_target_modules")
    return {name for name in names if rx.fullmatch(name)}


def _require_match(found: set[str], pattern: str, optim: str, linear: Mapping[str, Any]) -> None:
    if found:
        return
    if not linear:
        raise ArgumentError(
            f"`optim={optim}` has nothing to project: the model has no linear layer with a trainable weight."
        )
    short = sorted({re.sub(r"\b\d+\b", "*", name) for name in linear})
    parts = [name.split(".") for name in linear]
    candidates = {".".join(path[i:]) for path in parts for i in range(len(path))} | {
        word for path in parts for word in path
    }
    word = re.sub(r"[^\w.]+", "", pattern).strip(".")
    hint = nearest(word, sorted(candidates))
    raise ArgumentError(
        f"`optim_target_modules`: `{pattern}` matches no trainable linear layer.{hint} "
        f"The model has: {', '.join(short[:12])}{', ...' if len(short) > 12 else ''}."
    )


def _compile(pattern: str, argument: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as problem:
        raise ArgumentError(f"`{argument}`: `{pattern}` is not a regular expression ({problem}).") from problem
