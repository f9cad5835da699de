"""Make the embedded default from one seed: a small world, a GPT-2 trained on sentences about it,
and questions.

    python -m fedsp_mpi.resources.make_embedded DEST

The world: 160 invented people, each with a home, a job, a pet, ...: 1280 facts. The model reads
plain sentences ("The job of Mobu , they say , is baker .") for about two minutes: long enough to
learn the language and which things are homes, jobs or pets, too short to learn who has which. A
question shows four facts of one person and asks for one of them in words that the model never read
("Question: Which profession goes with Mobu?"). Without a prompt that tells it what these words
mean, it can only guess.

All randomness is keyed by SEED; on one machine the files come out bit for bit the same. Nothing
imports this file at run time, so it may use torch, transformers and tokenizers directly.
"""

from __future__ import annotations

import gzip
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fedsp_mpi import rng

SEED = 2311
NUM_PEOPLE = 160
NUM_VALUES = 16
SPLITS = {"test": 600, "validation": 120, "train": 560}
QUESTION = "Question: Which {noun} goes with {person}?\nAnswer:"
PAD = "<pad>"
EOS = "<eos>"
UNKNOWN = "<unk>"
SPECIAL = (PAD, EOS, UNKNOWN)
PAD_ID = SPECIAL.index(PAD)


# For each relation, a line with the noun and the verb of the sentences and the noun of the
# questions; then its NUM_VALUES values.
RELATIONS_TABLE = """
home, lives in, village
Abren Calm Dorrow Ester Fenn Garth Holm Ister Jorv Kell Lorn Marn Nesk Orth Pell Quern

job, works as a, profession
baker miller weaver potter smith farmer fisher carpenter tailor shepherd mason barber cook
painter sailor hunter

pet, keeps a, companion
cat dog goat crow otter ferret pony rabbit turtle parrot hedgehog falcon mouse donkey lizard
goose

dish, cooks, meal
soup bread cheese porridge stew pie dumplings noodles omelette salad pancakes beans rice pudding
jam waffles

colour, wears, paint
red blue green yellow purple orange white black brown grey pink silver golden violet crimson
turquoise

instrument, plays the, music
flute drum harp fiddle lute horn bell whistle trumpet banjo oboe cello organ lyre zither tuba

tree, sits under the, shade
oak elm birch pine cedar maple willow ash beech larch alder poplar spruce hazel rowan linden

song, sings of, poem
dawn noon dusk midnight morning evening twilight moonlight harvest frost thaw rain snow fog
storm sunshine
"""
FORMS = (
    "{person} {verb}{aside} {value} .",
    "The {noun} of {person}{aside} is {value} .",
    "{person} has{aside} as {noun} {value} .",
    "As for {person} , the {noun} is{aside} {value} .",
    "For {noun} {person}{aside} has {value} .",
    "{person} - {noun} -{aside} {value} .",
    "{noun} of {person}{aside} ; {value} .",
    "When they speak of the {noun} of {person}{aside} , they say {value} .",
)
# Most sentences have no aside.
ASIDES = [""] * 6 + [
    " ,",
    " , as they say ,",
    " now",
    " , old and kind ,",
    " still , they say ,",
    " , it is said ,",
    " , so they tell ,",
    " ever",
    " , as all know ,",
    " and always has ,",
]


@dataclass(frozen=True)
class Relation:
    """A property of a person.

    Attributes:
        noun: its name in sentences.
        verb: between person and value in sentences.
        question_noun: its name in questions; no sentence has this word.
        values: what it can be, one token each; none belongs to two relations.
    """

    noun: str
    verb: str
    question_noun: str
    values: list[str]


class Row(TypedDict):
    """A question of the task, as the file of a split has it."""

    context: str
    choices: list[str]
    label: int


def read_relations() -> list[Relation]:
    """Parse RELATIONS_TABLE."""
    relations = []
    for block in RELATIONS_TABLE.strip().split("\n\n"):
        head, values = block.split("\n", maxsplit=1)
        noun, verb, question_noun = head.split(", ")
        relations.append(Relation(noun, verb, question_noun, values.split()))
    return relations


RELATIONS = read_relations()


def source(purpose: str) -> random.Random:
    """Return a new generator for a purpose, seeded by it and SEED."""
    return random.Random(rng.key(SEED, purpose))


def invent_people(draw: random.Random) -> list[str]:
    """Make up NUM_PEOPLE different names of two syllables."""
    onsets = [*"bdfgklmnprstvz", "br", "dr", "kr", "tr", "st", "gl"]
    vowels = [*"aeiou", "ai", "ei", "ou"]
    names: dict[str, None] = {}  # a set that keeps the order
    while len(names) < NUM_PEOPLE:
        syllables = [draw.choice(onsets) + draw.choice(vowels) for _ in range(2)]
        ending = draw.choice(["", "n", "r", "l", "s", "m", "th"])
        names["".join(syllables).capitalize() + ending] = None
    return list(names)


@dataclass(frozen=True)
class World:
    """The people, and what is true of them.

    Attributes:
        people: their names.
        facts: facts[person][noun] = value; all values of a noun are equally frequent.
    """

    people: list[str]
    facts: dict[str, dict[str, str]]

    @classmethod
    def make(cls) -> World:
        """Make the world of SEED; every call gives the same one."""
        draw = source("world")
        people = invent_people(draw)
        facts: dict[str, dict[str, str]] = {person: {} for person in people}
        for relation in RELATIONS:
            values = [relation.values[i % NUM_VALUES] for i in range(NUM_PEOPLE)]
            draw.shuffle(values)
            for person, value in zip(people, values):
                facts[person][relation.noun] = value
        return cls(people, facts)

    def sentence(self, draw: random.Random) -> str:
        """Return one true sentence, with a blank in front."""
        person = draw.choice(self.people)
        relation = draw.choice(RELATIONS)
        return " " + draw.choice(FORMS).format(
            person=person,
            noun=relation.noun,
            verb=relation.verb,
            aside=draw.choice(ASIDES),
            value=self.facts[person][relation.noun],
        )

    def question(self, draw: random.Random, person: str, relation: Relation) -> Row:
        """Return one question of the task.

        The wrong choices are other facts of the same person.

        Args:
            draw: of wrong choices and of the choices' order.
            person: who is asked about.
            relation: what is asked for.
        """
        facts = self.facts[person]
        right = facts[relation.noun]
        choices = [right, *draw.sample([value for value in facts.values() if value != right], 3)]
        draw.shuffle(choices)
        context = QUESTION.format(noun=relation.question_noun, person=person)
        return {"context": context, "choices": choices, "label": choices.index(right)}

    def splits(self) -> dict[str, list[Row]]:
        """Return the questions of each split; every fact is asked for once, in one of them."""
        draw = source("questions")
        facts = [(person, relation) for person in self.people for relation in RELATIONS]
        draw.shuffle(facts)
        rows = iter([self.question(draw, person, relation) for person, relation in facts])
        return {name: [next(rows) for _ in range(size)] for name, size in SPLITS.items()}


def write_data(world: World, folder: Path) -> None:
    """Write <split>.jsonl.gz, without a time of writing, so that equal rows give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in world.splits().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def make_tokenizer(world: World) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Make a tokenizer with one token for each word, its leading blank included.

    Returns:
        The tokenizer, and the ids of the tokens that no sentence has.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def words(texts: list[str]) -> set[str]:
        return {word for text in texts for word, _ in split.pre_tokenize_str(text)}

    draw = source("tokenizer")
    in_sentences = words([world.sentence(draw) for _ in range(20_000)])
    questions = [
        QUESTION.format(noun=relation.question_noun, person=world.people[0])
        for relation in RELATIONS
    ]
    only_in_questions = words(questions) - in_sentences
    vocabulary = [*SPECIAL, *sorted(only_in_questions), *sorted(in_sentences)]
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    core.pre_tokenizer = split
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=Training.num_positions,
        model_input_names=["input_ids", "attention_mask"],
    )
    return tokenizer, list(range(len(SPECIAL) + len(only_in_questions)))


@dataclass(frozen=True)
class Training:
    """The sizes of the model and of its training.

    One sentence is one row: a sentence starts at position 0, as a question does.

    Attributes:
        num_layers: depth.
        hidden: width of the hidden states.
        num_heads: attention heads.
        num_positions: longest text in tokens.
        num_steps: optimizer steps.
        num_tied: steps at the start in which all layers stay equal; then each goes its own way
            (progressive stacking). It keeps the layers alike, so that one of them can stand in for
            all in an auxiliary model.
        batch: sentences of a step.
        rate: highest learning rate.
        warmup: steps until that rate is reached.
        weight_decay: of AdamW.
        unheard: share of the words that are replaced by unknown ones, so that the model learns to
            cope with words it never met.
        unheard_std: an unknown word is a new N(0, std^2) vector each time. Words of no sentence
            keep the same one.
    """

    num_layers: int = 3
    hidden: int = 128
    num_heads: int = 4
    num_positions: int = 128
    num_steps: int = 1000
    num_tied: int = 500
    batch: int = 64
    rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    unheard: float = 0.1
    unheard_std: float = 0.05


def make_model(
    tokenizer: PreTrainedTokenizerFast, how: Training, unread: list[int]
) -> GPT2LMHeadModel:
    """Make an untrained GPT-2 with equal layers.

    Args:
        tokenizer: of the model.
        how: the sizes.
        unread: ids of the words of no sentence, which get random vectors.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=how.num_positions,
        n_embd=how.hidden,
        n_layer=how.num_layers,
        n_head=how.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h[1:]:
        block.load_state_dict(model.transformer.h[0].state_dict())
    with torch.no_grad():
        model.transformer.wte.weight[unread] = (
            torch.randn(len(unread), how.hidden) * how.unheard_std
        )
    return model


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, how: Training
) -> Iterator[torch.Tensor]:
    """Yield the sentences of every step.

    Args:
        world: that the sentences are about.
        tokenizer: of the model.
        how: number of steps and of sentences in one.

    Yields:
        Token ids, int64 [batch, longest], padded on the right.
    """
    draw = source("sentences")
    for _ in range(how.num_steps):
        rows = tokenizer([world.sentence(draw) for _ in range(how.batch)])["input_ids"]
        longest = max(map(len, rows))
        yield torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])


def loss_of(model: GPT2LMHeadModel, ids: torch.Tensor, how: Training) -> torch.Tensor:
    """Return the mean next-token cross entropy, a scalar in nats.

    Args:
        model: is trained.
        ids: int64 [batch, length].
        how: the share of words that are replaced by unknown ones.
    """
    words = model.transformer.wte(ids)
    is_unheard = torch.rand(ids.shape) < how.unheard
    vectors = torch.where(is_unheard[..., None], torch.randn(words.shape) * how.unheard_std, words)
    labels = ids.masked_fill(ids.eq(PAD_ID), -100)
    return model(inputs_embeds=vectors, labels=labels).loss


def tie_gradients(model: GPT2LMHeadModel) -> None:
    """Give all layers the mean of their gradients, which keeps equal layers equal."""
    for counterparts in zip(*(block.parameters() for block in model.transformer.h)):
        mean = torch.stack([parameter.grad for parameter in counterparts]).mean(0)
        for parameter in counterparts:
            parameter.grad.copy_(mean)


def train(
    world: World, tokenizer: PreTrainedTokenizerFast, unread: list[int], *, how: Training
) -> GPT2LMHeadModel:
    """Train a model from SEED, with a short warm-up and a cosine to zero.

    Args:
        world: that the sentences are about.
        tokenizer: of the model.
        unread: ids of the words of no sentence, whose vectors do not move.
        how: sizes and schedule.

    Returns:
        The trained model, in evaluation mode.
    """
    torch.manual_seed(rng.key(SEED, "model"))
    model = make_model(tokenizer, how, unread)
    unread_vectors = model.transformer.wte.weight[unread].detach().clone()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=how.rate, weight_decay=how.weight_decay, betas=(0.9, 0.98)
    )
    for step, ids in enumerate(batches(world, tokenizer, how)):
        warmup = min(1.0, (step + 1) / how.warmup)
        factor = warmup * 0.5 * (1 + math.cos(math.pi * step / how.num_steps))
        optimizer.param_groups[0]["lr"] = how.rate * factor
        optimizer.zero_grad()
        loss_of(model, ids, how).backward()
        if step < how.num_tied:
            tie_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.transformer.wte.weight[unread] = unread_vectors
    return model.eval()


def main(destination: str, how: Training = Training()) -> None:
    """Write DEST/data and DEST/model."""
    torch.set_num_threads(1)  # their number decides the order of sums
    world = World.make()
    write_data(world, Path(destination) / "data")
    tokenizer, unread = make_tokenizer(world)
    model = train(world, tokenizer, unread, how=how)
    tokenizer.save_pretrained(Path(destination) / "model")
    model.save_pretrained(Path(destination) / "model")


if __name__ == "__main__":
    main(sys.argv[1])
