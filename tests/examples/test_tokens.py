"""Texts and token files: what is drawn from them, what is held out, and what `prepare` writes."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from mumoe_fast.examples import _tokens
from mumoe_fast.examples._tokens import Corpus, prepare

TEXT = "".join(f"{i} squared is {i * i}, naïvely;\n" for i in range(400)).encode()


def test_windows_depend_on_seed_and_number_alone() -> None:
    corpus = Corpus.from_bytes(TEXT)
    x, y = corpus.windows(range(12, 20), 24, seed=0)
    assert x.shape == (8, 24)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(torch.cat([corpus.windows(range(n, n + 1), 24, seed=0)[0] for n in range(12, 20)]), x)
    assert len(torch.unique(x, dim=0)) == 8
    assert not torch.equal(x, corpus.windows(range(12, 20), 24, seed=1)[0])


def test_windows_come_from_all_of_the_text_that_is_not_held_out() -> None:
    corpus = Corpus(np.arange(60_000, dtype=np.uint16), 60_000)
    x, y = corpus.windows(range(4000), 24, seed=0)
    starts = x[:, 0].double()
    assert starts.min() < 100
    assert 54_000 - 200 < y.max() < 54_000
    assert starts.mean() == pytest.approx(54_000 / 2, rel=0.03)


def test_held_out_windows_tile_the_last_tenth() -> None:
    corpus = Corpus.from_bytes(TEXT)
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == TEXT
    assert len(corpus.held_out) == pytest.approx(len(TEXT) / 10, abs=1)
    held_out = torch.tensor(corpus.held_out.tolist())
    x, y = corpus.held_out_windows(24)
    assert len(x) == (len(held_out) - 1) // 24
    assert torch.equal(x.flatten(), held_out[: x.numel()])
    assert torch.equal(y.flatten(), held_out[1 : y.numel() + 1])
    few, _ = corpus.held_out_windows(24, limit=3)
    assert torch.equal(few[[0, -1]], x[[0, -1]])
    assert len(few) == 3


def test_of_a_large_text_no_more_is_held_out_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tokens, "HELD_OUT_AT_MOST", 100)
    corpus = Corpus.from_bytes(TEXT)
    assert (len(corpus.train), len(corpus.held_out)) == (len(TEXT) - 100, 100)


def test_a_file_is_mapped_as_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT)
    corpus = Corpus.load(tmp_path / "text")
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.tokens.tobytes() == TEXT
    assert corpus.vocabulary == 256


def test_without_a_file_it_is_pythons_reference() -> None:
    assert b"assert" in Corpus.load().tokens.tobytes()


def test_prepared_bytes_are_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tokens, "CHUNK", 1000)
    (tmp_path / "text").write_bytes(TEXT)
    description = prepare(tmp_path / "text", tmp_path / "tokens", None, Console(quiet=True))
    assert (description.dtype, description.vocabulary, description.tokens) == ("uint8", 256, len(TEXT))
    assert Corpus.load(tmp_path / "tokens").tokens.tobytes() == TEXT


def tokenizer(folder: Path, size: int = 300) -> str:
    """A tokenizer in a folder, as a user may have one: byte-level BPE, trained on the text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT.decode()], vocab_size=size, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    return str(folder)


def test_prepared_tokens_are_the_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    monkeypatch.setattr(_tokens, "CHUNK", 1000)
    (tmp_path / "text").write_bytes(TEXT)
    name, out = tokenizer(tmp_path / "tokenizer"), tmp_path / "tokens"
    printed = io.StringIO()
    description = prepare(tmp_path / "text", out, name, Console(file=printed, force_terminal=True))
    assert (description.dtype, description.tokenizer) == ("uint16", name)
    assert "100%" in printed.getvalue()
    corpus = Corpus.load(out)
    assert corpus.vocabulary == description.vocabulary == len(AutoTokenizer.from_pretrained(name))
    assert description.tokens == len(corpus.tokens) < len(TEXT)
    assert AutoTokenizer.from_pretrained(name).decode(corpus.tokens.tolist()) == TEXT.decode()


def test_a_tokenizer_with_too_many_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "text").write_bytes(TEXT)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__len__", lambda self: 70_000)
    with pytest.raises(ValueError, match=r"tokenizer: expected at most 65,536 tokens, got 70,000"):
        prepare(tmp_path / "text", tmp_path / "tokens", tokenizer(tmp_path / "tokenizer"), Console(quiet=True))


def test_a_text_too_short_for_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text: expected more than 250 tokens.*got 240"):
        Corpus.from_bytes(TEXT[:240]).require(24)
    Corpus.from_bytes(TEXT[:251]).require(24)
