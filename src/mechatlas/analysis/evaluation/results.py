"""Results of an evaluation, each figure with its interval over samples."""

import dataclasses

from mechatlas.base import Result
from mechatlas.maths.bootstrap import Estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputEffect:
    """Output of the network with the site written in one way; KL and agreement against intact."""

    loss: Estimate | None
    """Mean loss in nats: of the next token, or of the labels; None where there are none."""
    kl_divergence: Estimate
    """Mean Kullback-Leibler divergence from the intact network's answer, in nats."""
    agreement: Estimate
    """Share of the answers whose most likely class is that of the intact network."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityBin:
    """Share of the latents whose density lies in a bin."""

    low: float
    """Lowest density of the bin: share of the rows on which a latent is active."""
    high: float
    """Density at which the next bin begins."""
    share: Estimate
    """Share of the latents."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class NetworkEvaluation(Result):
    """Worth of a dictionary to its network, on samples of it."""

    samples: int
    """Samples that the network ran on."""
    rows: int
    """Rows that the dictionary reconstructs: none that are left out, no outlier rows."""
    outlier_rows: int
    """Rows longer than ten median rows, which stay as they are."""
    left_out: dict[str, int]
    """Positions of tokens that stay as they are, by reason: padding, first, special, tokens."""
    fvu: Estimate
    """Fraction of variance unexplained, without outlier rows."""
    fvu_median: Estimate
    """Median over rows of the fraction unexplained of the row's squared distance from the mean."""
    fvu_with_outliers: Estimate
    """Fraction of variance unexplained, outlier rows included."""
    l0: Estimate
    """Mean number of active latents of a row."""
    dead_share: Estimate
    """Share of the latents that are active on none of the rows."""
    density: list[DensityBin]
    """Histogram of the density of latents: dead ones first, then by half powers of ten."""
    intact: OutputEffect
    """The untouched network."""
    spliced: OutputEffect
    """Network that goes on from the dictionary's reconstruction."""
    zero_ablated: OutputEffect
    """Network that goes on from zeros."""
    mean_ablated: OutputEffect
    """Network that goes on from the mean of the rows."""
    fvu_by_site: dict[str, Estimate] = dataclasses.field(default_factory=dict)
    """Fraction of variance unexplained at each site, of a dictionary that writes several."""
    loss_recovered: Estimate | None = None
    """(L_zero - L_spliced) / (L_zero - L_intact): 1 is the intact network, 0 is zero ablation."""
    loss_recovered_from_mean: Estimate | None = None
    """Loss recovered relative to mean ablation: 0 is the network with the mean of the rows."""

    def summary(self) -> str:
        """Error, sparsity and effect on the network, with intervals."""
        lines = [
            f"Evaluation on {self.samples:,} samples, {self.rows:,} rows "
            f"({self.outlier_rows:,} outlier rows and {sum(self.left_out.values()):,} positions "
            "left out)",
            f"fvu {_in_words(self.fvu)}, median row {_in_words(self.fvu_median)}, with outliers "
            f"{_in_words(self.fvu_with_outliers)}",
            f"l0 {_in_words(self.l0, 1)}, dead {_in_words(self.dead_share)}",
        ]
        if self.fvu_by_site:
            sites = (f"{site} {found.value:.3f}" for site, found in self.fvu_by_site.items())
            lines.append(f"fvu by site: {', '.join(sites)}")
        effect = self.spliced
        lines.append(
            f"spliced: kl {_in_words(effect.kl_divergence)} nats, agreement "
            f"{_in_words(effect.agreement)}"
        )
        ways = {"intact": self.intact, "spliced": self.spliced, "zero": self.zero_ablated}
        losses = [f"{name} {way.loss.value:.3f}" for name, way in ways.items() if way.loss]
        if losses:
            lines.append(f"loss: {', '.join(losses)} nats")
        if self.loss_recovered is not None:
            lines.append(f"loss recovered {_in_words(self.loss_recovered)}")
        return "\n".join(lines)


def _in_words(estimate: Estimate, digits: int = 3) -> str:
    low, high = (f"{end:.{digits}f}" for end in (estimate.low, estimate.high))
    return f"{estimate.value:.{digits}f} [{low}, {high}]"
