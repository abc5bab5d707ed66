"""Norm and linear map, as they are quick on a CPU.

Shapes: B rows, T columns of a call, E hidden size.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .memory_rmt import at_least_float32, is_plain


def inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    """One over the root mean square along the last axis, (..., 1), in half the time of `mean`."""
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.addcmul(wide.new_full((), eps), length, length, value=1 / wide.shape[-1]).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """The norm on a CPU in half the time of `F.rms_norm`, forward and backward; and one over the root mean square.

    The same operations as without gradients, so that both runs of a reentrant checkpoint give the same bits.
    """

    @staticmethod
    def forward(states: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        inverse = inverse_rms(states, eps)
        return (states * weight).mul_(inverse), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.eps = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        states, weight, inverse = ctx.saved_tensors
        if gradient is None:
            return None, None, None
        if torch.is_grad_enabled():  # the gradient is to have a gradient
            normed = F.rms_norm(states, weight.shape, weight, ctx.eps)
            wanted = [
                each for each, is_wanted in zip((states, weight), ctx.needs_input_grad, strict=False) if is_wanted
            ]
            found = list(torch.autograd.grad(normed, wanted, gradient, create_graph=True))
            return *(found.pop(0) if is_wanted else None for is_wanted in ctx.needs_input_grad[:2]), None
        unit = states * inverse
        product = gradient * unit
        of_weight = product.reshape(-1, weight.shape[0]).sum(0) if ctx.needs_input_grad[1] else None
        share = (product @ weight)[..., None] / -weight.shape[0]
        return unit.mul_(share).addcmul_(gradient, weight).mul_(inverse), of_weight, None


class RMTRMSNorm(nn.Module):
    """Root mean square norm over the last axis, computed in float32 or wider."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = at_least_float32(hidden_states)
        weight = at_least_float32(self.weight).to(wide.dtype)
        if wide.device.type != "cpu" or (self.training and not is_plain(wide)):
            normed = F.rms_norm(wide, weight.shape, weight, self.eps)  # which compilers and `torch.func` know
        elif torch.is_grad_enabled() and is_plain(wide):
            normed, _ = _RMSNorm.apply(wide, weight, self.eps)
        else:
            normed = wide * weight * inverse_rms(wide, self.eps)
        return normed if normed.dtype == hidden_states.dtype else normed.to(hidden_states.dtype)


# Up to these a product with the weights on the left is the quicker one: rows, width, and numbers in all rows.
FEW_ROWS, NARROW, FEW_NUMBERS = 8, 1024, 4096
DTYPES_OF_MKL = (torch.float32, torch.float64)


class RMTLinear(nn.Linear):
    """A linear map whose product is written another way for a few rows of a narrow layer on a CPU.

    MKL takes up to three times as long for states @ weight.T as for weight @ states.T there, and for one column twice
    as long as for two. Sums come in another order, which may even depend on where the weights lie in memory, so
    training never uses it.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        numbers, (out_features, width) = states.numel(), weight.shape  # of this process, if they are dealt out
        is_few = numbers <= FEW_ROWS * width and numbers < FEW_NUMBERS and width <= NARROW
        if self.training or not is_few or not states.is_cpu or states.dtype not in DTYPES_OF_MKL:
            return super().forward(states)
        is_flat = states.dim() == 2
        flat = states if is_flat else states.reshape(-1, width)
        columns = (torch.cat([flat, flat]) if numbers == width else flat).t()
        output, bias = weight.mm(columns).t()[: numbers // width].contiguous(), self.bias
        output = output if bias is None else output + bias
        return output if is_flat else output.view(*states.shape[:-1], out_features)
