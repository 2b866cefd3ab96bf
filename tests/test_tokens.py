"""Tokens decode to the text they came from and end once."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from memsinks.data.tokens import END, encode, load_tokenizer, pad_token, save_tokenizer, train_tokenizer
from memsinks.errors import ConfigError, DataError

STRANGE = ["  x , y .\n\n\t", "u\u0308 ü 😀 \x00", "I 'm not , n't", "\r\n", "3.14159 1999", f"a {END} b"]


def corpus() -> list[str]:
    rng = random.Random(0)
    words = "the cat dog sat mat runs über tree calls phone number at street lives in".split()
    return [" ".join(rng.choices(words, k=12)) + f" {rng.randrange(10**6)}." for _ in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus(), 300)


def test_trained_size_and_special_tokens(tokenizer):
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END
    assert tokenizer.eos_token_id == 0


def test_digits_are_single_tokens(tokenizer):
    assert [tokenizer.decode([token]) for token in encode(tokenizer, ["123456"], end=False)[0]] == list("123456")
    assert len(encode(tokenizer, ["the cat"], end=False)[0]) < len("the cat")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_decoding_is_lossless(tokenizer, text):
    assert tokenizer.decode(encode(tokenizer, [text], end=False)[0]) == text


@pytest.mark.parametrize("text", STRANGE)
def test_strange_texts_survive_and_end_once(tokenizer, text):
    (tokens,) = encode(tokenizer, [text])
    assert tokens.dtype == np.int64
    assert tokens[-1] == tokenizer.eos_token_id
    assert (tokens == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(tokens[:-1]) == text


def test_batches_keep_the_order(tokenizer):
    texts = [f"the cat {number}" for number in range(2345)]
    assert [tokenizer.decode(tokens) for tokens in encode(tokenizer, texts, end=False)] == texts


def test_tokens_are_those_of_the_tokenizer_called_whatever_it_was_asked_before(tokenizer):
    texts = [*corpus()[:20], *STRANGE]
    wanted = [tokenizer(x, add_special_tokens=False, split_special_tokens=True)["input_ids"] for x in texts]
    tokenizer(texts, truncation=True, max_length=4, padding="max_length", split_special_tokens=False)
    assert [x.tolist() for x in encode(tokenizer, texts, end=False)] == wanted

    class Louder(type(tokenizer)):
        def _encode_plus(self, text, *arguments, **settings):
            return super()._encode_plus([x.upper() for x in text], *arguments, **settings)

    louder = Louder(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END)
    assert encode(louder, ["the cat"])[0].tolist() == encode(tokenizer, ["THE CAT"])[0].tolist()


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    assert train_tokenizer(iter(corpus()), 300).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("part", ["", "tokenizer.json"], ids=["folder", "file"])
def test_saved_tokenizer_loads_alike(tokenizer, tmp_path, part):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path / part)
    assert loaded.eos_token_id == loaded.pad_token_id == tokenizer.eos_token_id
    for old, new in zip(encode(tokenizer, STRANGE), encode(loaded, STRANGE), strict=True):
        assert old.tolist() == new.tolist()


def test_what_is_saved_does_not_depend_on_where_it_was_loaded(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    save_tokenizer(again, tmp_path / "b")
    files = [{x.name: x.read_bytes() for x in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1] and again.init_kwargs["is_local"]


def test_padding_defaults_to_the_end_token(tokenizer, tmp_path):
    other = train_tokenizer(corpus(), 280)
    other.pad_token = None
    other.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == END


def test_tokenizer_without_end_is_refused(tmp_path):
    raw = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.save(str(tmp_path / "raw.json"))
    with pytest.raises(ConfigError, match="names no end token"):
        load_tokenizer(tmp_path / "raw.json")


def test_unreadable_tokenizers_are_refused(tmp_path):
    (tmp_path / "no.json").write_text("{")
    for path in (tmp_path / "no.json", tmp_path):
        with pytest.raises(ConfigError, match="cannot load a tokenizer from"):
            load_tokenizer(path)


def test_bad_texts_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"document 1 \(''\) gives no tokens"):
        encode(tokenizer, ["a", "", "b"])
    with pytest.raises(DataError, match="document 1001 "):
        encode(tokenizer, ["a"] * 1001 + [""])
    with pytest.raises(DataError, match="document 1 must be str, got NoneType"):
        encode(tokenizer, ["a", None])
    with pytest.raises(DataError, match="got one str"):
        encode(tokenizer, "a text")


def test_lone_surrogates_are_refused_with_their_place(tokenizer):
    for function in (lambda texts: encode(tokenizer, texts), lambda texts: train_tokenizer(texts, 300)):
        with pytest.raises(DataError, match="document 1 has a lone surrogate at character 2"):
            function(iter(["a", "ab\ud800"]))


def test_a_tokenizer_of_another_library_is_refused():
    with pytest.raises(ConfigError, match="one of transformers, got Tokenizer; see load_tokenizer"):
        encode(Tokenizer(models.BPE()), ["a"])


def test_the_padding_token(tokenizer):
    assert pad_token(tokenizer) == tokenizer.pad_token_id
    other = train_tokenizer(corpus(), 257)
    other.pad_token = None
    assert pad_token(other) == other.eos_token_id
    other.eos_token = None
    with pytest.raises(ConfigError, match="neither a padding nor an end token"):
        pad_token(other)


def test_end_needs_an_end_token(tmp_path):
    tokenizer = train_tokenizer(corpus(), 257)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        encode(tokenizer, ["a"])
    assert len(encode(tokenizer, ["a"], end=False)[0]) == 1


@pytest.mark.parametrize("size", [256, 0, 300.0, True])
def test_bad_vocabulary_size_is_refused(size):
    with pytest.raises(ConfigError, match="at least 257"):
        train_tokenizer(["a"], size)


@pytest.mark.parametrize("texts", [[], [""]])
def test_training_on_nothing_is_refused(texts):
    with pytest.raises(DataError, match="corpus is empty"):
        train_tokenizer(texts, 300)


@pytest.mark.skipif("MEMSINKS_DATA" not in os.environ, reason="MEMSINKS_DATA is unset")
@pytest.mark.parametrize("name", ["tinystories_bpe_4096.json", "mixed_bpe_8192.json"])
def test_given_tokenizer_files_load(name):
    tokenizer = load_tokenizer(Path(os.environ["MEMSINKS_DATA"]) / "tokenizers" / name)
    for text, tokens in zip(STRANGE, encode(tokenizer, STRANGE), strict=True):
        assert tokenizer.decode(tokens[:-1]) == text
