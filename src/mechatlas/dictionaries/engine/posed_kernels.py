"""The compiled parts of a training step of a `PoseTied` dictionary, for CPUs.

    residual    codes -> gradient of the reconstruction and of each code, and the loss
    update      codes by family -> gradients, Adam and unit length, one family at a time

As in `kernels.py`, but an atom in another pose is never built: its blocks are read from where they
are. Latents count as `h * n_families + i`.
"""

import numpy as np
from torch import Tensor

from mechatlas.dictionaries.engine.kernels import (
    compiled,
    remove_along,
    rule_in,
    step_adam,
    unit_length,
)
from mechatlas.dictionaries.engine.structures import (
    Learned,
    PosedBatch,
    PosedCodes,
    PosedGradients,
    PosedPairs,
    PosedReconstruction,
    Update,
    Weights,
    as_arrays,
)


@compiled
def _residual(task, codes, out):
    target, scales, atoms, bias, source = task
    latents, values = codes
    g, d_code, g_sum = out
    n_rows, order, d = target.shape
    k, n = latents.shape[1], len(atoms)
    loss = 0.0
    zero = scales[0] - scales[0]
    for i in range(n_rows):
        scale = scales[i]
        for to in range(order):
            row, wanted = g[i, to], target[i, to]
            for c in range(d):
                row[c] = bias[c] - wanted[c]
            for t in range(k):
                value = values[i, t]
                if value != 0:
                    atom = atoms[latents[i, t] % n, source[to, latents[i, t] // n]]
                    for c in range(d):
                        row[c] += value * atom[c]
            square = zero
            for c in range(d):
                square += row[c] * row[c]
                row[c] *= scale
                g_sum[c] += row[c]
            loss += square * scale / 2
            for t in range(k):
                if values[i, t] != 0:
                    atom = atoms[latents[i, t] % n, source[to, latents[i, t] // n]]
                    total = zero
                    for c in range(d):
                        total += row[c] * atom[c]
                    d_code[i, t] += total
    return loss


def residual(task: PosedReconstruction, codes: PosedCodes, out: PosedGradients) -> float:
    """Write the gradient of the reconstructions and of each code.

    Args:
        task: Some rows to reconstruct.
        codes: Codes of these rows.
        out: Gradients. `rows` is written; `codes` and `bias` are added to.

    Returns:
        The squared errors times their weights, summed over rows.
    """
    return _residual(as_arrays(task), as_arrays(codes), as_arrays(out))


@compiled
def _update(low, high, pairs, batch, weights, rule, d_input):
    (atoms, atoms1, atoms2), (rows, rows1, rows2), (b, b1, b2) = weights
    order, starts, row_of, pose_of, values, d_code = pairs
    x, g, moved = batch
    n_blocks, d = g.shape[1], g.shape[2]
    gradient = np.empty(n_blocks * d, atoms.dtype)
    encoder_gradient, d_bias = np.empty(d, atoms.dtype), np.zeros(1, atoms.dtype)
    squares = 0.0
    for j in range(low, high):
        for block in range(n_blocks):
            part = gradient[block * d : (block + 1) * d]
            for c in range(d):
                part[c] = 0
            for q in range(starts[j], starts[j + 1]):
                p = order[q]
                value, row = values[p], g[row_of[p], moved[block, pose_of[p]]]
                for c in range(d):
                    part[c] += value * row[c]
        for c in range(d):
            encoder_gradient[c] = 0
        d_bias[0] = 0
        for q in range(starts[j], starts[j + 1]):
            p = order[q]
            value, row = d_code[p], x[row_of[p], pose_of[p]]
            d_bias[0] += value
            for c in range(d):
                encoder_gradient[c] += value * row[c]
        remove_along(gradient, atoms[j], rule.edges)
        if not rule.apply:
            squares += d_bias[0] * d_bias[0]
            for c in range(len(gradient)):
                squares += gradient[c] * gradient[c]
            for c in range(d):
                squares += encoder_gradient[c] * encoder_gradient[c]
        # Through the input's bias: before the encoder row changes.
        for c in range(d):
            d_input[c] += d_bias[0] * rows[j, c]
        if rule.apply:
            for c in range(len(gradient)):
                gradient[c] *= rule.clip
            for c in range(d):
                encoder_gradient[c] *= rule.clip
            d_bias[0] *= rule.clip
            step_adam(rows[j], rows1[j], rows2[j], encoder_gradient, rule.adam)
            step_adam(atoms[j], atoms1[j], atoms2[j], gradient, rule.adam)
            unit_length(atoms[j], rule.edges, rule.least)
            step_adam(b[j], b1[j], b2[j], d_bias, rule.adam)
    return squares


def update(
    span: range,
    pairs: PosedPairs,
    batch: PosedBatch,
    weights: Weights,
    rule: Update,
    d_input: Tensor,
) -> float:
    """Take one step of Adam on the families of a span, and add to the input's gradient.

    Args:
        span: Families to update.
        pairs: Codes of the batch, family by family.
        batch: Blocks that the encoder read, and the gradients that `residual` wrote.
        weights: Parameters and moments. Changed in place.
        rule: Numbers of the update.
        d_input: Gradient of the sum of the encoder's inputs, (d_block,). Added to.

    Returns:
        Sum of the squared gradients if they were only measured, else 0.
    """
    weights = weights._replace(bias=Learned(*(t[:, None] for t in weights.bias)))
    structures = map(as_arrays, (pairs, batch, weights, rule_in(rule, pairs.values)))
    return _update(span.start, span.stop, *structures, d_input.numpy())
