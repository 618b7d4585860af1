"""The gated MLP of Kyutai's blocks, with its linear layers called as modules.

Kyutai's ``ActivationGating`` reads the raw weights of its two linear layers whenever ``linear_in`` is an ``nn.Linear``,
so whatever takes the place of ``linear_out`` would never be called. ``attach`` therefore puts a :class:`ModularGating`
in its place, which computes the same products in the same order: bit-equal, but on CUDA in eval mode, where Kyutai's
compiles them into one kernel.
"""

from __future__ import annotations

from torch import Tensor, nn


class ModularGating(nn.Module):
    """``linear_out(activation(a) · b)`` with ``(a, b) = linear_in(x)``.

    It shares the children of the module it stands in for, so the model's ``state_dict`` keeps its keys, and what is put
    into one (a LoRA layer, say) is in the other when that is given back.

    Args:
        gating: Kyutai's ``ActivationGating``.
    """

    # Kyutai's marker: FSDP wraps this module as a whole.
    _fsdp_final = True

    def __init__(self, gating: nn.Module) -> None:
        super().__init__()
        self.__dict__["gating"] = gating
        self.__dict__["_modules"] = gating._modules
        self.training = gating.training

    def train(self, mode: bool = True) -> ModularGating:
        """Set training mode, of the original module too."""
        super().train(mode)
        self.__dict__["gating"].training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, D]`` to ``[B, T, D]``."""
        linear_in, linear_out = self._modules["linear_in"], self._modules["linear_out"]
        assert linear_in is not None
        assert linear_out is not None
        a, b = linear_in(x).unflatten(-1, (2, -1)).unbind(-2)
        return linear_out(self.__dict__["gating"].activation(a) * b)
