"""Text input of a language model: windows of token ids from its own tokenizer.

The counterpart of `ImageInput`: it sits in a network as `network.input`, cuts texts for it
and refuses what it cannot read.
"""

import functools
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from torch import Tensor, nn

from mechatlas.base import InputError

CONTINUES = "##"
CLOSING = frozenset(".,;:!?)]}'")


@runtime_checkable
class Tokenizer(Protocol):
    """Methods of a tokenizer of transformers that are used here."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        """Give a mapping whose `input_ids` are the tokens of `text`."""
        ...

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> Any:
        """Give the text of some tokens."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """Give a token as its vocabulary spells it."""
        ...


class TextInput(nn.Module):
    """Cut texts into windows of tokens, and refuse tokens that a network does not have.

    Special tokens stand in every window where the tokenizer puts them in a text: [CLS] first
    and [SEP] last for BERT, <s> first for Llama, none for GPT-2.
    """

    def __init__(
        self, name: str, tokenizer: Tokenizer, *, vocabulary: int, context: int | None
    ) -> None:
        """Keep a tokenizer.

        Args:
            name: The network's name, for error messages.
            tokenizer: The tokenizer that the network was trained with.
            vocabulary: Number of token ids that the network can embed.
            context: Most tokens that the network reads at once; `None` if any number.
        """
        super().__init__()
        self.name = name
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.context = context
        self.before, self.after = self._special_tokens()

    def forward(self, tokens: Int[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
        """Check the tokens and pass them on."""
        self.check(tokens)
        return tokens

    def windows(self, text: str, context: int) -> Int[np.ndarray, "n context"]:
        """Cut the token ids of a text into windows that follow each other without a gap.

        A last window that the text does not fill is dropped.

        Args:
            text: Any length.
            context: Tokens in a window, special tokens included.

        Raises:
            InputError: A window of that length has no room for text, or the network none for it.
        """
        n_special = len(self.before) + len(self.after)
        if context <= n_special:
            raise InputError(
                f"{self.name} puts {n_special} special tokens in every window, so a context of "
                f"{context} has no room for text; make it at least {n_special + 1}."
            )
        self._check_length(context)
        content = context - n_special
        tokens = self._tokens(text, special=False)
        n = len(tokens) // content
        middle = np.array(tokens[: n * content], dtype=np.int64).reshape(n, content)
        before, after = (
            np.tile(np.array(ids, dtype=np.int64), (n, 1)) for ids in (self.before, self.after)
        )
        return np.concatenate([before, middle, after], axis=1)

    def decode(self, tokens: Int[np.ndarray, " n"] | Sequence[int]) -> list[str]:
        """Give a readable piece of text for each token; joined, they are nearly the text.

        A piece that is not a whole character is shown as the vocabulary spells it.
        """
        return [self._piece(int(token)) for token in tokens]

    def check(self, tokens: Tensor) -> None:
        """Refuse tokens that the network does not have.

        Raises:
            InputError: Not whole numbers of shape (batch, position), too long a window, or an
                id outside the vocabulary.
        """
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex():
            raise InputError(
                f"{self.name} expects token ids, whole numbers of shape (batch, position), got "
                f"{tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        self._check_length(tokens.shape[1])
        if tokens.numel():
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= self.vocabulary:
                raise InputError(
                    f"{self.name} expects token ids in 0..{self.vocabulary - 1}, got "
                    f"{low}..{high}. Were they made by another model's tokenizer?"
                )

    def _check_length(self, length: int) -> None:
        if self.context is not None and length > self.context:
            raise InputError(
                f"{self.name} reads at most {self.context} tokens at once, got a context of "
                f"{length}."
            )

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        # `verbose` would warn that a text is longer than one window, which is the point here.
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Find the special tokens that the tokenizer puts before and after a text.

        Raises:
            InputError: It changes the text's own tokens.
        """
        plain = self._tokens("a", special=False)
        framed = self._tokens("a", special=True)
        for start in range(len(framed) - len(plain) + 1):
            end = start + len(plain)
            if plain and framed[start:end] == plain:
                return framed[:start], framed[end:]
        raise InputError(
            f"The tokenizer of {self.name} gives {framed} for a text whose tokens are {plain}, so "
            "where its special tokens belong cannot be told."
        )

    def _piece(self, token: int) -> str:
        text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        spelled = str(self.tokenizer.convert_ids_to_tokens(token))
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            return spelled
        if self._marks_continuations:
            continues = text.startswith(CONTINUES) or text in CLOSING or spelled in self._special
            return text.removeprefix(CONTINUES) if continues else f" {text}"
        # SentencePiece marks a leading space that its decoder drops from a first token.
        return f" {text}" if spelled.startswith("\u2581") and not text.startswith(" ") else text

    @functools.cached_property
    def _marks_continuations(self) -> bool:
        """Whether pieces inside a word are marked (WordPiece), instead of those that begin one."""
        spelled = (str(self.tokenizer.convert_ids_to_tokens(i)) for i in range(self.vocabulary))
        return any(s.startswith(CONTINUES) and s[len(CONTINUES) :].isalpha() for s in spelled)

    @functools.cached_property
    def _special(self) -> set[str]:
        return {str(self.tokenizer.convert_ids_to_tokens(i)) for i in (*self.before, *self.after)}
