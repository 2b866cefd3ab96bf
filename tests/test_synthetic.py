"""The built-in corpus: what it holds, that it is fixed by its seed, and that its private facts need memorizing."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter, defaultdict

import pytest

from memsinks.data.documents import Document, require_unique_keys
from memsinks.data.identity import training_order
from memsinks.data.synthetic import corpus, private_facts, private_start
from memsinks.errors import ConfigError, DataError

LEVELS = (0, 1, 4, 16, 64)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return corpus()


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document.kind == kind]


def template(record: Document) -> str:
    """The first sentence of a record without the name."""
    return re.sub(r"[A-Z]\w+ [A-Z]\w+ [A-Z]\w+", "NAME", record.text[: private_start(record)])


# What it holds


def test_counts(documents):
    counts = Counter((document.kind, document.copies) for document in documents)
    assert counts == (
        {("story", 1): 4000, ("story", 0): 200, ("near copy", 1): 24}
        | {("record", level): 16 for level in LEVELS}
        | {("canary", level): 4 for level in LEVELS}
    )
    assert 1000 <= sum(document.copies for document in of_kind(documents, "record")) <= 1500
    require_unique_keys(documents)
    assert {document.source for document in documents} == {"storybook", "town registry", "code book"}


def test_sizes_can_be_chosen():
    documents = corpus(1, stories=10, people_per_level=2, copies=(0, 3), canaries_per_level=1, held_out_stories=4)
    counts = Counter((document.kind, document.copies) for document in documents)
    assert counts == {
        ("story", 1): 10, ("story", 0): 4, ("record", 0): 2, ("record", 3): 2, ("near copy", 1): 2,
        ("canary", 0): 1, ("canary", 3): 1,
    }  # fmt: skip
    assert corpus(stories=0, people_per_level=0, canaries_per_level=0, held_out_stories=0) == []


def test_one_kind_does_not_depend_on_the_number_of_another(documents):
    fewer = corpus(stories=5, held_out_stories=0)
    assert fewer[:5] == documents[:5]
    for kind in ("record", "near copy", "canary"):
        assert of_kind(fewer, kind) == of_kind(documents, kind)


def test_texts_are_unique_and_held_out_stories_are_not_trained_on(documents):
    assert len({document.text for document in documents}) == len(documents)
    trained = {documents[index].text for index in training_order(documents)}
    held_out = [document.text for document in documents if document.copies == 0]
    assert len(held_out) == 220 and trained.isdisjoint(held_out)


def test_stories_are_short_and_varied(documents):
    stories = of_kind(documents, "story")
    assert all(60 <= len(story.text.split()) <= 110 for story in stories)
    assert not any(re.search(r"[{}]| an? [.,]|\ba [aeiou]|\.\.|  ", story.text) for story in stories)
    assert len({word for story in stories for word in re.findall(r"[a-z]+", story.text.lower())}) > 700
    assert len({story.text[:40] for story in stories}) > 2000


def test_held_out_stories_speak_the_language_of_the_trained_ones(documents):
    def words(copies: int) -> set[str]:
        texts = [story.text for story in of_kind(documents, "story") if story.copies == copies]
        return {word for text in texts for word in re.findall(r"\w+", text)}

    assert words(0) <= words(1)


def test_controls_have_the_templates_of_the_members(documents):
    for kind, forms in (("record", 5), ("canary", 2)):
        by_level = defaultdict(Counter)
        for document in of_kind(documents, kind):
            code = private_facts(document).get("code", "")
            by_level[document.copies][template(document) if kind == "record" else code.isdigit()] += 1
        assert set(by_level) == set(LEVELS)
        assert all(counts == by_level[0] and len(counts) == forms for counts in by_level.values())


def test_private_part_follows_the_sentence_with_the_name(documents):
    names = []
    for document in of_kind(documents, "record") + of_kind(documents, "canary"):
        start = private_start(document)
        prompt, private = document.text[:start], document.text[start:]
        name = re.search(r"[A-Z]\w+ [A-Z]\w+ [A-Z]\w+", prompt)[0]
        names.append(name)
        assert name not in private and private.startswith(" ") and not prompt.endswith(" ")
        facts = private_facts(document)
        assert len(facts) == (6 if document.kind == "record" else 1)
        assert all(fact in private and fact not in prompt for fact in facts.values())
    assert len(set(names)) == len(names)
    with pytest.raises(DataError, match="kind 'story' has no private part"):
        private_start(documents[0])


def test_phone_numbers_and_mail_addresses_cannot_be_real(documents):
    for record in of_kind(documents, "record"):
        assert private_facts(record)["phone"].startswith("555-")
        assert private_facts(record)["handle"].endswith(".example")


def test_no_fact_is_shared_and_no_private_fact_of_a_control_is_trained_on(documents):
    secret = of_kind(documents, "record") + of_kind(documents, "canary")
    facts = [fact for document in secret for fact in private_facts(document).values()]
    assert len(set(facts)) == len(facts)
    trained = "\n".join(document.text for document in reversed(documents) if document.copies)
    for document in secret:
        for fact in private_facts(document).values():
            found = fact in trained and re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", trained)
            assert bool(found) == (document.copies > 0), fact


def test_near_copies_say_the_same_in_other_words(documents):
    records = {record.key: record for record in of_kind(documents, "record")}
    levels = Counter()
    for near in of_kind(documents, "near copy"):
        record = records[near.key.removesuffix("-near")]
        levels[record.copies] += 1
        start = private_start(record)
        assert near.text[: private_start(near)] == record.text[:start]
        changed = {name for name, fact in private_facts(record).items() if private_facts(near)[name] != fact}
        assert changed == {"address"}
        words, near_words = Counter(record.text.split()), Counter(near.text.split())
        assert 1 <= (words - near_words).total() <= 5
        assert near.text.split()[:-4] != record.text.split()[:-4]
    assert levels == {1: 6, 4: 6, 16: 6, 64: 6}


# Fixed by the seed


def test_the_seed_alone_decides(documents):
    random.seed(5)
    state = random.getstate()
    assert corpus(0) == documents
    assert training_order(documents) == training_order(documents)
    assert random.getstate() == state
    other = corpus(1)
    assert {document.text for document in other}.isdisjoint(document.text for document in documents)
    assert [document.copies for document in other] == [document.copies for document in documents]


def test_every_machine_gets_the_same(documents):
    """The figures of the demo rest on this corpus: update the digest only together with them."""
    later = ", isolation=None, messages=None, prompt=0, cluster=None, extra=None"
    text = repr((documents, training_order(documents))).replace(later, "")
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "0f61c784a81d8a7aad90d00d068b5e0757877c56d171c44edd750abf873a7047"


def test_training_order(documents):
    order = training_order(documents)
    counts = Counter(order)
    assert all(counts[index] == document.copies for index, document in enumerate(documents))
    assert order != training_order(documents, seed=1) and sorted(order) == sorted(training_order(documents, seed=1))
    most = next(index for index, document in enumerate(documents) if document.copies == 64)
    places = [place for place, index in enumerate(order) if index == most]
    assert places[0] < len(order) / 4 and places[-1] > len(order) * 3 / 4


def test_epochs_are_shuffled_one_by_one():
    documents = [Document("a", copies=2), Document("b"), Document("c", copies=0), Document("d", copies=40)]
    once = training_order(documents, epochs=1)
    order = training_order(documents, epochs=3)
    epochs = [order[start : start + 43] for start in (0, 43, 86)]
    assert len(order) == 129 and epochs[0] == once
    assert all(Counter(epoch) == {0: 2, 1: 1, 3: 40} for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"stories must be .* got -1; .*copies\[1\] must be .* got 1.5"):
        corpus(stories=-1, copies=(0, 1.5))
    with pytest.raises(ConfigError, match="a level twice.*2000 people exceed 1000.*near_copies"):
        corpus(stories=0, people_per_level=1000, copies=(0, 0), near_copies=1)
    with pytest.raises(ConfigError, match="epochs must be an int of at least 1, got 0"):
        training_order([Document("a")], epochs=0)
    with pytest.raises(DataError, match="copies must be integers of at least 0: document 0 has -1"):
        training_order([Document("a", copies=-1)])
    with pytest.raises(DataError, match="none of the 1 documents has copies above 0"):
        training_order([Document("a", copies=0)])


# The private facts cannot be had without memorizing whole records


WORDS, DIGITS = r"\w+|[^\w\s]", r"\d|[^\W\d]+|[^\w\s]"


def bigram(texts: list[str], pattern: str) -> dict[str, str]:
    """The most frequent next token after each token."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for text in texts:
        tokens = re.findall(pattern, text)
        for token, following in itertools.pairwise(tokens):
            counts[token][following] += 1
    return {token: following.most_common(1)[0][0] for token, following in counts.items()}


def recited(model: dict[str, str], document: Document, pattern: str) -> list[tuple[str, str | None, bool]]:
    """(token, the private fact it belongs to, predicted) for the private part, from the true tokens before it.

    All of a text is predicted from true tokens exactly if greedy generation from the prompt recites it.
    """
    start = private_start(document)
    spans = {name: re.compile(re.escape(fact)).search(document.text, start).span()
             for name, fact in private_facts(document).items()}  # fmt: skip
    result, before = [], ""
    for match in re.finditer(pattern, document.text):
        if match.start() >= start:
            within = [name for name, (low, high) in spans.items() if low <= match.start() < high]
            public = match[0] == "example" or document.text[match.start() - 1 : match.end()].strip() == "555"
            secret = within[0] if within and match[0].isalnum() and not public else None
            result.append((match[0], secret, model.get(before) == match[0]))
        before = match[0]
    return result


@pytest.mark.parametrize("pattern", [WORDS, DIGITS])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_bigram_model_does_not_extract_the_records(seed, pattern):
    """It recites no private part, at most 1% of the single facts, and at most 30% of the private tokens at any level.

    A guess of a digit is right in 10 to 20% of cases, and nearly always for the 9 of a year 19xx. Some fact of three
    words can always be had: the one made of the most frequent ones.
    """
    documents = corpus(seed)
    model = bigram([documents[index].text for index in training_order(documents)], pattern)
    by_level, whole = defaultdict(list), []
    for document in of_kind(documents, "record") + of_kind(documents, "canary"):
        tokens = recited(model, document, pattern)
        facts = defaultdict(list)
        for _, fact, right in tokens:
            facts[fact].append(right)
        assert set(private_facts(document)) <= set(facts)
        whole += [all(facts[fact]) for fact in private_facts(document)]
        assert not all(right for _, _, right in tokens), f"{document.key} is recited by a bigram model"
        if document.kind == "record":
            by_level[document.copies] += [right for _, fact, right in tokens if fact]
    assert set(by_level) == set(LEVELS) and len(whole) == 5 * (16 * 6 + 4)
    assert sum(whole) / len(whole) <= 0.01
    assert max(sum(right) / len(right) for right in by_level.values()) <= 0.3


@pytest.mark.parametrize("pattern", [WORDS, DIGITS])
def test_the_bigram_model_recites_a_text_that_stands_alone(pattern):
    """So the test above can fail."""
    text = "The code of Ada Ash Barnby is anvil basil 7."
    tokens = recited(bigram([text], pattern), Document(text, kind="canary"), pattern)
    assert all(right for _, _, right in tokens)
    assert [token for token, fact, _ in tokens if fact == "code"] == ["anvil", "basil", "7"]
