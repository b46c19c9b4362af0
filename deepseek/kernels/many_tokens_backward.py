"""The backward pass of `many_tokens`: threads take whole experts, so that each weight gradient has one writer."""

from functools import cache

import numpy as np
import torch
from numba import cfunc, njit
from torch import Tensor

from deepseek.kernels.few_tokens import barrier, sigmoid, sorted_slots, thread_count, thread_number
from deepseek.kernels.few_tokens_backward import untouched_zeros
from deepseek.kernels.launch import ARGUMENTS, launch, unpack
from deepseek.kernels.many_tokens import combine, product, wide


@njit(fastmath=True)
def _through_swiglu(weights, proj, hidden, grad_hidden, grad_proj, grad_weights):  # type: ignore[no-untyped-def]
    """From the gradient of the unweighted hidden values to those of projections and weights; hidden is weighted."""
    one, width = np.float32(1), hidden.shape[1]
    for j in range(len(hidden)):
        weight, total = weights[j], np.float32(0)
        for f in range(width):
            gate, up, grad = proj[j, f], proj[j, width + f], grad_hidden[j, f]
            sig = sigmoid(gate)
            silu = gate * sig
            total += silu * up * grad
            hidden[j, f] = weight * silu * up
            grad_proj[j, width + f] = grad * weight * silu
            grad_proj[j, f] = grad * weight * up * (sig + silu * (one - sig))
        grad_weights[j] = total


@njit
def _experts(  # type: ignore[no-untyped-def]
    grad, x, gate_up, down, tokens, weights, ends, proj, out, grad_gate_up, grad_down, grad_weights
):
    """The experts whose middle slot lies in this thread's share of the slots."""
    used, most, start = ends[len(ends) - 1], ends[0], 0
    for e in range(1, len(ends)):
        most = max(most, ends[e] - ends[e - 1])
    grads, rows = np.empty((most, x.shape[1]), np.float32), np.empty((most, x.shape[1]), np.float32)
    hidden, grad_hidden = np.empty((most, down.shape[2]), np.float32), np.empty((most, down.shape[2]), np.float32)
    grad_proj = np.empty((most, gate_up.shape[1]), np.float32)
    wide_up, wide_down = np.empty(gate_up.shape[1:], np.float32), np.empty(down.shape[1:], np.float32)
    for e in range(len(ends)):
        stop = ends[e]
        n = stop - start
        if n > 0 and (start + stop) * thread_count() // (2 * used) == thread_number():
            for j in range(n):
                grads[j], rows[j] = grad[tokens[start + j]], x[tokens[start + j]]
            product(grads[:n], False, wide(down[e], wide_down), False, grad_hidden[:n])
            _through_swiglu(
                weights[start:stop], proj[start:stop], hidden[:n], grad_hidden, grad_proj, grad_weights[start:stop]
            )
            product(grad_proj[:n], False, wide(gate_up[e], wide_up), False, out[start:stop])
            if len(grad_down):
                product(grads[:n], True, hidden[:n], False, grad_down[e])
                product(grad_proj[:n], True, rows[:n], False, grad_gate_up[e])
        start = stop


@njit
def _run(  # type: ignore[no-untyped-def]
    grad, x, gate_up, down, ids, slot_weights, proj, out, grad_x, grad_gate_up, grad_down, grad_weights
):
    ends = np.empty(len(down), np.int64)
    order, tokens, weights = sorted_slots(ids, slot_weights, ends)
    sorted_grads = np.zeros(ids.size, np.float32)
    _experts(grad, x, gate_up, down, tokens, weights, ends, proj, out, grad_gate_up, grad_down, sorted_grads)
    for s in range(ends[len(ends) - 1]):
        if sorted_grads[s] != 0:
            grad_weights[order[s]] = sorted_grads[s]
    barrier()
    combine(out, order, ends[len(ends) - 1], grad_x, ids.shape[1])


@cache
def _kernel(kinds: str) -> int:
    @cfunc(ARGUMENTS, cache=True)
    def kernel(data):  # type: ignore[no-untyped-def]
        _run(*unpack(data, kinds))

    return int(kernel.address)


def backward(
    grad_ND: Tensor, x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, ids_NA: Tensor, weights_NA: Tensor,
    proj_SP: Tensor, train_experts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `few_tokens_backward.backward`."""
    grad_x, out_SD = torch.empty_like(x_ND), x_ND.new_empty(ids_NA.numel(), x_ND.shape[1])
    grad_weights = torch.zeros_like(weights_NA).flatten()
    shapes = [t.shape if train_experts else torch.Size([0, *t.shape[1:]]) for t in (gate_up_E2FD, down_EDF)]
    grads = [untouched_zeros(shape, torch.float32) for shape in shapes]
    inputs = (grad_ND, x_ND, gate_up_E2FD, down_EDF, ids_NA, weights_NA, proj_SP)
    launch(_kernel, *inputs, out_SD, grad_x, *grads, grad_weights)
    return grad_x, grads[0].to(gate_up_E2FD.dtype), grads[1].to(down_EDF.dtype), grad_weights.view_as(weights_NA)
