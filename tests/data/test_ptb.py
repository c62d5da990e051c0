from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kfacrnn.data import ptb
from kfacrnn.errors import UserError

LEVELS = ("word", "char")
SPLITS = ("train", "valid", "test")


def spelt(corpus: ptb.Corpus, split: str) -> list[str]:
    return [corpus.vocabulary[i] for i in getattr(corpus, split).tolist()]


# ---- streams -----------------------------------------------------------------------------------------------------


def test_words_end_every_line_with_eos(tiny_ptb: Path) -> None:
    corpus = ptb.load("word", root=str(tiny_ptb))
    assert spelt(corpus, "valid") == ["the", "dog", "sat", "<eos>", "a", "cat", "sat", "on", "N", "mat", "<eos>"]
    assert corpus.vocabulary[corpus.line_end] == "<eos>"


def test_characters_are_underscores_for_spaces_and_one_symbol_for_the_line_end(tiny_ptb: Path) -> None:
    corpus = ptb.load("char", root=str(tiny_ptb))
    assert spelt(corpus, "test") == [*"a_dog", "<eos>", *"the_<unk>_cat_'s_mat", "<eos>"]


def test_ids_go_by_falling_frequency_then_by_code_point(tiny_ptb: Path) -> None:
    vocabulary = ptb.load("word", root=str(tiny_ptb)).vocabulary
    assert vocabulary == ["<eos>", "the", "cat", "mat", "'s", "<unk>", "N", "a", "dog", "on", "sat", "times"]


@pytest.mark.parametrize("level", LEVELS)
def test_torchtext_gives_the_same_streams(tiny_ptb: Path, level: str) -> None:
    pytest.importorskip("torchtext")
    ours, theirs = (ptb.load(level, root=str(tiny_ptb), source=source) for source in ("files", "torchtext"))
    assert ours.vocabulary == theirs.vocabulary
    assert all(torch.equal(getattr(ours, split), getattr(theirs, split)) for split in SPLITS)


# ---- where the files are -----------------------------------------------------------------------------------------


def test_a_named_folder_goes_before_the_environment_and_that_before_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KFACRNN_DATA", raising=False)
    assert ptb.locate() == ptb.Place(tmp_path / "cache" / "kfacrnn" / "ptb", "cache")
    monkeypatch.setenv("KFACRNN_DATA", str(tmp_path / "environment"))
    assert ptb.locate() == ptb.Place(tmp_path / "environment", "KFACRNN_DATA")
    assert ptb.locate(str(tmp_path / "named")) == ptb.Place(tmp_path / "named", "data.root")


def test_a_folder_ptb_inside_the_named_one_is_found(tiny_ptb: Path) -> None:
    inner = tiny_ptb / "corpora" / "ptb"
    inner.mkdir(parents=True)
    for split in SPLITS:
        (tiny_ptb / f"ptb.{split}.txt").rename(inner / f"ptb.{split}.txt")
    assert len(ptb.load("word", root=str(tiny_ptb / "corpora")).valid) == 11


def test_checksums_are_those_of_the_files(tiny_ptb: Path) -> None:
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tiny_ptb.glob("ptb.*.txt")}
    assert ptb.load("word", root=str(tiny_ptb)).checksums == sums


# ---- download ----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tiny_ptb: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A server that has the tiny corpus: the list of what was fetched from it."""
    fetched = []

    def serve(url: str, output_file: str, pooch: object) -> None:
        fetched.append(url)
        Path(output_file).write_bytes((tiny_ptb / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr("pooch.HTTPDownloader", lambda timeout: serve)
    return fetched


def test_what_the_cache_lacks_is_downloaded_once(served: list[str]) -> None:
    for _ in range(2):
        assert len(ptb.load("word").valid) == 11
        assert served == [f"{ptb.URL}ptb.{split}.txt" for split in SPLITS]


def test_an_altered_file_in_the_cache_is_refused_and_prepare_replaces_it(tiny_ptb: Path, served: list[str]) -> None:
    ptb.load("word")
    cache = tiny_ptb / "cache" / "kfacrnn" / "ptb"
    _spoil(cache / "ptb.test.txt", "altered")
    with pytest.raises(UserError, match=r"ptb\.test\.txt \(cache\) is altered: .*; run `kfacrnn data prepare`"):
        ptb.load("word")
    assert ptb.prepare()[0] == f"Penn Treebank in {cache} (cache)"
    assert len(served) == 4


def assert_download_fails_in_one_line() -> None:
    with pytest.raises(UserError, match=r"cannot download .*ptb\.train\.txt to .*: put .*KFACRNN_DATA") as caught:
        ptb.load("word")
    assert "\n" not in str(caught.value)


def test_a_download_without_network_fails_in_one_line_at_once(tiny_ptb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptb, "URL", "http://127.0.0.1:9/")
    start = time.perf_counter()
    assert_download_fails_in_one_line()
    assert time.perf_counter() - start < 5


def test_a_download_of_something_else_fails_in_one_line(tiny_ptb: Path, served: list[str]) -> None:
    (tiny_ptb / "ptb.train.txt").write_text("404: not found")
    assert_download_fails_in_one_line()


# ---- files that are wrong ----------------------------------------------------------------------------------------


def _spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-5])
    elif how == "altered":
        path.write_bytes(data.replace(b"cat", b"cow", 1))
    else:
        path.write_bytes(data.replace(b"\n", b"\r\n"))


def assert_one_line_names(folder: Path, name: str, problem: str) -> None:
    for level in LEVELS:
        with pytest.raises(UserError) as caught:
            ptb.load(level, root=str(folder))
        message = str(caught.value)
        assert "\n" not in message
        assert f"{folder / name} (data.root)" in message
        assert problem in message
        assert f"put ptb.{{train,valid,test}}.txt from {ptb.URL} there" in message


WRONG = [
    ("missing", "No such file or directory"),
    ("truncated", "is truncated"),
    ("altered", "is altered"),
    ("with other line ends", "is altered"),
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("how", "problem"), WRONG)
def test_a_wrong_file_is_one_line_that_says_what_and_where(tiny_ptb: Path, split: str, how: str, problem: str) -> None:
    _spoil(tiny_ptb / f"ptb.{split}.txt", how)
    assert_one_line_names(tiny_ptb, f"ptb.{split}.txt", problem)


def test_check_and_prepare_refuse_what_load_refuses_and_leave_a_named_folder_alone(tiny_ptb: Path) -> None:
    (tiny_ptb / "ptb.test.txt").unlink()
    for command in (ptb.check, ptb.prepare):
        with pytest.raises(UserError, match=r"ptb\.test\.txt"):
            command(str(tiny_ptb))
    assert not (tiny_ptb / "ptb.test.txt").exists()


def test_check_refuses_words_whose_characters_are_not_the_published_ones(
    tiny_ptb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(ptb.check(str(tiny_ptb))) == 8
    monkeypatch.setattr(ptb, "character_text", lambda words: " ".join(words))
    with pytest.raises(UserError, match=r"not those of ptb\.char\.train\.txt"):
        ptb.check(str(tiny_ptb))


# ---- torchtext that is not there or of the wrong version ---------------------------------------------------------


def test_a_torchtext_compiled_for_another_torch_is_refused_before_it_is_imported(
    tiny_ptb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tiny_ptb / "site-packages" / "torchtext-0.18.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: torchtext\nVersion: 0.18.0\n")
    monkeypatch.syspath_prepend(str(installed.parent))
    with pytest.raises(UserError, match=r"torchtext 0\.18\.0 cannot be used.*pip install kfacrnn\[torchtext\]"):
        ptb.load("word", root=str(tiny_ptb), source="torchtext")


def test_a_missing_torchtext_names_the_extra(tiny_ptb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tiny_ptb)])
    with pytest.raises(UserError, match=r"not installed; pip install kfacrnn\[torchtext\]"):
        ptb.load("word", root=str(tiny_ptb), source="torchtext")


# ---- the real files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(ptb_folder: str) -> ptb.Corpus:
    return ptb.load("word", root=ptb_folder)


@pytest.fixture(scope="module")
def characters(ptb_folder: str) -> ptb.Corpus:
    return ptb.load("char", root=ptb_folder)


@pytest.mark.ptb
def test_the_real_words_are_as_many_as_published(words: ptb.Corpus, ptb_folder: str) -> None:
    assert [len(getattr(words, split)) for split in SPLITS] == [929_589, 73_760, 82_430]
    assert len(words.vocabulary) == len(set(words.vocabulary)) == 10_000
    for split in SPLITS:
        lines = Path(ptb_folder, f"ptb.{split}.txt").read_text().splitlines()
        assert spelt(words, split) == [word for line in lines for word in [*line.split(), "<eos>"]]


@pytest.mark.ptb
def test_the_real_characters_are_mikolovs_by_the_published_sums(characters: ptb.Corpus) -> None:
    def mikolovs(stream: Tensor) -> str:
        symbols = ["\n" if symbol == "<eos>" else symbol for symbol in characters.vocabulary]
        return "".join(symbols[i] + " " for i in stream.tolist())

    for split, published in ptb.PUBLISHED.items():
        assert hashlib.sha256(mikolovs(getattr(characters, split)).encode()).hexdigest() == published.char_sha256


@pytest.mark.ptb
def test_the_real_characters_are_49_symbols_and_the_line_end(characters: ptb.Corpus) -> None:
    counts = [(4_975_414, 42_068), (389_672, 3_370), (438_662, 3_761)]
    for split, (symbols, lines) in zip(SPLITS, counts, strict=True):
        stream = getattr(characters, split)
        assert int((stream == characters.line_end).sum()) == lines
        assert len(stream) == symbols + lines
    assert len(characters.train.unique()) == len(characters.vocabulary) == 50


@pytest.mark.ptb
@pytest.mark.parametrize("level", LEVELS)
def test_torchtext_gives_the_same_real_streams(ptb_folder: str, level: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torchtext")
    ours = request.getfixturevalue({"word": "words", "char": "characters"}[level])
    theirs = ptb.load(level, root=ptb_folder, source="torchtext")
    assert ours.vocabulary == theirs.vocabulary
    assert all(torch.equal(getattr(ours, split), getattr(theirs, split)) for split in SPLITS)


@pytest.mark.ptb
@pytest.mark.parametrize(("how", "problem"), WRONG[:3])
def test_a_wrong_real_file_is_one_line(ptb_folder: str, tmp_path: Path, how: str, problem: str) -> None:
    for split in SPLITS:
        (tmp_path / f"ptb.{split}.txt").write_bytes(Path(ptb_folder, f"ptb.{split}.txt").read_bytes())
    _spoil(tmp_path / "ptb.valid.txt", how)
    assert_one_line_names(tmp_path, "ptb.valid.txt", problem)


@pytest.mark.ptb
def test_check_reports_counts_and_sums(ptb_folder: str) -> None:
    report = "\n".join(ptb.check(ptb_folder))
    for number in ("929,589", "73,760", "82,430", "5,017,482", "393,042", "442,423", "10,000 words, 50 symbols"):
        assert number in report
