"""The trunk of a classifier without padding: batches stay padded for the head, the layers see real tokens only.

A classification head reads one position of each row (or the mean over its mask), so it wants padded hidden states
(B, L, H). The layers below do not: here the real tokens of a batch are gathered into one row (1, N, H), the layers run
on it with `kernels.attention`, which keeps rows apart, and the result is scattered back, zero at padding. Embeddings
are made before the gathering: positions, token types and noise on embeddings are those of the padded batch.

Legend: B rows, L tokens of the longest row, N real tokens of all rows, H width.

A batch of two rows, with the mask [[1, 1, 1], [1, 0, 0]]: `index` = [0, 1, 2, 3] of the 6 places, `cu_seq_lens_q` =
[0, 3, 4], positions [0, 1, 2, 0]; the layers run on 4 tokens in place of 6.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import ArgumentError, one_line
from finetune.kernels.attention import (
    PackedAttention,
    backbone_of,
    configs_of,
    in_mode,
    packed_unsupported_reason,
    register_packed_attention,
)
from finetune.kernels.packed_scores import RowsUnderWay
from finetune.wrappers import unwrap_peft

_STACKS = ("encoder", "transformer")
_LAYERS = ("layers", "h")


@dataclass(frozen=True)
class _Rows:
    """Where the real tokens of one batch lie: `index` (N) into its B x L places."""

    index: Tensor
    shape: tuple[int, int]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, mask: Any, padding_side: str) -> _Rows | None:
        """Returns the rows of a mask (B, L); None without one, or where a row is empty or padded on the other side."""
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return None
        real = mask.bool().cpu()  # the device is waited for once, here
        # A head that reads the first place of each row would find nothing there.
        if not bool(real[:, 0 if padding_side == "right" else -1].all()):
            return None
        lengths = real.sum(1)
        ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(mask.device)
        longest = int(lengths.max())
        lengths_of = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return cls(real.flatten().nonzero()[:, 0].to(mask.device), (real.shape[0], real.shape[1]), lengths_of)

    def gather(self, states: Tensor) -> Tensor:
        """Returns (1, N, ...) of (B, L, ...)."""
        return states.flatten(0, 1).index_select(0, self.index.to(states.device))[None]

    def scatter(self, states: Tensor) -> Tensor:
        """Returns (B, L, H) of (1, N, H), zero at padding."""
        places = states.new_zeros(self.shape[0] * self.shape[1], states.shape[-1])
        return places.index_copy(0, self.index.to(states.device), states[0]).view(*self.shape, -1)


class UnpaddedTrunk:
    """The handle of one model whose trunk leaves padding out: `remove()` makes it what it was."""

    def __init__(self, base: nn.Module, backbone: nn.Module, stack: nn.Module, padding_side: str) -> None:
        self._stack, self._whole = stack, stack is backbone
        self._padding_side = padding_side
        self._rows: _Rows | None = None
        self._names = list(inspect.signature(backbone.forward).parameters)
        self._stack_names = list(inspect.signature(stack.forward).parameters)
        self._hooks = [backbone.register_forward_pre_hook(self._read_mask, with_kwargs=True)]
        if not self._whole:
            self._hooks.append(stack.register_forward_pre_hook(self._unpad_states, with_kwargs=True))
        # After the hooks above: what they leave of a batch is what packed attention checks and counts.
        self._attention = PackedAttention(base, stack, configs_of(base))
        self._hooks.append(stack.register_forward_hook(self._pad, with_kwargs=False))
        self._hooks.append(backbone.register_forward_hook(self._forget, always_call=True))

    def remove(self) -> None:
        """Restores the attention and removes the hooks. Safe to call twice."""
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.remove()
        self._attention.remove()
        self._forget()

    def __enter__(self) -> UnpaddedTrunk:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _read_mask(self, backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._forget()
        named: dict[str, Any] = {**dict(zip(self._names, args, strict=False)), **kwargs}
        given = ("past_key_values", "encoder_hidden_states", "cu_seq_lens_q")
        if any(named.get(name) is not None for name in given):
            return None
        if any(named.get(name) for name in ("output_attentions", "output_hidden_states")):
            return None  # asked for by layer, and as padded
        self._rows = rows = _Rows.of(named.get("attention_mask"), self._padding_side)
        if rows is None:
            return None
        if not self._whole:
            RowsUnderWay.count += 1  # so that no mask is made for the layers
            return None
        states = named.get("inputs_embeds")
        if states is None:
            states = backbone.get_input_embeddings()(named["input_ids"])  # pyright: ignore[reportCallIssue]
        positions = named.get("position_ids")
        if positions is None:
            positions = torch.arange(rows.shape[1], device=states.device)
        positions = rows.gather(positions.expand(rows.shape))
        named.update(rows.arguments, inputs_embeds=rows.gather(states), position_ids=positions)
        named.update(input_ids=None, attention_mask=None)
        return (), named

    def _unpad_states(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        rows = self._rows
        if rows is None:
            return None
        named: dict[str, Any] = {**dict(zip(self._stack_names, args, strict=False)), **kwargs}
        states = named.pop(self._stack_names[0])
        named.update(rows.arguments, attention_mask=None, position_ids=None)
        return (rows.gather(states),), named

    def _pad(self, _: nn.Module, __: Any, output: Any) -> Any:
        if self._rows is not None:
            output.last_hidden_state = self._rows.scatter(output.last_hidden_state)
        return output

    def _forget(self, *_: Any) -> None:
        # Ctrl-C skips all hooks after a forward pass, so the next pass and `remove` call this too.
        if self._rows is not None and not self._whole:
            RowsUnderWay.count -= 1
        self._rows = None


def use_unpadded_trunk(model: nn.Module, padding_side: str = "right") -> UnpaddedTrunk:
    """Lets the trunk of a classifier run on real tokens only; returns the handle that undoes it.

    Same logits and gradients as padded, up to rounding; dropout draws other numbers, for fewer places. Batches without
    `attention_mask`, with an empty row, or padded on the other side than `padding_side` run as ever. Raises
    `ArgumentError` with the reason of `unpadded_unsupported_reason`; whether rows are kept apart is what
    `why_not_unpadded` finds out.
    """
    reason = unpadded_unsupported_reason(model)
    if reason is not None:
        raise ArgumentError(f"`padding_free`: {reason}. Set `padding_free=False`.")
    register_packed_attention()
    base = unwrap_peft(model)
    backbone = backbone_of(base)
    return UnpaddedTrunk(base, backbone, _stack_of(backbone) or backbone, padding_side)


def unpadded_unsupported_reason(model: nn.Module) -> str | None:
    """Returns why the trunk of `model` cannot leave padding out, as the end of a sentence, or None."""
    reason = packed_unsupported_reason(model)
    if reason is not None:
        return reason
    base = unwrap_peft(model)
    backbone = backbone_of(base)
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and any(config.is_prompt_learning for config in configs.values()):
        return "PEFT puts its virtual tokens before each row of a batch"
    if any(getattr(base.config, name, False) for name in ("output_attentions", "output_hidden_states")):
        return "`output_attentions` or `output_hidden_states` of its config asks for every layer as padded"
    if "flash" in (getattr(base.config, "_attn_implementation", None) or ""):
        return "it was loaded with a FlashAttention, which leaves padding out of attention itself"
    if _stack_of(backbone) is None:
        parameters = inspect.signature(backbone.forward).parameters
        if not {"inputs_embeds", "position_ids"} <= set(parameters) or not any(hasattr(backbone, n) for n in _LAYERS):
            return f"the layers of {type(backbone).__name__} are not found"
    return None


def _stack_of(backbone: nn.Module) -> nn.Module | None:
    """Returns the child that holds the layers and takes (hidden states, attention mask, keywords), if there is one."""
    for name in _STACKS:
        stack = getattr(backbone, name, None)
        if isinstance(stack, nn.Module):
            parameters = inspect.signature(stack.forward).parameters
            kinds = {each.kind for each in parameters.values()}
            if "attention_mask" in parameters and inspect.Parameter.VAR_KEYWORD in kinds:
                return stack
    return None


# ---- The proof ----


def why_not_unpadded(model: nn.Module, padding_side: str = "right") -> str | None:
    """Returns why `model` has to stay padded, as the end of a sentence, or None where padding can be left out.

    An experiment on the model as it is, in evaluation mode without gradient, with rows of random tokens: hidden states
    and logits without padding must be those with it, and changing one row must move that row and no other.
    """
    reason = unpadded_unsupported_reason(model)
    if reason is not None:
        return reason
    if any(parameter.numel() == 0 or parameter.is_meta for parameter in model.parameters()):
        return "its weights are sharded while they load, so nothing can be tried"
    try:
        with in_mode(model, training=False), torch.no_grad():
            return _compare(model, padding_side)
    except (ArgumentError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        told = f"{type(error).__name__}: {one_line(error, 200)}"
        return f"{type(unwrap_peft(model)).__name__} does not take such a batch ({told})"


def _compare(model: nn.Module, side: str, lengths: tuple[int, ...] = (7, 1, 9)) -> str | None:
    base = unwrap_peft(model)
    backbone = backbone_of(base)
    table = backbone.get_input_embeddings().weight
    pad = base.config.get_text_config().pad_token_id
    allowed = torch.arange(table.shape[0])
    allowed = allowed[allowed != (-1 if pad is None else pad)]  # positions may be counted from padding tokens
    make = torch.Generator().manual_seed(0)
    shape = (len(lengths), max(lengths))
    first = torch.randint(0, len(allowed), shape, generator=make)
    other = allowed[(first + torch.randint(1, len(allowed), shape, generator=make)) % len(allowed)].to(table.device)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).to(table.device)
    mask = mask if side == "right" else mask.flip(1)
    fill = 0 if pad is None else pad
    ids = allowed[first].to(table.device).masked_fill(~mask, fill)
    single = table.dtype in (torch.float32, torch.float64)
    near, same = (1e-4, 1e-5) if single else (5e-2, 5e-2)  # of hidden states and of logits: what rounding explains

    def run(tokens: Tensor) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        # Registered last, so that it sees what the head sees.
        hook = backbone.register_forward_hook(lambda _, __, output: found.append(output.last_hidden_state))
        try:
            logits = model(input_ids=tokens, attention_mask=mask.long()).logits
        finally:
            hook.remove()
        return found[0].masked_fill(~mask[..., None], 0.0).float(), logits.float()

    padded, padded_logits = run(ids)
    size, size_of_logits = float(padded.abs().max()), max(1.0, float(padded_logits.abs().max()))
    if size == 0.0:
        return "its hidden states are zero for every token, so nothing can be proven"
    with use_unpadded_trunk(model, side):
        states, logits = run(ids)
        apart = float((states - padded).abs().max()) / size, float((logits - padded_logits).abs().max())
        if not (apart[0] <= near and apart[1] <= same * size_of_logits):
            return f"hidden states without padding are {apart[0]:.0e} of their size away, logits {apart[1]:.0e}"
        for row in range(len(lengths)):
            mixed = ids.clone()
            mixed[row] = other[row].masked_fill(~mask[row], fill)
            moved_states, moved_logits = run(mixed)
            moved = (moved_states - states).abs().amax((1, 2)) / size
            moved_logit = (moved_logits - logits).abs().amax(1) / size_of_logits
            if not float(moved[row]) > near:
                return "its hidden states are the same for other tokens, so nothing can be proven"
            others = [each for each in range(len(lengths)) if each != row]
            if not (float(moved[others].max()) <= near and float(moved_logit[others].max()) <= same):
                return f"changing one row moved another by {float(moved[others].max()):.0e}"
    return None
