"""Norm, linear map, rotary encoding and gated product, as they are quick on a CPU.

Shapes: B rows, T columns of a call, E hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

from .memory_rmt import at_least_float32, is_plain


PIECE = 2**18  # numbers of a tensor that are computed in one go: a MiB of float32


def inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    """One over the root mean square along the last axis, (..., 1), in half the time of `mean`."""
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return torch.addcmul(wide.new_full((), eps), length, length, value=1 / wide.shape[-1]).rsqrt_()


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors (rows, E) or (B or 1, T, ...) cut alike along rows or T: what is made of a piece stays in the cache.

    Operations in a row on tensors that do not fit read and write main memory each.
    """
    first = tensors[0]
    if first.numel() <= PIECE or first.dim() < 2:
        return iter([tensors])
    axis = min(first.dim() - 2, 1)
    size = max(1, PIECE * first.shape[axis] // first.numel())
    return zip(*(tensor.split(size, axis) for tensor in tensors), strict=True)


def has_own_form(*tensors: torch.Tensor) -> bool:
    """Whether to compute piece by piece, with a backward pass of our own: many numbers, on a CPU, in an ordinary call.

    Compilers and `torch.func` get operations that they know.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or first.numel() <= PIECE:  # first, and cheap: every decoding step asks often
        return False
    return first.is_cpu and is_plain(first) and all(tensor.dtype == first.dtype for tensor in tensors)


class _RMSNorm(torch.autograd.Function):
    """The norm on a CPU in half the time of `F.rms_norm`, forward and backward; and one over the root mean square.

    The same operations as without gradients, so that both runs of a reentrant checkpoint give the same bits.
    """

    @staticmethod
    def forward(states: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        if states.numel() <= PIECE:
            inverse = inverse_rms(states, eps)
            return (states * weight).mul_(inverse), inverse
        output, inverse = torch.empty_like(states), torch.empty_like(states[..., :1])
        for piece, normed, found in pieces(states, output, inverse):
            found.copy_(inverse_rms(piece, eps))
            torch.mul(piece, weight, out=normed).mul_(found)
        return output, inverse

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
        is_learned = ctx.needs_input_grad[1]
        if states.numel() <= PIECE:
            return *_RMSNorm.gradients(states, gradient, inverse, weight, is_learned), None
        output, of_weight = torch.empty_like(states), None
        for piece, given, inverse_piece, of_states in pieces(states, gradient, inverse, output):
            of_piece, share = _RMSNorm.gradients(piece, given, inverse_piece, weight, is_learned)
            of_states.copy_(of_piece)
            of_weight = share if of_weight is None or share is None else of_weight.add_(share)
        return output, of_weight, None

    @staticmethod
    def gradients(
        states: torch.Tensor, gradient: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, is_learned: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the states, and of the weight if it is learned."""
        unit = states * inverse
        product = gradient * unit
        of_weight = product.reshape(-1, weight.shape[0]).sum(0) if is_learned else None
        with torch.autocast("cpu", enabled=False):  # which is the caller's in a backward pass
            share = (product @ weight)[..., None] / -weight.shape[0]
        return unit.mul_(share).addcmul_(gradient, weight).mul_(inverse), of_weight


class _SwiGLU(torch.autograd.Function):
    """The product, without the tensor between, forward and backward."""

    @staticmethod
    def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(gate)
        for gate_piece, up_piece, product in pieces(gate, up, output):
            torch.mul(F.silu(gate_piece), up_piece, out=product)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if gradient is None:
            return None, None
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to have a gradient
            share = gate.sigmoid()
            return gradient * up * share * (1 + gate * (1 - share)), gradient * F.silu(gate)
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        silu_backward: Callable = torch.ops.aten.silu_backward.grad_input
        for gate_piece, up_piece, given, *found in pieces(gate, up, gradient, of_gate, of_up):
            silu_backward(given * up_piece, gate_piece, grad_input=found[0])
            torch.mul(given, F.silu(gate_piece), out=found[1])
        return of_gate, of_up


def gated_product(act_fn: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act_fn(gate) * up, (rows, I) each; in a form of our own only if the module is silu as it comes, without hooks."""
    if not has_own_form(gate, up) or type(act_fn) not in (nn.SiLU, SiLUActivation):
        return act_fn(gate) * up
    is_changed = act_fn._forward_hooks or act_fn._forward_pre_hooks or "forward" in vars(act_fn)
    return act_fn(gate) * up if is_changed else _SwiGLU.apply(gate, up)


def keep_factors(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    """Of an operation that is linear in its first input, the backward pass needs the others; no gradient stays none."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[1:])


class _Rotation(torch.autograd.Function):
    """Rotary encoding; the gradient is turned back, as both halves of `cos` are alike and those of `sin` opposite."""

    @staticmethod
    def forward(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(states)
        for piece, cos_piece, sin_piece, rotated in pieces(states, cos, sin, output):
            other_half = piece.roll(piece.shape[-1] // 2, -1)
            torch.mul(piece, cos_piece, out=rotated).addcmul_(other_half, sin_piece)
        return output

    setup_context = staticmethod(keep_factors)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        if gradient is None:
            return None, None, None
        cos, sin = ctx.saved_tensors
        return rotate(gradient, cos, -sin), None, None


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary encoding of (B, L, heads, D), in their dtype (autocast mixes them); with `-sin` it is undone."""
    if has_own_form(states, cos, sin):
        return _Rotation.apply(states, cos, sin)
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin).to(states.dtype)


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
        elif has_own_form(wide, weight):
            normed, _ = _RMSNorm.forward(wide, weight, self.eps)
        else:
            normed = wide * weight * inverse_rms(wide, self.eps)
        return normed if normed.dtype == hidden_states.dtype else normed.to(hidden_states.dtype)


def processor_name() -> str:
    """Vendor and kind of the CPU; empty where torch does not tell (2.13 does, older versions may not)."""
    capabilities: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return capabilities().get("cpu_name", "")


# Up to these a product with the weights on the left is the quicker one, where MKL runs on a processor of AMD's: rows,
# width, and numbers in all rows. On Intel's MKL is quick as it is.
FEW_ROWS, NARROW, FEW_NUMBERS = 8, 1024, 4096
FEW_ROWS_ARE_SLOW = torch.backends.mkl.is_available() and "AMD" in processor_name()
ONE_ROW_IS_SLOW = torch.backends.cpu.get_cpu_capability() == "AVX512"  # with AVX2 it is as quick as memory
DTYPES_OF_MKL = (torch.float32, torch.float64)


class RMTLinear(nn.Linear):
    """A linear map whose product is written another way for a few rows of a narrow layer on a CPU of AMD's.

    MKL takes up to three times as long for states @ weight.T as for weight @ states.T there, and with AVX-512 for one
    column twice as long as for two; with AVX2 one row is left as it is. Sums come in another order, which may even
    depend on where the weights lie in memory, so training never uses it.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if not FEW_ROWS_ARE_SLOW or self.training:
            return super().forward(states)
        weight = self.weight
        numbers, (out_features, width) = states.numel(), weight.shape  # of this process, if they are dealt out
        is_few = numbers <= FEW_ROWS * width and numbers < FEW_NUMBERS and width <= NARROW
        is_few = is_few and (numbers > width or ONE_ROW_IS_SLOW)
        if not is_few or not states.is_cpu or states.dtype not in DTYPES_OF_MKL:
            return super().forward(states)
        is_flat = states.dim() == 2
        flat = states if is_flat else states.reshape(-1, width)
        columns = (torch.cat([flat, flat]) if numbers == width else flat).t()
        output, bias = weight.mm(columns).t()[: numbers // width].contiguous(), self.bias
        output = output if bias is None else output + bias
        return output if is_flat else output.view(*states.shape[:-1], out_features)
