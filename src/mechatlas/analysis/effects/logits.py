"""Direct effect of latents on the logits, through the final norm and the unembedding alone.

    logit_effects     latents of a dictionary -> tokens that they raise and lower most
    head_of           final norm and unembedding of a language model, as one linear map
    unfrozen          how far the logits move if the final norm is not frozen

A latent adds its atom to the residual stream. With the scale of the final norm frozen, the logits
move in proportion: by the atom through the norm's weights and the unembedding, over the root mean
square of the stream there. Random directions of the same norm say how large an effect is by chance.

Source: nostalgebraist, Interpreting GPT: the logit lens (2020); Wang et al., Interpretability in
the wild (2022), for direct effects with a frozen norm.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mechatlas.activations.passes import unwrapped
from mechatlas.activations.samples import whole_batch
from mechatlas.activations.site_names import lens_sites
from mechatlas.activations.sites import read_activations
from mechatlas.analysis.effects.steering import check_latents, site_of, site_rows
from mechatlas.base import Dictionary, InputError, Progress, Result, Site, no_progress
from mechatlas.maths.bootstrap import Estimate, estimate, resample
from mechatlas.maths.statistics import q_values

LATENTS_AT_ONCE = 128
"""Latents whose effects on all tokens are computed together."""
N_RANDOM = 10_000
"""Random directions of the null; thousands of latents are tested at once, so p must be small."""
N_UNFROZEN = 256
"""Largest number of activations under the comparison with an unfrozen norm."""


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """Final norm and unembedding of a language model."""

    norm: nn.Module
    """Copy of the final norm in float64."""
    reads: Site
    """Site of the residual stream that the norm reads."""
    gain: Float[Tensor, " d"]
    """Weights of the norm."""
    unembed: Float[Tensor, "vocabulary d"]
    """Weights of the unembedding."""
    centers: bool
    """Whether the norm subtracts the mean (LayerNorm), or not (RMSNorm)."""

    def effects(self, directions: Float[Tensor, "n d"]) -> Float[Tensor, "n vocabulary"]:
        """Effects on the logits of directions in the stream, where the stream's scale is 1."""
        x = directions.float()
        x = x - x.mean(dim=1, keepdim=True) if self.centers else x
        return (x * self.gain) @ self.unembed.T

    def scale(self, stream: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
        """Root mean square that the norm divides each row by."""
        x = stream.double()
        x = x - x.mean(dim=1, keepdim=True) if self.centers else x
        eps = next((getattr(self.norm, n) for n in EPSILONS if hasattr(self.norm, n)), 0.0)
        return (x.square().mean(dim=1) + eps).sqrt().float()

    def change(
        self, stream: Float[Tensor, "row d"], less: Float[Tensor, "row d"]
    ) -> Float[Tensor, "row vocabulary"]:
        """Change of the logits, before any soft cap, when vectors are taken from the stream."""
        x = stream.double()
        return (self.norm(x) - self.norm(x - less.double())).float() @ self.unembed.T


EPSILONS = ("eps", "variance_epsilon")
"""Names of the number that norms add to the mean square."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LogitEffects(Result):
    """Tokens that latents raise and lower most, directly."""

    latents: Int[np.ndarray, " latent"]
    """Numbers of the latents."""
    top_tokens: Int[np.ndarray, "latent top"]
    """Token ids whose logits each latent raises most, the largest first."""
    top_effects: Float[np.ndarray, "latent top"]
    """Rise of their logits for one unit of activation."""
    bottom_tokens: Int[np.ndarray, "latent top"]
    """Token ids whose logits each latent lowers most, the largest fall first."""
    bottom_effects: Float[np.ndarray, "latent top"]
    """Change of their logits for one unit of activation."""
    p_top: Float[np.ndarray, " latent"]
    """Share of random directions of the same norm that raise some token as much."""
    p_bottom: Float[np.ndarray, " latent"]
    """Share of random directions of the same norm that lower some token as much."""
    q_top: Float[np.ndarray, " latent"]
    """Smallest false discovery rate at which a latent raises a token more than by chance."""
    q_bottom: Float[np.ndarray, " latent"]
    """Smallest false discovery rate at which a latent lowers a token more than by chance."""
    null_top: float
    """Median over random directions of the largest rise, at the median norm of the latents."""
    n_random: int
    """Random directions of the null."""
    scale: float
    """Root mean square of the stream before the final norm: its median over tokens; 1 if none are
    given, and the effects are then relative."""
    unfrozen_difference: Estimate | None = None
    """Distance of the change of all logits with the norm frozen from that with the norm as it is,
    as a share of the latter: mean over activations of latents on the tokens."""
    words: dict[int, str] | None = None
    """Text of each token that is listed, if the network has a tokenizer."""

    def summary(self) -> str:
        """Latents that stand against chance, and the tokens of the first ones."""
        raised, lowered = (int((q <= 0.05).sum()) for q in (self.q_top, self.q_bottom))
        lines = [
            f"Logit effects of {len(self.latents):,} latents: {raised:,} raise and {lowered:,} "
            "lower a token more than random directions of the same norm (false discovery rate 5%)"
        ]
        if self.unfrozen_difference is not None:
            e = self.unfrozen_difference
            lines.append(
                f"difference to the unfrozen norm {e.value:.1%} [{e.low:.1%}, {e.high:.1%}]"
            )
        for i in np.argsort(self.p_top, kind="stable")[:3]:
            up, down = (self._tokens(t[i][:5]) for t in (self.top_tokens, self.bottom_tokens))
            lines.append(f"latent {self.latents[i]}: up {up}; down {down}")
        return "\n".join(lines)

    def _tokens(self, ids: Int[np.ndarray, " token"]) -> str:
        return " ".join(repr(self.words[int(i)]) if self.words else str(i) for i in ids)


def _counter(total: int, on_progress: Progress) -> Callable[[Tensor], Iterator[Tensor]]:
    """Make a function that splits vectors and counts those that are done."""
    done = 0

    def counted(vectors: Tensor) -> Iterator[Tensor]:
        nonlocal done
        for part in vectors.split(LATENTS_AT_ONCE):
            yield part
            on_progress(done := done + len(part), total)

    return counted


@torch.no_grad()
def logit_effects(
    network: nn.Module,
    dictionary: Dictionary,
    latents: Sequence[int] | None = None,
    *,
    tokens: Any = None,
    site: Site | str | None = None,
    n_top: int = 10,
    n_random: int = N_RANDOM,
    seed: int = 0,
    on_progress: Progress = no_progress,
) -> LogitEffects:
    """Find the tokens whose logits latents raise and lower most, directly.

    Args:
        network: Language model with its head.
        dictionary: Dictionary of a site in the residual stream, or of what is added to it.
        latents: Latents; by default all.
        tokens: Token ids of shape (sample, token), or texts, as for `open_samples`, to run the
            network on: they give the scale of the stream, and how far frozen and unfrozen norm
            differ.
        site: Site of the dictionary, for `tokens`; by default the one that its file names.
        n_top: Tokens listed at each end.
        n_random: Random directions of the null.
        seed: Seed of the null and the interval.
        on_progress: Callback with the number of latents and random directions done.

    Raises:
        InputError: The network has no head that is known, there is no such latent, or the
            dictionary writes something else than the residual stream.
        SiteError: The network has no such site.

    Examples:
        >>> import mechatlas as ma
        >>> network = ma.load_network(
        ...     ma.Network(name="transformer", arguments={"path": "gpt2"})
        ... )  # doctest: +SKIP
        >>> ma.logit_effects(network, ma.load("sae"), [7])  # doctest: +SKIP
    """
    chosen = list(range(dictionary.n_latents)) if latents is None else [int(i) for i in latents]
    check_latents(dictionary, chosen)
    head = head_of(network)
    vectors = atoms(dictionary, chosen)
    vocabulary, width = head.unembed.shape
    if vectors.shape[1] != width:
        raise InputError(
            f"The dictionary writes {vectors.shape[1]} numbers, the residual stream of "
            f"{type(unwrapped(network)).__name__} has {width}: is it of another site or model?"
        )
    scale, difference = 1.0, None
    if tokens is not None:
        place = site_of(network, dictionary, site)
        scale, difference = _on_tokens(network, head, dictionary, place, chosen, tokens, seed)
    n_top = min(n_top, vocabulary)
    counted = _counter(len(vectors) + n_random, on_progress)
    parts = [_ends(head, part, n_top) for part in counted(vectors)]
    ids = [torch.cat([part[i] for part in parts]).cpu().numpy() for i in (1, 3)]
    effects = [torch.cat([part[i] for part in parts]).cpu().double().numpy() for i in (0, 2)]
    # Not the stream of torch with this seed, which weights may have been drawn from.
    random = np.random.default_rng([seed, 32]).standard_normal((n_random, width))
    random = functional.normalize(torch.from_numpy(random), dim=1).to(vectors)
    null = [head.effects(part).aminmax(dim=1) for part in counted(random)]
    norms = vectors.norm(dim=1).cpu().double().numpy()
    lowest, largest = (torch.cat(end).cpu().double().numpy() for end in zip(*null, strict=True))
    p_top = _p_values(effects[0][:, 0], norms, largest)
    p_bottom = _p_values(-effects[1][:, 0], norms, -lowest)
    return LogitEffects(
        latents=np.array(chosen),
        top_tokens=ids[0],
        top_effects=effects[0] / scale,
        bottom_tokens=ids[1],
        bottom_effects=effects[1] / scale,
        p_top=p_top,
        p_bottom=p_bottom,
        q_top=q_values(p_top),
        q_bottom=q_values(p_bottom),
        null_top=float(np.median(largest) * np.median(norms) / scale),
        n_random=n_random,
        scale=scale,
        unfrozen_difference=difference,
        words=_words(network, ids),
    )


def atoms(dictionary: Any, latents: Sequence[int]) -> Float[Tensor, "n d"]:
    """Vector that one unit of activation of each latent adds.

    Args:
        dictionary: Any dictionary; one that does not show its decoder is asked latent by latent.
        latents: Numbers of latents.
    """
    weights = getattr(dictionary, "W_dec", None)
    if isinstance(weights, Tensor):
        return weights.detach()[list(latents)].float()
    code = torch.zeros(len(latents) + 1, dictionary.n_latents)
    code[range(len(latents)), list(latents)] = 1
    decoded = dictionary.decode(code).float()
    return decoded[:-1] - decoded[-1:]


def head_of(network: nn.Module) -> Head:
    """Final norm and unembedding of a language model, as one linear map.

    Args:
        network: Language model of transformers.

    Raises:
        InputError: The network has no head, or a final norm of another kind.
    """
    root = unwrapped(network)
    name = type(root).__name__
    unembed = getattr(root, "get_output_embeddings", lambda: None)()
    final = lens_sites(root).get("unembed.hook_in")
    if unembed is None or final is None:
        what = "language-model head" if unembed is None else "final norm that is known"
        raise InputError(f"{name} has no {what}, so latents have no direct effect on logits.")
    norm = copy.deepcopy(root.get_submodule(final.module)).requires_grad_(False).double()
    weight = unembed.weight.detach().float()
    # The norm's weights and kind are found by what it does: classes write them in many ways.
    probe = torch.full((1, weight.shape[1]), 1e4, dtype=torch.float64, device=weight.device)
    still = norm(torch.zeros_like(probe))
    constant = norm(probe) - still
    probe[:, ::2] *= -1
    spread = probe - probe.mean()
    gain = (norm(spread) - still) / (spread / spread.square().mean().sqrt())
    centers = bool(constant.abs().max() < 1e-3 * gain.abs().max())
    head = Head(norm, Site(final.module, take="input"), gain[0].float(), weight, centers)
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(probe) + 0.5
    made = (x - x.mean(dim=1, keepdim=True) if centers else x) / head.scale(x)[:, None] * gain
    if not torch.allclose(norm(x), made + still, rtol=1e-4, atol=1e-4 * float(gain.abs().max())):
        raise InputError(
            f"The final norm of {name}, {type(norm).__name__}, is neither a layer norm nor an RMS "
            "norm, so its effect cannot be folded into the unembedding."
        )
    return head


def _ends(head: Head, vectors: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest effects of each vector with their tokens, and smallest ones."""
    effects = head.effects(vectors)
    top, bottom = effects.topk(n, dim=1), effects.topk(n, dim=1, largest=False)
    return top.values, top.indices, bottom.values, bottom.indices


def _p_values(
    effects: Float[np.ndarray, " latent"],
    norms: Float[np.ndarray, " latent"],
    null: Float[np.ndarray, " random"],
) -> Float[np.ndarray, " latent"]:
    """Share of random directions of the same norm with at least the effect, themselves counted."""
    null = np.sort(null)
    relative = effects / np.where(norms > 0, norms, np.inf)
    exceed = len(null) - np.searchsorted(null, relative, side="left")
    return (1 + exceed) / (1 + len(null))


def _on_tokens(
    network: nn.Module,
    head: Head,
    dictionary: Dictionary,
    place: Site,
    latents: Sequence[int],
    tokens: Any,
    seed: int,
) -> tuple[float, Estimate | None]:
    """Scale of the stream before the final norm, and the difference that freezing it makes."""
    read = read_activations(network, whole_batch(tokens, network), [place, head.reads])
    rows, _ = site_rows(network, place, read[place], dictionary)
    stream = read[head.reads].reshape(-1, head.unembed.shape[1])
    scale = float(head.scale(stream).median())
    if len(rows) != len(stream):
        return scale, None
    code = dictionary.encode(rows.float())[:, list(latents)]
    row, column = code.nonzero().T
    draw = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))[:N_UNFROZEN]
    row, column = row[draw.to(row.device)], column[draw.to(row.device)]
    if not len(row):
        return scale, None
    vectors = atoms(dictionary, latents)[column] * code[row, column, None]
    shares = unfrozen(head, stream[row], vectors).cpu().double().numpy()
    drawn = (resample(len(shares), seed=seed) @ shares) / len(shares)
    return scale, estimate(float(shares.mean()), drawn, len(shares))


def unfrozen(
    head: Head, stream: Float[Tensor, "row d"], vectors: Float[Tensor, "row d"]
) -> Float[Tensor, " row"]:
    """Difference between frozen and unfrozen norm, as a share of the change of the logits.

    Args:
        head: Head of the network.
        stream: Residual stream before the final norm.
        vectors: What is taken from each row of it.
    """
    parts = []
    for x, v in zip(stream.split(LATENTS_AT_ONCE), vectors.split(LATENTS_AT_ONCE), strict=True):
        frozen = head.effects(v) / head.scale(x)[:, None]
        true = head.change(x, v)
        parts.append((frozen - true).norm(dim=1) / true.norm(dim=1).clamp_min(1e-30))
    return torch.cat(parts)


def _words(network: Any, ids: list[Int[np.ndarray, "latent top"]]) -> dict[int, str] | None:
    """Text of each token, where the network has a tokenizer."""
    decode = getattr(getattr(network, "input", None), "decode", None)
    if decode is None:
        return None
    listed = np.unique(np.concatenate(ids)).tolist()
    return dict(zip(listed, decode(listed), strict=True))
