"""Proofs of networks on groups: circuits, rho-sets, terms of the bound, and margins."""

from typing import TYPE_CHECKING, Any, NamedTuple

import cattrs
import numpy as np
from jaxtyping import Float

from mechatlas.app.old_runs import renamed
from mechatlas.app.proof_details import GridDetails, MarginHistogram, NetworkDetails
from mechatlas.app.report.chapter import Chapter, part_for_each, percent
from mechatlas.app.report.dossiers import Finding
from mechatlas.app.report.runs import Run, Runs
from mechatlas.app.run_folder import NEURONS, PROOF
from mechatlas.base import Progress

if TYPE_CHECKING:
    from mechatlas.app.commands.prove import ProveResult

TERMS = {
    "ideal_margin": "ideal margin",
    "additive": "parts of x or y alone",
    "non_equivariance": "circuits not equivariant",
    "unembedding_noise": "unembedding noise in cells",
    "residual": "neurons that fit no circuit",
    "rounding": "rounding",
}
"""Terms of the bound, as the page calls them."""
VIEW = np.array([[0.8387, 0.2302], [-0.5446, 0.3544], [0.0, 0.9063]])
"""Directions of the page's plane in space: polytopes are seen from a little above and aside."""


class Drawing(NamedTuple):
    """A figure with its name and caption."""

    name: str
    caption: str
    figure: dict[str, Any]


def chapter(runs: Runs, on_progress: Progress) -> Chapter | None:
    """Draw every folder that `mechatlas prove` wrote.

    Raises:
        DiskError: A file of a run is damaged.
    """
    return part_for_each("Proofs", runs.of_kind(PROOF), _draw, on_progress)


def _draw(made: Chapter, number: int, run: Run) -> dict[str, Any]:
    """Draw a run."""
    details = cattrs.structure(renamed(run.read(NEURONS), run.kind), NetworkDetails)
    result: "ProveResult" = run.typed_result()
    drawings = _drawings(result, details, f"proof{number}")
    made.figures.update({drawing.name: drawing.figure for drawing in drawings})
    made.note(_finding(result, details, number, drawings))
    return {
        "details": details,
        "result": result,
        "irreps": _irreps(details),
        "circuits": [_circuit(grid) for grid in details.grids],
        "drawings": drawings,
    }


def _finding(
    result: "ProveResult", details: NetworkDetails, number: int, drawings: list[Drawing]
) -> Finding:
    """Sum up the bound."""
    exact, at_least = result.accuracy_exact, "at least " if result.accuracy_bound < 1 else ""
    known = f"; the exact accuracy is {_accuracy(exact)}" if exact is not None else ""
    sizes = [len(grid.left_vectors) for grid in details.grids]
    largest = f"proof{number}set{int(np.argmax(sizes))}" if sizes else ""
    names = [drawing.name for drawing in drawings]
    return Finding(
        text=f"A network on a group of order {result.order} is certified {at_least}"
        f"{_accuracy(result.accuracy_bound)} accurate over all {result.order**2:,} pairs, at "
        f"{percent(result.multiply_adds_share)} of the cost of checking every pair.",
        evidence=f"Lower bound with a verified proof ({result.verifier}){known}.",
        anchor=f"proofs-{number}",
        figure=largest if largest in names else names[0],
    )


def _accuracy(value: float) -> str:
    """Accuracy with four digits after the point, which bounds need."""
    return f"{100 * value:.4f}".rstrip("0").removesuffix(".") + "%"


def _irreps(details: NetworkDetails) -> list[dict[str, Any]]:
    """Number of neurons of each irrep, and the median share of their weights in it."""
    names, rows = np.array(details.irrep), []
    for name in details.irreps:
        mine = names == name
        medians = {
            side: float(np.median(np.array(share)[mine])) for side, share in details.shares.items()
        }
        rows.append({"name": name, "neurons": int(mine.sum()), **medians})
    return rows


def _circuit(grid: GridDetails) -> dict[str, Any]:
    """Size of a circuit, and the share of its cells that have a neuron."""
    cells = set(zip(grid.left, grid.right, strict=True))
    rows, columns = len(grid.left_vectors), len(grid.right_vectors)
    return {
        "irrep": grid.irrep,
        "size": f"{rows} \N{MULTIPLICATION SIGN} {columns}",
        "neurons": len(grid.neurons),
        "filled": len(cells) / (rows * columns),
        "spread_of_a": grid.spread_of_a,
    }


def _drawings(result: "ProveResult", details: NetworkDetails, prefix: str) -> list[Drawing]:
    """Everything that is drawn of one proof."""
    text = "The bound of the first stage for a typical pair, term by term."
    drawings = [Drawing(f"{prefix}budget", text, _budget(vars(result.logit_budget)))]
    if details.histogram:
        text = "Margins in logits: certified (a lower bound) and true (by brute force)."
        drawings.append(Drawing(f"{prefix}margins", text, _margins(details.histogram)))
    seen = set()
    for number, grid in enumerate(details.grids):
        text = (
            f"Neurons of irrep {grid.irrep}, by the points of the rho-sets on the left and right."
        )
        drawings.append(Drawing(f"{prefix}grid{number}", text, _cells(grid)))
        key = (grid.irrep, len(grid.left_vectors))
        if key not in seen:
            seen.add(key)
            vectors = np.array(grid.left_vectors)
            flat = "" if vectors.shape[1] <= 3 else f", of {vectors.shape[1]} dimensions, projected"
            text = f"The rho-set of {len(vectors)} vectors in irrep {grid.irrep}{flat}."
            drawings.append(Drawing(f"{prefix}set{number}", text, _polytope(vectors)))
    return drawings


def _budget(budget: dict[str, float]) -> dict[str, Any]:
    """Waterfall of the terms of the bound."""
    return {
        "data": [
            {
                "type": "waterfall",
                "orientation": "v",
                "measure": ["relative"] * len(TERMS) + ["total"],
                "x": [*TERMS.values(), "bound"],
                "y": [budget[name] for name in TERMS] + [0],
                "hovertemplate": "%{x}<br>%{delta:.2f} logits<extra></extra>",
                "increasing": {"marker": {"color": "var(--branch-0)"}},
                "decreasing": {"marker": {"color": "var(--branch-3)"}},
                "totals": {"marker": {"color": "var(--branch-2)"}},
            }
        ],
        "layout": {"yaxis": {"title": {"text": "logits"}}, "showlegend": False},
    }


def _margins(histogram: MarginHistogram) -> dict[str, Any]:
    """Histograms of certified and of true margins, one over the other."""
    edges = np.array(histogram.edges)
    middles = ((edges[1:] + edges[:-1]) / 2).round(4).tolist()
    width = float(edges[1] - edges[0])
    return {
        "data": [
            {
                "type": "bar", "name": name, "x": middles, "y": counts,
                "width": width, "opacity": 0.6,
            }
            for name, counts in (("certified", histogram.certified), ("true", histogram.true))
        ],
        "layout": {
            "barmode": "overlay",
            "xaxis": {"title": {"text": "margin (logits)"}},
            "yaxis": {"title": {"text": "pairs"}},
            "showlegend": True,
        },
    }  # fmt: skip


def _cells(grid: GridDetails) -> dict[str, Any]:
    """Heat map of the strength of the neurons in each cell."""
    filled = np.zeros((len(grid.left_vectors), len(grid.right_vectors)))
    np.add.at(filled, (grid.left, grid.right), np.abs(grid.scale))
    return {
        "data": [
            {
                "type": "heatmap",
                "z": filled.round(4).tolist(),
                "colorscale": [[0, "var(--raised)"], [1, "var(--accent)"]],
                "colorbar": {"title": {"text": "strength", "side": "right"}, "thickness": 8},
                "hovertemplate": "left %{y}, right %{x}<br>strength %{z:.3g}<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "point on the right"}, "constrain": "domain"},
            "yaxis": {"title": {"text": "point on the left"}, "scaleanchor": "x"},
        },
    }


def _polytope(vectors: Float[np.ndarray, "point d"]) -> dict[str, Any]:
    """Points, and edges between nearest ones; in its main three directions if there are more."""
    gram = vectors @ vectors.T
    np.fill_diagonal(gram, -np.inf)
    first, second = np.nonzero(np.triu(gram > gram.max() - 1e-3))
    if vectors.shape[1] > 3:
        vectors = vectors @ np.linalg.svd(vectors, full_matrices=False)[2][:3].T
    points = np.zeros((len(vectors), 3))
    points[:, : vectors.shape[1]] = vectors
    flat = (points @ VIEW).round(4)
    lines: list[list[float | None]] = [[], []]
    for i, j in zip(first, second, strict=True):
        for axis in range(2):
            lines[axis] += [float(flat[i, axis]), float(flat[j, axis]), None]
    depth = points @ np.cross(VIEW[:, 0], VIEW[:, 1])
    size = 8 + 6 * depth / max(float(np.abs(depth).max()), 1e-9)
    bare = {"visible": False, "showgrid": False, "zeroline": False}
    return {
        "data": [
            {
                "type": "scatter", "mode": "lines", "hoverinfo": "skip",
                "x": lines[0], "y": lines[1], "line": {"width": 2, "color": "var(--branch-0)"},
            },
            {
                "type": "scatter", "mode": "markers",
                "marker": {"size": size.round(1).tolist(), "color": "var(--branch-1)"},
                "x": flat[:, 0].tolist(), "y": flat[:, 1].tolist(),
                "text": [f"point {i}" for i in range(len(points))], "hoverinfo": "text",
            },
        ],
        "layout": {
            "showlegend": False, "xaxis": bare, "yaxis": {**bare, "scaleanchor": "x"},
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        },
    }  # fmt: skip
