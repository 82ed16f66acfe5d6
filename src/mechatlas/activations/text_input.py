"""Input of language models: windows of token ids from their own tokenizers.

`TextInput`, the counterpart of `ImageInput`, sits in a network as `network.input`, cuts texts
for it and refuses tokens that it does not have. Special tokens written in a text stay words: only
the tokenizer and a chat template put special tokens into a window.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from mechatlas.base import InputError

CONTINUES = "##"
"""Mark of a WordPiece token that continues a word."""
CLOSING = frozenset(".,;:!?)]}'")
"""Characters before which no space is written."""
PRIVATE_USE = 0xF0000
"""First code point of the plane that Unicode leaves to private use."""


@runtime_checkable
class Tokenizer(Protocol):
    """Tokenizer of transformers: the methods that are used of it."""

    @property
    def all_special_ids(self) -> list[int]:
        """Token ids with a meaning of their own, such as the end of a text."""
        ...

    def __call__(
        self, text: str, *, add_special_tokens: bool, split_special_tokens: bool, verbose: bool
    ) -> Any:
        """Mapping whose `input_ids` are the tokens of `text`."""
        ...

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> Any:
        """Text of some tokens."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> Any:
        """Spelling of a token in the vocabulary."""
        ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool) -> Any:
        """Text of a conversation, with its special tokens."""
        ...


class TextInput(nn.Module):
    """Module that cuts texts into windows of tokens, and refuses tokens outside a vocabulary.

    Special tokens stand in every window where the tokenizer puts them in a text: [CLS] first
    and [SEP] last for BERT, <s> first for Llama, none for GPT-2.
    """

    before: list[int]
    """Special tokens at the start of a window."""
    after: list[int]
    """Special tokens at the end of a window."""
    special_ids: frozenset[int]
    """Token ids that are no part of a text: start, end, separator, padding, roles of a chat."""
    pad: int | None
    """Token id that fills the end of a short window; `None` where there is none."""
    separator: int | None
    """Token id between texts in one window: the end of a text; `None` where there is none."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        *,
        vocabulary: int,
        context: int | None,
        causal: bool = True,
    ) -> None:
        """Keep a tokenizer.

        Args:
            name: The network's name, for error messages.
            tokenizer: The tokenizer that the network was trained with.
            vocabulary: Number of token ids that the network can embed.
            context: Largest number of tokens that the network reads at once; `None` for any.
            causal: Whether no position of the network sees a later one.
        """
        super().__init__()
        self.name = name
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.context = context
        self.causal = causal
        self.before, self.after = self._special_tokens()
        ends, pads, seps = (self._id(f"{n}_token_id") for n in ("eos", "pad", "sep"))
        self.separator = ends if ends is not None else seps
        # What follows a causal model's text is seen by no token of it, so any id will do.
        self.pad = pads if pads is not None or not causal else self.separator or 0
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.special_ids = frozenset(i for i in special if i < vocabulary)

    def forward(self, tokens: Int[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
        """Check tokens, and return them."""
        self.check(tokens)
        return tokens

    def windows(self, text: str, context: int) -> Int[np.ndarray, "n context"]:
        """Cut a text into windows of token ids that follow each other without a gap.

        A last window that the text does not fill is dropped.

        Args:
            text: Text of any length.
            context: Tokens in a window, special tokens included.

        Raises:
            InputError: The window has no room for text, or is longer than the network reads.
        """
        content = self.room(context)
        tokens = self.tokens(text)
        n = len(tokens) // content
        return self.framed(tokens[: n * content].reshape(n, content))

    def room(self, context: int) -> int:
        """Tokens of text in a window of `context` tokens.

        Raises:
            InputError: The window has no room for text, or is longer than the network reads.
        """
        n_special = len(self.before) + len(self.after)
        if context <= n_special:
            raise InputError(
                f"{self.name} puts {n_special} special tokens in every window, so a context of "
                f"{context} has no room for text; make it at least {n_special + 1}."
            )
        self.check_length(context)
        return context - n_special

    def framed(self, content: Int[np.ndarray, "n content"]) -> Int[np.ndarray, "n context"]:
        """Put the special tokens of a window around its text."""
        before, after = (
            np.tile(np.array(ids, dtype=np.int64), (len(content), 1))
            for ids in (self.before, self.after)
        )
        return np.concatenate([before, content, after], axis=1)

    def tokens(self, text: str) -> Int[np.ndarray, " n"]:
        """Token ids of a text, without special tokens; names of such tokens in it stay words."""
        return np.array(self._tokens(text, special=False), dtype=np.int64)

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> Int[np.ndarray, " n"]:
        """Token ids of a conversation in the tokenizer's chat template.

        Names of special tokens that a person wrote in a message stay words.

        Args:
            messages: Turns, each with its `role` and `content`.

        Raises:
            InputError: The tokenizer has no chat template, or the template refuses the messages.
        """
        # A stand-in for each such name, which no template and no text has.
        names = sorted(str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.special_ids)
        stand_ins = {name: chr(PRIVATE_USE + i) for i, name in enumerate(names)}
        marked = [
            {k: _replaced(v, stand_ins) if k != "role" else v for k, v in message.items()}
            for message in messages
        ]
        try:
            text = str(self.tokenizer.apply_chat_template(marked, tokenize=False))
        except Exception as error:  # templates are programs
            raise InputError(
                f"The tokenizer of {self.name} cannot lay out a conversation: "
                f"{str(error).splitlines()[0] if str(error) else error!r}"
            ) from error
        written = {stand_in: name for name, stand_in in stand_ins.items()}
        tokens: list[int] = []
        for piece in re.split(f"([{''.join(written)}])" if written else "(?!)", text):
            if piece in written:
                tokens += self._tokens(written[piece], special=False)
            elif piece:
                tokens += self._tokens(piece, special=False, split=False)
        return np.array(tokens, dtype=np.int64)

    def decode(self, tokens: Int[np.ndarray, " n"] | Sequence[int]) -> list[str]:
        """Readable pieces of text, one for each token; joined, they are nearly the text.

        A piece that is not a whole character is shown as the vocabulary spells it.
        """
        return [self._piece(int(token)) for token in tokens]

    def check(self, tokens: Shaped[Tensor, "..."]) -> None:
        """Refuse tokens that the network does not have.

        Raises:
            InputError: The ids are no integers of shape (batch, position), the window is too
                long, or an id is outside the vocabulary.
        """
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex():
            raise InputError(
                f"{self.name} expects token ids, whole numbers of shape (batch, position), got "
                f"{tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        self.check_length(tokens.shape[1])
        if tokens.numel():
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= self.vocabulary:
                raise InputError(
                    f"{self.name} expects token ids in 0..{self.vocabulary - 1}, got "
                    f"{low}..{high}. Were they made by another model's tokenizer?"
                )

    def check_length(self, length: int) -> None:
        """Refuse windows that are longer than the network reads.

        Raises:
            InputError: The length is larger.
        """
        if self.context is not None and length > self.context:
            raise InputError(
                f"{self.name} reads at most {self.context} tokens at once, got a context of "
                f"{length}."
            )

    def _tokens(self, text: str, *, special: bool, split: bool = True) -> list[int]:
        # `verbose` would warn that a text is longer than one window, which is the point here.
        encoded = self.tokenizer(
            text, add_special_tokens=special, split_special_tokens=split, verbose=False
        )
        return list(encoded["input_ids"])

    def _id(self, name: str) -> int | None:
        token = getattr(self.tokenizer, name, None)
        return token if isinstance(token, int) and 0 <= token < self.vocabulary else None

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer puts before and after a text."""
        plain = self._tokens("a", special=False)
        framed = self._tokens("a", special=True)
        for start in range(len(framed) - len(plain) + 1):
            end = start + len(plain)
            if plain and framed[start:end] == plain:
                return framed[:start], framed[end:]
        raise InputError(
            f"The tokenizer of {self.name} gives {framed} for a text whose tokens are {plain}, so "
            "the place of its special tokens is unknown."
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
        """Whether pieces inside a word are marked (WordPiece), instead of its first piece."""
        spelled = (str(self.tokenizer.convert_ids_to_tokens(i)) for i in range(self.vocabulary))
        return any(s.startswith(CONTINUES) and s[len(CONTINUES) :].isalpha() for s in spelled)

    @functools.cached_property
    def _special(self) -> set[str]:
        return {str(self.tokenizer.convert_ids_to_tokens(i)) for i in (*self.before, *self.after)}


def _replaced(value: Any, stand_ins: Mapping[str, str]) -> Any:
    """Text with some of its words replaced, in lists and mappings too."""
    if isinstance(value, str):
        for name, stand_in in stand_ins.items():
            value = value.replace(name, stand_in)
    elif isinstance(value, Mapping):
        value = {key: _replaced(item, stand_ins) for key, item in value.items()}
    elif isinstance(value, list):
        value = [_replaced(item, stand_ins) for item in value]
    return value
