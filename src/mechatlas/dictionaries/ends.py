"""Sites that a dictionary reads and those that it writes, by the columns of its rows.

    ends_of       any dictionary -> names and columns of both
    parts_of      a dictionary -> the dictionaries within it that each read on their own
    decoded_at    a code -> what is written at one site, with what a skip connection passes

An autoencoder reads the site that it writes; a transcoder others; a crosscoder and a cross-layer
transcoder several. Analyses that run a network ask here, and treat all kinds alike.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from mechatlas.dictionaries.pretrained import CrossLayerDictionary, reading_of

UNNAMED = ("<read>", "<written>")
"""Names of the sites that a dictionary reads and writes, where it does not say them."""


class Ends(NamedTuple):
    """Sites of a dictionary, in the order of their columns."""

    reads: dict[str, slice]
    """Columns of a row that is encoded, by site."""
    writes: dict[str, slice]
    """Columns of a reconstruction, by site."""

    @property
    def names(self) -> tuple[str, ...]:
        """All sites: those that are read, then others that are written."""
        return tuple(dict.fromkeys([*self.reads, *self.writes]))

    @property
    def transcodes(self) -> bool:
        """Whether no site is both read and written."""
        return not self.reads.keys() & self.writes.keys()


def ends_of(dictionary: Any) -> Ends:
    """Sites that a dictionary reads and writes.

    Args:
        dictionary: Any dictionary; one that says nothing writes the site that it reads.
    """
    spans: dict[str, slice] = dict(getattr(dictionary, "spans", None) or {})
    reads, d_in = getattr(dictionary, "reads", None), int(dictionary.d_in)
    if isinstance(reads, Mapping):
        return Ends(dict(reads), spans)
    own = str(getattr(dictionary, "site", None) or UNNAMED[0])
    one = {own: slice(0, d_in)}
    transcodes = getattr(dictionary, "transcodes", None)
    if transcodes is None:  # one of ours says so by its columns
        transcodes = not spans and reads != getattr(dictionary, "writes", reads)
    if transcodes:
        named = getattr(dictionary, "metadata", {}).get("hook_name_out") or UNNAMED[1]
        return Ends(one, spans or {str(named): slice(0, int(dictionary.d_out))})
    if not spans:
        return Ends(one, one)
    if int(dictionary.d_out) == d_in:
        return Ends(spans, spans)
    return Ends({name: slice(0, d_in) for name, span in spans.items() if span == reads}, spans)


class Part(NamedTuple):
    """Dictionary within another that encodes rows on its own."""

    dictionary: Any
    reads: slice
    """Columns of the whole row that it encodes."""
    latents: slice
    """Its latents among all."""
    ends: Ends


def parts_of(dictionary: Any) -> list[Part]:
    """Parts of a cross-layer transcoder, one for each site that is read; else the whole.

    Args:
        dictionary: Any dictionary.
    """
    if not isinstance(dictionary, CrossLayerDictionary):
        whole = slice(0, int(dictionary.d_in)), slice(0, int(dictionary.n_latents))
        return [Part(dictionary, *whole, ends_of(dictionary))]
    return [
        Part(each, read, latents, Ends({name: slice(0, each.d_in)}, each.spans))
        for name, (each, read, latents, _) in zip(dictionary.reads, dictionary.parts(), strict=True)
    ]


def decoded_at(
    dictionary: Any,
    code: Float[Tensor, "batch latent"],
    x: Float[Tensor, "batch d_in"],
    site: str,
) -> Float[Tensor, "batch width"]:
    """Reconstruction of one site, with what a skip connection passes.

    Args:
        dictionary: Part of a dictionary.
        code: Its code.
        x: Rows that were encoded.
        site: One of the sites that it writes.
    """
    spans = getattr(dictionary, "spans", None) or {}
    out = dictionary.decode_site(code, site) if site in spans else dictionary.decode(code)
    skip = getattr(dictionary, "W_skip", None)
    if skip is None:
        return out
    return out + x.to(out.dtype) @ skip[:, spans.get(site, slice(None))].to(out.dtype)


def in_words(dictionary: Any) -> str:
    """Widths and sites that a dictionary reads and writes, for messages.

    Args:
        dictionary: Any dictionary.
    """
    ends = ends_of(dictionary)
    if not ends.transcodes:
        return f"reads {reading_of(dictionary)}"
    named = ", ".join(name for name in ends.writes if name not in UNNAMED)
    return f"reads {reading_of(dictionary)} and writes {named or dictionary.d_out}"
