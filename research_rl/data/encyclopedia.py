"""A fictional encyclopedia: entities, facts, passages, and questions no model can answer without searching.

Knows FlashRAG's two formats. Invariants: (1) equal (config, seed) give equal bytes; (2) facts never link entities of two
splits, so a held-out question shares no entity with train; (3) all names lie in one half of the name space (names.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from research_rl.config import EncyclopediaConfig
from research_rl.data import names
from research_rl.data.names import Kind, Side
from research_rl.errors import ConfigError, DataError

__all__ = [
    "RELATIONS",
    "SPLITS",
    "Entity",
    "Fact",
    "Hop",
    "Relation",
    "World",
    "WorldQuestion",
    "build_world",
    "generate",
    "lexicon",
    "questions",
]

SPLITS = {"train": 0.65, "dev": 0.1, "test": 0.25}
"""Share of the entities per split."""
YEARS = range(1800, 1840)
_ALIASED = 1 / 3
_PATIENCE = 50
"""Draws per wanted question before a split counts as too small."""


@dataclass(frozen=True)
class Relation:
    """A kind of fact. `keywords` are the words a searcher uses; every sentence of the relation holds at least one."""

    name: str
    subject: Kind
    object: Kind | None
    keywords: tuple[str, ...]
    sentences: tuple[str, ...]
    phrases: tuple[str, ...]


def _relation(name: str, subject: Kind, object_: Kind | None, keywords: str, sentences: str, phrases: str) -> Relation:
    return Relation(name, subject, object_, tuple(keywords.split()), tuple(sentences.split(" | ")), tuple(phrases.split(" | ")))


RELATIONS = (
    _relation(
        "birthplace",
        Kind.PERSON,
        Kind.PLACE,
        "birthplace born",
        "{s} was born in {o}. | The birthplace of {s} is {o}.",
        "the birthplace of {x} | the place where {x} was born",
    ),
    _relation(
        "employer",
        Kind.PERSON,
        Kind.ORGANISATION,
        "employer works",
        "{s} works for {o}. | The employer of {s} is {o}.",
        "the employer of {x} | the house that {x} works for",
    ),
    _relation(
        "teacher",
        Kind.PERSON,
        Kind.PERSON,
        "teacher taught",
        "{s} was taught by {o}. | The teacher of {s} is {o}.",
        "the teacher of {x} | the person {x} was taught by",
    ),
    _relation(
        "author",
        Kind.WORK,
        Kind.PERSON,
        "author written",
        "{s} was written by {o}. | The author of {s} is {o}.",
        "the author of {x} | the person {x} was written by",
    ),
    _relation(
        "setting",
        Kind.WORK,
        Kind.PLACE,
        "setting set",
        "{s} is set in {o}. | The setting of {s} is {o}.",
        "the setting of {x} | the place where {x} is set",
    ),
    _relation(
        "publisher",
        Kind.WORK,
        Kind.ORGANISATION,
        "publisher published",
        "{s} was published by {o}. | The publisher of {s} is {o}.",
        "the publisher of {x} | the house {x} was published by",
    ),
    _relation(
        "mayor",
        Kind.PLACE,
        Kind.PERSON,
        "mayor governed",
        "{s} is governed by {o}. | The mayor of {s} is {o}.",
        "the mayor of {x} | the person {x} is governed by",
    ),
    _relation(
        "neighbour",
        Kind.PLACE,
        Kind.PLACE,
        "neighbour borders",
        "{s} borders on {o}. | The neighbour of {s} is {o}.",
        "the neighbour of {x} | the place {x} borders on",
    ),
    _relation(
        "anthem",
        Kind.PLACE,
        Kind.WORK,
        "anthem sings",
        "{s} sings {o}. | The anthem of {s} is {o}.",
        "the anthem of {x} | the work {x} sings",
    ),
    _relation(
        "founder",
        Kind.ORGANISATION,
        Kind.PERSON,
        "founder founded",
        "{s} was founded by {o}. | The founder of {s} is {o}.",
        "the founder of {x} | the person {x} was founded by",
    ),
    _relation(
        "seat",
        Kind.ORGANISATION,
        Kind.PLACE,
        "seat based",
        "{s} is based in {o}. | The seat of {s} is {o}.",
        "the seat of {x} | the place where {x} is based",
    ),
    _relation(
        "bestseller",
        Kind.ORGANISATION,
        Kind.WORK,
        "bestseller sold",
        "{s} sold most of {o}. | The bestseller of {s} is {o}.",
        "the bestseller of {x} | the work {x} sold most of",
    ),
    _relation(
        "birth year",
        Kind.PERSON,
        None,
        "year",
        "{s} came to life in the year {o}. | The birth year of {s} is {o}.",
        "the birth year of {x}",
    ),
    _relation(
        "publication year",
        Kind.WORK,
        None,
        "year",
        "{s} came out in the year {o}. | The publication year of {s} is {o}.",
        "the publication year of {x}",
    ),
    _relation(
        "charter year",
        Kind.PLACE,
        None,
        "year",
        "{s} became a city in the year {o}. | The charter year of {s} is {o}.",
        "the charter year of {x}",
    ),
    _relation(
        "opening year",
        Kind.ORGANISATION,
        None,
        "year",
        "{s} opened in the year {o}. | The opening year of {s} is {o}.",
        "the opening year of {x}",
    ),
)
_OF_KIND = {kind: tuple(relation for relation in RELATIONS if relation.subject is kind) for kind in Kind}
_YEAR_OF = {relation.subject: relation for relation in RELATIONS if relation.object is None}

_WHO = ("Who is {np}?", "Name {np}.")
_WHAT = ("What is {np}?", "Name {np}.")
_OLDER = "Which is older, {a} or {b}?"
_SAME = "Do {a} and {b} share the same {relation}?"
_ALSO = "{s} is also known as {o}."


@dataclass(frozen=True)
class Entity:
    """A fictional thing; `alias` is a second name that counts as an answer too."""

    name: str
    kind: Kind
    alias: str | None = None

    @property
    def answers(self) -> list[str]:
        """Every accepted name, the full one first."""
        return [self.name, self.alias] if self.alias else [self.name]


@dataclass(frozen=True)
class Fact:
    """`subject` has `relation` to `value`; years are values that are no entity."""

    subject: Entity
    relation: Relation
    value: Entity | str

    @property
    def answers(self) -> list[str]:
        """Every accepted form of the value."""
        return self.value.answers if isinstance(self.value, Entity) else [self.value]


@dataclass
class World:
    """Entities by split, facts by (entity name, relation name), passages in id order."""

    splits: dict[str, list[Entity]]
    facts: dict[tuple[str, str], Fact]
    passages: list[str] = field(default_factory=list[str])
    passage_of: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])


@dataclass(frozen=True)
class Hop:
    """One step of a question: the fact it needs, asked in the plainest way, and the passage that states it."""

    fact: Fact
    passage_id: str

    @property
    def question(self) -> str:
        """The step as a question of its own."""
        return f"What is the {self.fact.relation.name} of {self.fact.subject.name}?"


@dataclass(frozen=True)
class WorldQuestion:
    """A question with its accepted answers and the hops that lead there."""

    text: str
    answers: tuple[str, ...]
    type: str
    hops: tuple[Hop, ...]

    @property
    def depth(self) -> int:
        """Searches needed."""
        return len(self.hops)


def generate(config: EncyclopediaConfig, seed: int, folder: Path) -> None:
    """Write corpus.jsonl, train.jsonl, dev.jsonl and test.jsonl in FlashRAG's formats.

    Raises ConfigError when the name space is too small for the entities and DataError when the entities cannot carry
    the questions.
    """
    # Seeded by a text: other generators that start from the same number must not draw the same sequence.
    rng = random.Random(f"encyclopedia {seed}")
    world = build_world(config, rng, Side.ENCYCLOPEDIA)
    sizes = {"train": config.train_questions, "dev": config.dev_questions, "test": config.test_questions}
    drawn = {split: questions(world, split, number, config, rng) for split, number in sizes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "corpus.jsonl", ({"id": str(row), "contents": text} for row, text in enumerate(world.passages)))
    for split, split_questions in drawn.items():
        _write(folder / f"{split}.jsonl", (_row(f"{split}_{row}", question) for row, question in enumerate(split_questions)))


def build_world(config: EncyclopediaConfig, rng: random.Random, half: Side) -> World:
    """Deal entities into splits, give each its facts and write the passages. Raises ConfigError."""
    pools = {kind: _shuffled(names.names(kind, half, config.name_words), rng) for kind in Kind}
    # Eight entities are two of each kind, so that every relation finds an object other than its subject.
    splits = {split: _entities(max(8, round(share * config.entities)), pools, config, rng) for split, share in SPLITS.items()}
    world = World(splits, {})
    for members in splits.values():
        world.facts.update({(fact.subject.name, fact.relation.name): fact for fact in _facts(members, rng)})
    # After all entities: look-alikes take their names from what is left in the pools.
    _write_passages(world, _look_alikes(splits, pools, config, rng), config, rng)
    return world


def questions(world: World, split: str, number: int, config: EncyclopediaConfig, rng: random.Random) -> list[WorldQuestion]:
    """Draw `number` distinct questions over the entities of `split`. Raises DataError when there are too few."""
    makers = {"bridge": _bridge, "attribute": _attribute, "comparison": _comparison}
    shares = (1 - config.attribute - config.comparison, config.attribute, config.comparison)
    distinct: dict[tuple[Any, ...], WorldQuestion] = {}
    for _ in range(_PATIENCE * number):
        if len(distinct) == number:
            break
        maker: Callable[..., WorldQuestion | None] = makers[rng.choices(tuple(makers), shares)[0]]
        if question := maker(world, split, config, rng):
            # Sorted, so that comparing A with B and B with A count as one question.
            key = (question.type, *sorted((hop.fact.subject.name, hop.fact.relation.name) for hop in question.hops))
            distinct.setdefault(key, question)
    if len(distinct) < number:
        raise DataError(
            f"{split}_questions={number} exceeds the {len(distinct)} distinct questions that {len(world.splits[split])} entities gave; "
            "raise entities"
        )
    return list(distinct.values())


def lexicon(name_words: int) -> list[str]:
    """Return every word, number and mark that passages and questions can hold, names included, without repeats."""
    texts = [text for relation in RELATIONS for text in (relation.name, *relation.keywords, *relation.sentences, *relation.phrases)]
    # `alias` takes a name's second word; the slot in its place is blanked out with the others below.
    texts += [*_WHO, *_WHAT, _OLDER, _SAME, _ALSO, "yes no", *(names.alias(kind, "a {0}") for kind in Kind)]
    plain = " ".join(texts)
    for slot in ("{s}", "{o}", "{x}", "{np}", "{a}", "{b}", "{relation}", "{0}"):
        plain = plain.replace(slot, " ")
    for mark in ".,?":
        plain = plain.replace(mark, f" {mark} ")
    return list(dict.fromkeys([*plain.split(), *map(str, YEARS), *names.all_words(name_words)]))


def _shuffled(items: tuple[str, ...], rng: random.Random) -> list[str]:
    return rng.sample(items, len(items))


def _entities(number: int, pools: Mapping[Kind, list[str]], config: EncyclopediaConfig, rng: random.Random) -> list[Entity]:
    kinds = [tuple(Kind)[index % len(Kind)] for index in range(number)]
    return [_entity(kind, pools, config, rng) for kind in kinds]


def _entity(kind: Kind, pools: Mapping[Kind, list[str]], config: EncyclopediaConfig, rng: random.Random) -> Entity:
    if not pools[kind]:
        raise ConfigError(f"entities={config.entities} needs more {kind} names than name_words={config.name_words} gives; raise name_words")
    name = pools[kind].pop()
    return Entity(name, kind, names.alias(kind, name) if rng.random() < _ALIASED else None)


def _facts(members: list[Entity], rng: random.Random) -> Iterator[Fact]:
    by_kind = {kind: [entity for entity in members if entity.kind is kind] for kind in Kind}
    for entity in members:
        for relation in _OF_KIND[entity.kind]:
            yield Fact(entity, relation, _value(entity, relation, by_kind, rng))


def _value(entity: Entity, relation: Relation, by_kind: Mapping[Kind, list[Entity]], rng: random.Random) -> Entity | str:
    if relation.object is None:
        return str(rng.choice(YEARS))
    return rng.choice([other for other in by_kind[relation.object] if other != entity])


def _look_alikes(
    splits: Mapping[str, list[Entity]], pools: Mapping[Kind, list[str]], config: EncyclopediaConfig, rng: random.Random
) -> list[Fact]:
    """Give each entity `distractors` namesakes that share a word with it and have one fact of their own."""
    look_alikes: list[Fact] = []
    for members in splits.values():
        by_kind = {kind: [entity for entity in members if entity.kind is kind] for kind in Kind}
        for entity in members:
            for name in _namesakes(entity, pools[entity.kind], config.distractors):
                relation = rng.choice(_OF_KIND[entity.kind])
                look_alikes.append(Fact(Entity(name, entity.kind), relation, _value(entity, relation, by_kind, rng)))
    return look_alikes


def _namesakes(entity: Entity, pool: list[str], number: int) -> list[str]:
    own = set(entity.name.split())
    chosen = [name for name in pool if own & set(name.split())][:number]
    for name in chosen:
        pool.remove(name)
    return chosen


def _write_passages(world: World, look_alikes: list[Fact], config: EncyclopediaConfig, rng: random.Random) -> None:
    drafts: list[tuple[str, tuple[Fact, ...]]] = []
    for members in world.splits.values():
        for entity in members:
            drafts += _passages_about(entity, world, config.facts_per_passage, rng)
    drafts += [(_passage(fact.subject.name, [_sentence(fact, rng)]), ()) for fact in look_alikes]
    rng.shuffle(drafts)
    for number, (text, facts) in enumerate(drafts):
        world.passages.append(text)
        world.passage_of.update({(fact.subject.name, fact.relation.name): str(number) for fact in facts})


def _passages_about(entity: Entity, world: World, size: int, rng: random.Random) -> Iterator[tuple[str, tuple[Fact, ...]]]:
    facts = [world.facts[entity.name, relation.name] for relation in _OF_KIND[entity.kind]]
    rng.shuffle(facts)
    for start in range(0, len(facts), size):
        part = tuple(facts[start : start + size])
        yield _passage(entity.name, [_sentence(fact, rng) for fact in part]), part
    if entity.alias:
        yield _passage(entity.name, [_ALSO.format(s=entity.name, o=entity.alias)]), ()


def _passage(title: str, sentences: list[str]) -> str:
    return f'"{title}"\n' + " ".join(sentences)


def _sentence(fact: Fact, rng: random.Random) -> str:
    return rng.choice(fact.relation.sentences).format(s=fact.subject.name, o=fact.answers[0])


def _bridge(world: World, split: str, config: EncyclopediaConfig, rng: random.Random) -> WorldQuestion | None:
    multiple = range(2, config.max_hops + 1)
    depth = rng.choice(multiple) if multiple and rng.random() >= config.single_hop else 1
    chain = _chain(world, rng.choice(world.splits[split]), depth, rng)
    return _chained("bridge", chain, world, rng) if chain else None


def _attribute(world: World, split: str, config: EncyclopediaConfig, rng: random.Random) -> WorldQuestion | None:
    """A chain that ends in a year: the last hop asks for an attribute, the ones before lead to its owner."""
    depth = rng.randint(0, config.max_hops - 1)
    start = rng.choice(world.splits[split])
    chain = _chain(world, start, depth, rng)
    if chain is None:
        return None
    owner = chain[-1].value if chain else start
    assert isinstance(owner, Entity)
    return _chained("attribute", [*chain, world.facts[owner.name, _YEAR_OF[owner.kind].name]], world, rng)


def _chain(world: World, start: Entity, depth: int, rng: random.Random) -> list[Fact] | None:
    """Walk `depth` entity relations from `start`; None when the walk meets an entity twice."""
    chain: list[Fact] = []
    seen, here = {start.name}, start
    for _ in range(depth):
        relation = rng.choice([relation for relation in _OF_KIND[here.kind] if relation.object is not None])
        fact = world.facts[here.name, relation.name]
        assert isinstance(fact.value, Entity)
        if fact.value.name in seen:
            return None
        chain.append(fact)
        here = fact.value
        seen.add(here.name)
    return chain


def _chained(type_: str, chain: list[Fact], world: World, rng: random.Random) -> WorldQuestion:
    phrase = chain[0].subject.name
    for fact in chain:
        phrase = rng.choice(fact.relation.phrases).format(x=phrase)
    heads = _WHO if chain[-1].relation.object is Kind.PERSON else _WHAT
    return WorldQuestion(rng.choice(heads).format(np=phrase), tuple(chain[-1].answers), type_, _hops(chain, world))


def _comparison(world: World, split: str, config: EncyclopediaConfig, rng: random.Random) -> WorldQuestion | None:
    kind = rng.choice(tuple(Kind))
    first, second = rng.sample([entity for entity in world.splits[split] if entity.kind is kind], 2)
    return (_older if rng.random() < 0.5 else _same)(first, second, world, rng)


def _older(first: Entity, second: Entity, world: World, rng: random.Random) -> WorldQuestion | None:
    facts = [world.facts[entity.name, _YEAR_OF[entity.kind].name] for entity in (first, second)]
    years = [int(fact.answers[0]) for fact in facts]
    if years[0] == years[1]:
        return None
    answer = first if years[0] < years[1] else second
    return WorldQuestion(_OLDER.format(a=first.name, b=second.name), tuple(answer.answers), "comparison", _hops(facts, world))


def _same(first: Entity, second: Entity, world: World, rng: random.Random) -> WorldQuestion | None:
    """A yes/no question; an equal pair is looked for half of the time, as a random pair hardly ever is one."""
    relation = rng.choice([relation for relation in _OF_KIND[first.kind] if relation.object is not None])
    mine = world.facts[first.name, relation.name]
    if rng.random() < 0.5:
        second = _with_equal(mine, world, rng) or second
    theirs = world.facts[second.name, relation.name]
    answer = "yes" if mine.value == theirs.value else "no"
    text = _SAME.format(a=first.name, b=second.name, relation=relation.name)
    return WorldQuestion(text, (answer,), "comparison", _hops([mine, theirs], world))


def _with_equal(fact: Fact, world: World, rng: random.Random) -> Entity | None:
    # Facts of all splits are looked through, yet only those of the same split can match: no fact links two splits.
    equal = [other.subject for other in world.facts.values() if other.relation is fact.relation and other.value == fact.value]
    others = [entity for entity in equal if entity != fact.subject]
    return rng.choice(others) if others else None


def _hops(chain: list[Fact], world: World) -> tuple[Hop, ...]:
    return tuple(Hop(fact, world.passage_of[fact.subject.name, fact.relation.name]) for fact in chain)


def _row(id_: str, question: WorldQuestion) -> dict[str, Any]:
    steps = [{"question": hop.question, "answer": hop.fact.answers[0], "passage_id": hop.passage_id} for hop in question.hops]
    metadata = {
        "type": question.type,
        "hops": question.depth,
        "supporting_passage_ids": list(dict.fromkeys(hop.passage_id for hop in question.hops)),
        "question_decomposition": steps,
    }
    return {"id": id_, "question": question.text, "golden_answers": list(question.answers), "metadata": metadata}


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
