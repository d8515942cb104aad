"""Launchers of the norm family."""

import torch
import triton.language as tl
from torch import Tensor

from ...spec.elementwise import NormOptions
from ...spec.operands import Norm, NormBackward
from . import gpu, launch
from .norm import Affine, Gradients, Incoming, Kept, norm_backward_kernel, norm_forward_kernel
from .sums import totals

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _constants(options: NormOptions) -> tuple[bool, bool, bool, tl.dtype]:
    stored = TYPES[options.stream_dtype]
    return options.norm == "layer_norm", options.zero_centered, options.after, stored


def norm_forward(operands: Norm, options: NormOptions) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the forward kernel."""
    x, bias, layer_scale, residual, weight, norm_bias, seed, p = operands
    shape = tuple(x.shape)
    plan = launch.plan(shape, options, launch.norm_forward_tile, whole_rows=True)
    cols = plan.where.cols
    out = torch.empty(shape, dtype=options.out_dtype, device=x.device)
    statistics = torch.empty((*shape[:-1], 2), dtype=torch.float32, device=x.device)
    stream = None
    # The stream of a row that does not fit the registers is written and then read again.
    if not options.after and (options.keep_stream or plan.col_blocks > 1):
        stream = torch.empty(shape, dtype=options.stream_dtype, device=x.device)
    if plan.empty:
        return out, stream if options.keep_stream else None, statistics
    masks = launch.mask_arguments(plan, p)
    matrix, stride = launch.matrix(x, cols)
    other, other_stride = launch.matrix(residual, cols)
    launch.run(
        norm_forward_kernel,
        plan,
        out.device,
        out,
        Kept(stream, statistics),
        launch.operands(matrix, bias, layer_scale, other, seed, masks),
        Affine(launch.vector(weight), launch.vector(norm_bias), options.eps),
        plan.sizes(stride, other_stride),
        plan.origin,
        *masks.arguments,
        NORM=_constants(options),
        MASKS=masks.MASKS,
        VECTOR=launch.vector_width(cols, stride, other_stride),
        CHUNKS=plan.col_blocks,
    )
    return out, stream if options.keep_stream else None, statistics


def norm_backward(
    operands: NormBackward, options: NormOptions, dtypes: tuple[torch.dtype | None, ...]
) -> tuple[Tensor | None, ...]:
    """Launch the backward kernel."""
    dout, dstream, stream, statistics, x, bias, layer_scale, weight, seed, p = operands
    shape = tuple(dout.shape)
    dx_dtype, bias_dtype, scale_dtype, residual_dtype, weight_dtype, norm_bias_dtype = dtypes
    sums = (weight_dtype, norm_bias_dtype, bias_dtype, scale_dtype)
    strips = launch.row_strip if any(dtype is not None for dtype in sums) else None
    plan = launch.plan(shape, options, launch.norm_backward_tile, strips, whole_rows=True)
    cols = plan.where.cols

    def like(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(shape, dtype=dtype, device=dout.device)

    dx = like(dx_dtype)
    dresidual = None if options.after else like(residual_dtype)
    widths = (None if dtype is None else cols for dtype in sums)
    partial = launch.partial_sums(plan, dout.device, *widths)
    if not plan.empty:
        masks = launch.mask_arguments(plan, p)
        matrix, dout_stride = launch.matrix(dout, cols)
        x, stride = launch.matrix(x, cols)
        if options.after:  # the stream is the norm's input, of any strides, and x is not needed
            source, stride = launch.matrix(stream, cols)
        else:
            source = launch.vector(stream)
        launch.run(
            norm_backward_kernel,
            plan,
            dout.device,
            Incoming(matrix, launch.vector(dstream), source, launch.vector(statistics)),
            Gradients(dx, dresidual, *partial),
            launch.operands(x, bias, layer_scale, None, seed, masks),
            Affine(launch.vector(weight), None, options.eps),
            plan.sizes(stride, dout_stride),
            plan.origin,
            *masks.arguments,
            NORM=_constants(options),
            MASKS=masks.MASKS,
            VECTOR=launch.vector_width(cols, stride, dout_stride),
            LOOPS=(plan.strip, plan.col_blocks, backward_stages(plan, options, dout.device)),
        )
    dweight, dnorm_bias, dbias, dlayer_scale = totals(partial, sums)
    return dx, dbias, dlayer_scale, dresidual, dweight, dnorm_bias


def backward_stages(plan: launch.Plan, options: NormOptions, device: torch.device) -> int:
    """Pipeline stages of the loop over a strip; with two, the next rows are loaded ahead.

    With the gradient of the mean, a multiprocessor holds one program only, and the memory is idle
    while it computes. On Hopper, loading ahead takes 4 more instructions per element, but costs
    less than that. RMSNorm has two or three programs, which hide the loads anyway; AMD's and older
    GPUs would lose registers. Rows in chunks, whose sums are in memory, are never loaded ahead.
    """
    alone = options.norm == "layer_norm" and plan.col_blocks == 1
    return 2 if alone and gpu.of(device).generation == 90 else 1
