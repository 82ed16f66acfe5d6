"""The compiled parts of a training step of a `PoseTied` dictionary, for CPUs.

    residual    codes -> gradient of the reconstruction and of each code, and the loss
    update      codes by family -> gradients, Adam and unit length, one family at a time

As `kernels.py`, but an atom in another pose is never built: its blocks are read from where they
are. Block k of an atom in pose h belongs to block `moved[k, h]` of a row, and block g of a row to
block `source[g, h]` of the atom. Latents count as `h * n_families + i`.
"""

import numpy as np
from torch import Tensor

from mechatlas.dictionaries.engine.kernels import compiled, remove_along, step_adam, unit_length


@compiled
def _residual(target, atoms, bias, latents, values, source, scales, out):
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


def residual(
    target: Tensor,
    parameters: tuple[Tensor, Tensor],
    codes: tuple[Tensor, Tensor],
    source: Tensor,
    scales: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
) -> float:
    """Write the gradient of the reconstructions and of each code.

    Args:
        target: What is to be reconstructed, (rows, element, d_block).
        parameters: Atoms (family, element, d_block) and the bias of a block.
        codes: Latents and values of the k codes of each row.
        source: Block of an atom in pose h that block g of a row takes, at (g, h).
        scales: Twice the weight of each row's squared error.
        out: Gradient of the rows; of each code, and its sum over rows and blocks, both added to
            what is there.

    Returns:
        The squared errors times their weights, summed over rows.
    """
    atoms, bias = (t.numpy() for t in parameters)
    latents, values = (t.numpy() for t in codes)
    its_out = tuple(t.numpy() for t in out)
    fixed = (latents, values, source.numpy(), scales.numpy(), its_out)
    return _residual(target.numpy(), atoms, bias, *fixed)


@compiled
def _update(low, high, pairs, batch, moved, parameters, edges, adam, clip, out):
    (atoms, atoms1, atoms2), (rows, rows1, rows2), (b, b1, b2) = parameters
    order, starts, row_of, pose_of, values, d_code = pairs
    x, g = batch
    d_input, least, apply = out
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
        remove_along(gradient, atoms[j], edges)
        if not apply:
            squares += d_bias[0] * d_bias[0]
            for c in range(len(gradient)):
                squares += gradient[c] * gradient[c]
            for c in range(d):
                squares += encoder_gradient[c] * encoder_gradient[c]
        # Through the input's bias: before the encoder row changes.
        for c in range(d):
            d_input[c] += d_bias[0] * rows[j, c]
        if apply:
            for c in range(len(gradient)):
                gradient[c] *= clip
            for c in range(d):
                encoder_gradient[c] *= clip
            d_bias[0] *= clip
            step_adam(rows[j], rows1[j], rows2[j], encoder_gradient, adam)
            step_adam(atoms[j], atoms1[j], atoms2[j], gradient, adam)
            unit_length(atoms[j], edges, least)
            step_adam(b[j], b1[j], b2[j], d_bias, adam)
    return squares


def update(
    span: range,
    grouped: tuple[Tensor, Tensor],
    codes: tuple[Tensor, Tensor, Tensor, Tensor],
    batch: tuple[Tensor, Tensor],
    moved: Tensor,
    state: list[tuple[Tensor, Tensor, Tensor]],
    edges: Tensor,
    adam: list[float],
    clip: float | None,
    d_input: Tensor,
) -> float:
    """Take one step of Adam on the families of `span`, and add to the input's gradient.

    Args:
        span: Families to update.
        grouped: What `kernels.group` returned, by family.
        codes: For each pair of a row and a latent its row, its pose, its value and the gradient
            of the value.
        batch: What the encoder read and the gradients that `residual` wrote, both
            (rows, element, d_block).
        moved: Block of a row that block k of an atom in pose h belongs to, at (k, h).
        state: Parameter, first and second moment of atoms, encoder rows and encoder biases.
            Changed in place.
        edges: Where the blocks of an atom begin and end.
        adam: As in `kernels.update`.
        clip: Factor of the gradients; `None` only measures them and changes nothing.
        d_input: Gradient of the sum of the encoder's inputs, (d_block,). Added to.

    Returns:
        Sum of the squared gradients if they were only measured, else 0.
    """
    atoms, rows, bias = (tuple(t.numpy() for t in group) for group in state)
    dtype = codes[2].numpy().dtype.type
    return _update(
        span.start,
        span.stop,
        tuple(t.numpy() for t in (*grouped, *codes)),
        tuple(t.numpy() for t in batch),
        moved.numpy(),
        (atoms, rows, tuple(t[:, None] for t in bias)),
        edges.numpy(),
        tuple(dtype(value) for value in adam),
        dtype(1 if clip is None else clip),
        (d_input.numpy(), dtype(1e-12), clip is not None),
    )
