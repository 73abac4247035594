"""Types of the CUDA kernels: those of ``clue._core`` for CUDA tensors, launched on the caller's current stream."""

from __future__ import annotations

from typing import Any

def neuron_attribution(
    clean: Any,
    corrupted: Any,
    grad_clean: Any,
    grad_corrupted: Any | None,
    out_ns: Any,
    out_dn: Any | None = None,
    out_sq_ns: Any | None = None,
    out_sq_dn: Any | None = None,
    mask: Any | None = None,
    out_count: Any | None = None,
) -> None:
    """As ``clue._core.neuron_attribution``; the same bits for every call with the same input on the same kind of device.

    Neither waits nor allocates, apart from a few MiB of workspace from the stream's own pool: a CUDA graph can hold it.

    Raises:
        RuntimeError: the launch failed; the text begins with the kernel's name.
    """

def norm_backward(grad: Any, normal: Any, scale: Any, gain: Any, centre: bool) -> None:
    """As ``clue._core.norm_backward``; the same bits for every call with the same input."""

def masked_adamw(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    index: Any,
    axis: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    master: Any = None,
    rounding_key: int | None = None,
) -> None:
    """As ``clue._core.masked_adamw``. ``index`` is not looked at beforehand, since that would wait for the stream: an
    index outside the parameter stops the device with an error, and a repeated one is undefined.

    Raises:
        RuntimeError: the launch failed; the text begins with the kernel's name.
    """

def device_count() -> int:
    """CUDA devices this process can use; 0 without a driver."""
