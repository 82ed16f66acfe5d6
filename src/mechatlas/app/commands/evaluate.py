"""Measure what a dictionary is worth to its network: loss recovered, divergence, error.

mechatlas evaluate runs/layer3 --out runs/layer3_worth
mechatlas evaluate DICT --network model.gguf --site layers.3 --samples texts.zip --out OUT

Without `--network` and `--samples` the network of the dictionary's store runs on its held-out
samples.
"""

import dataclasses
from functools import partial

from mechatlas.activations.positions import Positions
from mechatlas.analysis.evaluation.evaluate import N_SAMPLES
from mechatlas.analysis.evaluation.evaluate import evaluate as evaluate_dictionary
from mechatlas.analysis.evaluation.results import NetworkEvaluation
from mechatlas.app.estimates import WORTH_MEASURING, bytes_of, of_work
from mechatlas.app.network_inputs import MeasureConfig, open_measured
from mechatlas.app.progress import bar
from mechatlas.app.run_folder import EVALUATION, CommandResult, RunFolder
from mechatlas.maths.outliers import OUTLIER_NORMS
from mechatlas.ranges import COUNT, SEED, check_ranges

KIND = EVALUATION


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MeasureConfig):
    """Measure what a dictionary is worth to its network: loss recovered, divergence, error.

    Example:  mechatlas evaluate runs/layer3 --out runs/layer3_worth
    """

    n_samples: int = N_SAMPLES
    """Samples that the network runs on."""
    positions: Positions | None = None
    """Positions that stay as they are (`rule` and `per_sample` are not used); by default those that
    the store leaves out."""
    outlier_norms: float = OUTLIER_NORMS
    """Median norms beyond which a row stays as it is and is not counted; `inf` counts all rows."""
    batch_size: int = 8
    """Samples in one forward pass."""
    seed: int = 0
    """Seed of the draw of samples and of the intervals."""

    def __post_init__(self) -> None:
        check_ranges(self, n_samples=COUNT, batch_size=COUNT, outlier_norms="(0, inf]", seed=SEED)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvaluateResult(NetworkEvaluation, CommandResult):
    """Worth of a dictionary to its network."""

    site: str
    """Site that is written."""


def run(config: EvaluateConfig, folder: RunFolder) -> EvaluateResult:
    """Evaluate a dictionary in its network.

    Raises:
        RecipeError: The site is not known.
        UserError: The network, the samples or the store are not to be found, or do not fit.
    """
    measured = open_measured(config, config.n_samples)
    store = measured.store
    positions = config.positions
    if positions is None and store is not None and store.manifest.get("left_out"):
        positions = Positions.of_store(store.manifest)
    folder.parent("dictionary", measured.opened.checksum)
    evaluation = partial(
        evaluate_dictionary,
        measured.opened.dictionary,
        network=measured.network,
        samples=measured.samples,
        site=measured.site.split(",") if "," in measured.site else measured.site,
        n_samples=config.n_samples,
        numbers=measured.numbers,
        positions=positions,
        outlier_norms=config.outlier_norms,
        batch_size=config.batch_size,
        seed=config.seed,
        device=config.device,
    )
    folder.expect(
        lambda: of_work(
            [lambda progress: evaluation(on_progress=progress)],
            memory=3 * bytes_of(measured.network, measured.opened.dictionary),
        ),
        is_long=config.n_samples >= WORTH_MEASURING * config.batch_size,
    )
    with bar("evaluating") as progress:
        found = evaluation(on_progress=progress)
    folder.facts(site=measured.site, dictionary=str(config.dictionary.resolve()))
    folder.begin()
    return EvaluateResult(site=measured.site, **vars(found))


def in_words(result: EvaluateResult) -> str:
    """Figures with their intervals, and the folder."""
    return f"At {result.site}. {result.summary()}\nFolder: {result.out}"
