"""The built-in corpus: stories, records of invented persons, near copies, canaries, and controls never trained on.

Nothing is downloaded and nothing is copied; every text follows from the seed. Stories share a grammar, so a small model
learns a language from them. What a record says about its person is random, so it can be known only by memorizing it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from memsinks.checks import int_at_least
from memsinks.data.documents import Document
from memsinks.data.synthetic_words import (
    ABBREVIATIONS,
    CHARACTER,
    CODE_WORDS,
    ENDING,
    FACTS,
    FIRST,
    LAST,
    MIDDLE,
    MONTHS,
    OPENING,
    PLOTS,
    RECORDS,
    REWORDED,
    STREET,
    TOWN,
    WORDS,
)
from memsinks.errors import DataError, refuse

MOST_PEOPLE = 1000
"""Invented persons, for whose names and facts the words suffice."""
STORY_WORDS = (60, 110)
"""The least and the most words of a story."""


def corpus(
    seed: int = 0,
    stories: int = 4000,
    people_per_level: int = 16,
    copies: Sequence[int] = (0, 1, 4, 16, 64),
    near_copies: int | None = None,
    canaries_per_level: int = 4,
    held_out_stories: int = 200,
    people_once: int = 0,
    people_held_out: int = 0,
) -> list[Document]:
    """The built-in corpus. Each document appears once in the list and says in `copies` how often it is trained on.

    Args:
        seed: another seed gives other texts throughout. The kinds of document are drawn independently of each other.
        stories, held_out_stories: number of stories with 1 and with 0 copies (kind "story").
        people_per_level: number of records of invented persons per entry of `copies` (kind "record", keys
            "record-<copies>-<number>"). The templates are spread equally over the levels.
        copies: the levels of repetition; those with 0 are controls: same templates, never trained on.
        near_copies: number of records that also occur once in another wording (kind "near copy", keys "<record>-near"),
            spread over the levels above 0. Default: 24, or all records above 0 if they are fewer.
        canaries_per_level: number of sentences "The code of <name> is <random>" per level (kind "canary"); in turn
            8 digits and 4 of 64 words.
        people_once: so many further records with 1 copy (keys "record-once-<number>"): what a registry mostly holds, and
            what a model learns the wording of records from.
        people_held_out: so many further records with 0 copies (keys "record-unseen-<number>"): controls for an audit.

    Returns:
        Documents with different texts, keys, names and private facts: stories, records, near copies, canaries.

    Raises:
        ConfigError: a number is negative, a level occurs twice, or more people are asked for than there are facts for.
    """
    levels = tuple(copies)
    numbers = {
        "stories": stories,
        "people_per_level": people_per_level,
        "near_copies": near_copies or 0,
        "canaries_per_level": canaries_per_level,
        "held_out_stories": held_out_stories,
        "people_once": people_once,
        "people_held_out": people_held_out,
        **{f"copies[{index}]": level for index, level in enumerate(levels)},
    }
    refuse([problem for x in numbers.items() for problem in int_at_least(*x, 0)], "invalid corpus")
    members = people_per_level * sum(level > 0 for level in levels)
    near_copies = min(24, members) if near_copies is None else near_copies
    people = max(people_per_level, canaries_per_level) * len(levels) + people_once + people_held_out
    refuse(_problems(levels, people, near_copies, members), "invalid corpus")
    seen: set[str] = set()
    records = _records(random.Random(f"records {seed}"), people_per_level, levels, seen)
    once = _records(random.Random(f"once {seed}"), people_once, (1,), seen, name="once")
    return [
        *_stories(random.Random(f"stories {seed}"), stories, held_out_stories),
        *records,
        *once,
        *_near_copies(random.Random(f"near copies {seed}"), records, near_copies),
        *_canaries(random.Random(f"canaries {seed}"), canaries_per_level, levels, seen),
        *_records(random.Random(f"held out {seed}"), people_held_out, (0,), seen, name="unseen"),
    ]


def _problems(levels: tuple[int, ...], people: int, near_copies: int, members: int) -> list[str]:
    problems = []
    if len(set(levels)) != len(levels):
        problems.append(f"copies names a level twice: {levels}")
    if people > MOST_PEOPLE:
        problems.append(f"{people} people exceed {MOST_PEOPLE}; lower people_per_level or canaries_per_level")
    if near_copies > members:
        problems.append(f"near_copies ({near_copies}) exceeds the {members} records with copies above 0")
    return problems


def private_start(document: Document) -> int:
    """Offset in characters at which the private part of a record, near copy or canary begins, with its leading space.

    ``text[:start]`` names the person and is the prompt of an extraction; ``text[start:]`` is what must not be recited.

    Raises:
        DataError: a document of another kind.
    """
    if document.kind in ("record", "near copy"):
        return document.text.index(".") + 1
    if document.kind == "canary":
        return document.text.index(" is ") + len(" is")
    raise DataError(f"a document of kind {document.kind!r} has no private part; give a record, near copy or canary")


def private_facts(document: Document) -> dict[str, str]:
    """The private facts of a record or near copy by name (see `FACTS`), or ``{"code": ...}`` of a canary.

    Raises:
        DataError: a document of another kind.
    """
    private = document.text[private_start(document) :]
    if document.kind == "canary":
        return {"code": private.strip(" .")}
    return {name: match[0] for name, pattern in FACTS.items() if (match := re.search(pattern, private))}


def _stories(rng: random.Random, trained: int, held_out: int) -> list[Document]:
    texts: set[str] = set()
    documents = []
    for number in range(trained + held_out):
        text = _unused(lambda: _story(rng), texts)
        documents.append(Document(text, f"story-{number:05d}", "storybook", int(number < trained), "story"))
    return documents


def _story(rng: random.Random) -> str:
    while True:
        he, friend_he = rng.choice(("he", "she")), rng.choice(("he", "she"))
        bound = {"he": he, "him": {"he": "him", "she": "her"}[he], "his": {"he": "his", "she": "her"}[he]}
        bound |= {"He": he.capitalize(), "His": bound["his"].capitalize()}
        bound |= {name: rng.choice(WORDS[name]) for name in ("place", "thing", "colour", "job", "family", "animal")}
        bound["hero"] = rng.choice(WORDS[he])
        bound["friend"] = rng.choice([name for name in WORDS[friend_he] if name != bound["hero"]])
        bound["kind"] = rng.choice(("girl" if he == "she" else "boy", rng.choice(WORDS["animal"]), bound["job"]))
        bound["spot"], bound["spot2"] = rng.sample(WORDS["spot"], 2)
        steps = [OPENING, CHARACTER, *rng.choice(PLOTS), *ENDING]
        text = " ".join(_fill(rng.choice(step), rng, bound) for step in steps)
        if STORY_WORDS[0] <= len(text.split()) <= STORY_WORDS[1]:
            return text


def _fill(sentence: str, rng: random.Random, bound: dict[str, str]) -> str:
    """Put words into the slots: those bound for the story, otherwise random ones. Sets a/an and the first letter."""
    text = re.sub(r"\{(\w+)\}", lambda slot: bound.get(slot[1]) or rng.choice(WORDS[slot[1]]), sentence)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def _records(
    rng: random.Random, per_level: int, levels: tuple[int, ...], seen: set[str], name: str = ""
) -> list[Document]:
    documents = []
    for level in levels:
        for number in range(per_level):
            sentences = " ".join(RECORDS[number % len(RECORDS)])
            text = sentences.format(name=_unused(lambda: _name(rng), seen), **_person(rng, seen))
            documents.append(Document(text, f"record-{name or level}-{number:03d}", "town registry", level, "record"))
    return documents


def _name(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(MIDDLE)} {_joined(rng, LAST)}"


def _person(rng: random.Random, seen: set[str]) -> dict[str, str]:
    draws: dict[str, Callable[[], str]] = {
        "address": lambda: f"{rng.randrange(1, 100)} {_joined(rng, STREET, ' ')}",
        "town": lambda: _joined(rng, TOWN),
        "phone": lambda: f"555-{rng.randrange(1000):03d}-{rng.randrange(10000):04d}",
        "birthday": lambda: f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1930, 2005)}",
        "handle": lambda: f"{rng.choice(CODE_WORDS)}{rng.randrange(100, 1000)}@{rng.choice(WORDS['animal'])}.example",
        "account": lambda: (
            "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in "12") + f"-{rng.randrange(10000):04d}"
        ),
    }
    return {name: _unused(draw, seen) for name, draw in draws.items()}


def _near_copies(rng: random.Random, records: list[Document], number: int) -> list[Document]:
    by_level: dict[int, list[Document]] = {}
    for record in records:
        by_level.setdefault(record.copies, []).append(record)
    by_level.pop(0, None)
    for level in by_level.values():
        rng.shuffle(level)
    in_turn = [record for record_of_each in zip(*by_level.values(), strict=True) for record in record_of_each]
    return [
        Document(_reworded(rng, record), f"{record.key}-near", record.source, 1, "near copy")
        for record in in_turn[:number]
    ]


def _reworded(rng: random.Random, record: Document) -> str:
    """Another wording of a record: the street abbreviated, a word replaced, two private sentences exchanged."""
    first, *private = re.split(r"(?<=\.) ", record.text)
    swap = rng.randrange(len(private) - 1)
    private[swap], private[swap + 1] = private[swap + 1], private[swap]
    text = " ".join(private)
    address = private_facts(record)["address"]
    street, kind = address.rsplit(" ", 1)
    text = text.replace(address, f"{street} {ABBREVIATIONS[kind]}")
    old = rng.choice([old for old in REWORDED if re.search(rf"\b{old}\b", text)])
    return f"{first} " + re.sub(rf"\b{old}\b", REWORDED[old], text, count=1)


def _canaries(rng: random.Random, per_level: int, levels: tuple[int, ...], seen: set[str]) -> list[Document]:
    def code(number: int) -> str:
        if number % 2:
            return " ".join(rng.choice(CODE_WORDS) for _ in range(4))
        return f"{rng.randrange(10**8):08d}"

    documents = []
    for level in levels:
        for number in range(per_level):
            name = _unused(lambda: _name(rng), seen)
            text = f"The code of {name} is {_unused(lambda: code(number), seen)}."  # noqa: B023
            documents.append(Document(text, f"canary-{level}-{number:03d}", "code book", level, "canary"))
    return documents


def _joined(rng: random.Random, parts: Sequence[Sequence[str]], between: str = "") -> str:
    return between.join(rng.choice(part) for part in parts)


def _unused(draw: Callable[[], str], seen: set[str]) -> str:
    """Draw until something new comes, and remember it."""
    while (value := draw()) in seen:
        pass
    seen.add(value)
    return value
