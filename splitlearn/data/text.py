"""Sentences with a label each, as token numbers; the words are those of the training corpus."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from splitlearn.data.dataset import Dataset
from splitlearn.data.opening import read_text

__all__ = ["PADDING", "UNKNOWN", "Tokenizer", "load_lines"]

PADDING, UNKNOWN = 0, 1


@dataclass(frozen=True)
class Tokenizer:
    """Numbers words, which are what blanks part, in lower case. 0 is padding and 1 any unknown word."""

    words: tuple[str, ...]
    """The word of each token number, ``<pad>`` and ``<unk>`` first."""
    length: int
    """Tokens a sentence: shorter ones are padded at the end, longer ones cut off."""

    @classmethod
    def fit(cls, sentences: Sequence[str], *, num_words: int, length: int) -> "Tokenizer":
        """Return a tokenizer of ``num_words``, ``<pad>`` and ``<unk>`` among them: the most frequent words.

        Equally frequent ones come in alphabetical order.
        """
        if num_words < 3 or length < 1:
            raise ValueError(f"expected num_words of at least 3 and length of at least 1, got {num_words} and {length}")
        counts = Counter(word for sentence in sentences for word in sentence.lower().split())
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(("<pad>", "<unk>", *ranked[: num_words - 2]), length)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words) if number > UNKNOWN}

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Return token numbers, int64 [N, length]."""
        tokens = torch.full((len(sentences), self.length), PADDING, dtype=torch.int64)
        for row, sentence in enumerate(sentences):
            numbers = [self._numbers.get(word, UNKNOWN) for word in sentence.lower().split()[: self.length]]
            tokens[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        return tokens

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the sentence of each row of token numbers, without the padding."""
        return [" ".join(self.words[token] for token in row if token != PADDING) for row in tokens.tolist()]


def load_lines(
    path: str | Path,
    *,
    label: Literal["first", "last"],
    separator: str = "\t",
    test: str | Path | None = None,
    num_words: int = 10_000,
    length: int = 32,
    encoding: str = "utf-8-sig",
    name: str | None = None,
) -> Dataset:
    """Return sentences as tokens, x [N, length], from lines of a label 0, 1, … and a sentence, ``separator`` between.

    Where a ``test`` file is given, its rows follow as the official test set. The vocabulary and the number of classes
    come from ``path`` alone, and stand as ``names`` and ``num_classes``. Files are gzipped or plain.
    """
    path = Path(path)
    sentences, labels = _read(path, label, separator, encoding)
    tokenizer = Tokenizer.fit(sentences, num_words=num_words, length=length)
    num_train, num_classes = None, max(labels) + 1
    if test is not None:
        num_train = len(sentences)
        held_sentences, held_labels = _read(Path(test), label, separator, encoding)
        sentences, labels = sentences + held_sentences, labels + held_labels
    return Dataset(
        name or path.name.split(".")[0],
        tokenizer.encode(sentences),
        torch.tensor(labels, dtype=torch.int64),
        num_classes,
        "tokens",
        torch.arange(len(sentences)),
        num_train,
        names=tokenizer.words,
    )


def _read(path: Path, label: str, separator: str, encoding: str) -> tuple[list[str], list[int]]:
    sentences, labels = [], []
    for number, line in enumerate(read_text(path, encoding=encoding).split("\n"), start=1):
        if not line.strip():
            continue
        if label == "first":
            digit, _, sentence = line.partition(separator)
        else:
            sentence, _, digit = line.rpartition(separator)
        digit = digit.strip()
        if not (digit.isascii() and digit.isdigit() and len(digit) < 10 and sentence.strip()):
            raise ValueError(
                f"{path}, line {number}: expected a sentence with its label {label}, {separator!r} between, "
                f"got {line[:60]!r}; check the separator and the file"
            )
        sentences.append(sentence.strip())
        labels.append(int(digit))
    if not sentences:
        raise ValueError(f"{path}: expected lines of a label and a sentence, got none; fetch the file again")
    return sentences, labels
