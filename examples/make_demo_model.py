"""Make the model and the data of `finetune demo`: a small Llama, pretrained here on invented people, and instructions.

    python examples/make_demo_model.py --output_dir my-demo

writes `model/`, `train.jsonl` and `test.jsonl`, the files shipped in `src/finetune/demo/`. Everything is drawn from
the seeds below, so the same versions on the same kind of machine give the same files.

The pretraining rows ask about one fact ("Where does Ada Wood live?"), ask to rewrite, repeat, quote and add. None of
them asks for JSON or contains any: that is the skill which the demonstration teaches. No prompt of the test rows is
among the rows to learn from: the words are known, who does what where is not.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

WORDS = {
    "FIRST": """
        Ada Alan Alice Amina Anna Arthur Bella Ben Bianca Carla Carlos Cecil Chloe Clara Daniel David Diana Dora
        Edgar Elena Elias Emil Emma Eva Farid Fatima Felix Flora Frank Freya George Gina Grace Greta Hanna
        Harald Hector Helen Hugo Ida Igor Irene Iris Ivan Jack Jana Jasmin Joel Jonas Judith Julia Kamal Karin
        Karl Kenji Lara Laura Leo Lidia Linus Lucia Luis Magda Marco Maria Marta Martin Maya Mia Mona Nadia
        Nelly Nina Noah Nora Olga Oscar Otto Pablo Paula Peter Petra Rachel Ravi Rita Robert Rosa Ruth Samir
        Sara Simon Stella Tara Theo Thomas Tina Tomas Ursula Vera Victor Viola Yara Yusuf Zoe
    """,
    "LAST": """
        Abbott Adler Alvarez Andersen Barros Becker Bell Bergman Blake Borg Brandt Brown Calder Carter Castro
        Chen Clarke Conti Costa Cruz Dahl Dalton Diaz Dixon Duarte Dunn Eriksen Evans Farrell Flores Foster Fox
        Fuchs Garcia Gibson Gomez Grant Greco Haas Haddad Hall Hansen Hart Hayes Hill Holm Horvat Hughes Ito
        Jansen Jensen Kaya Keller Khan Klein Kovac Lang Larsen Lewis Lind Lopez Lund Marsh Mendes Meyer Moreau
        Morris Murphy Nagy Nash Nolan Novak Okafor Olsen Ortiz Park Parker Patel Perez Petrov Pinto Quinn Ramos
        Reed Reyes Rossi Sato Schulz Shah Silva Singh Stone Suzuki Tanaka Torres Vance Vega Vidal Vogel Walsh
        Ward Weber Wolf Wood Zeller
    """,
    "CITIES": """
        Accra Ankara Athens Austin Baku Bergen Berlin Bern Bogota Boston Bristol Brno Cairo Calgary Cardiff
        Chicago Cork Dakar Dallas Delhi Denver Dublin Durban Essen Florence Geneva Genoa Ghent Glasgow Graz
        Hamburg Hanoi Havana Helsinki Houston Istanbul Izmir Jakarta Kigali Kobe Krakow Kyoto Lagos Leeds
        Leipzig Lima Lisbon London Lyon Madrid Malmo Manila Miami Milan Minsk Monaco Montreal Mumbai Munich
        Nairobi Nantes Naples Oslo Ottawa Oxford Palermo Paris Perth Porto Prague Quito Riga Rome Rotterdam
        Salzburg Santiago Seattle Seoul Seville Sofia Split Sydney Tallinn Tampere Tokyo Toronto Toulouse Tunis
        Turin Utrecht Vienna Vilnius Warsaw Wellington York Zagreb Zurich
    """,
    "JOBS": """
        actor architect artist baker banker barber biologist bookseller builder butcher captain carpenter
        cashier chef chemist cleaner clerk coach composer cook curator dancer dentist designer detective diver
        doctor driver editor electrician engineer farmer firefighter fisher florist gardener geologist glazier
        guard guide hunter jeweller journalist judge lawyer librarian locksmith machinist mason mechanic
        merchant midwife miner musician nurse optician painter pharmacist photographer physicist pilot plumber
        poet porter potter printer professor programmer reporter roofer sailor sculptor secretary singer soldier
        student surgeon tailor teacher translator vet waiter weaver welder writer
    """,
}
FIRST, LAST, CITIES, JOBS = (text.split() for text in WORDS.values())
SENTENCES = [
    "{name} is {a_job} from {city}. {He} is {age} years old.",
    "{name}, {age}, lives in {city} and works as {a_job}.",
    "At the age of {age}, {name} moved to {city} to work as {a_job}.",
    "In {city} there is {a_job} called {name}, who is {age}.",
    "My neighbour {name} is {age} years old. {He} works as {a_job} in {city}.",
    "{name} has lived in {city} for years. At {age}, {he} is still {a_job}.",
    "The {job} {name} turned {age} last week and still lives in {city}.",
    "We met {name} in {city}. {He} is {a_job} and {age} years old.",
    "{name} was born {age} years ago and is now {a_job} in {city}.",
    "Do you know {name}? {He} is the {job} from {city} who just turned {age}.",
]
QUESTIONS = [
    ("Where does {name} live?", "city", "{name} lives in {city}."),
    ("Which city is named?", "city", "The city is {city}."),
    ("What is the job of {name}?", "job", "{name} is {a_job}."),
    ("What does {name} do for a living?", "job", "{name} works as {a_job}."),
    ("How old is {name}?", "age", "{name} is {age} years old."),
    ("Who is this about?", "name", "This is about {name}."),
    ("Who works as {a_job}?", "name", "{name} works as {a_job}."),
    ("Who lives in {city}?", "name", "{name} lives in {city}."),
]
OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("old", "young"),
    ("fast", "slow"),
    ("high", "low"),
    ("dark", "light"),
    ("wet", "dry"),
    ("early", "late"),
    ("full", "empty"),
    ("near", "far"),
    ("hard", "soft"),
    ("long", "short"),
    ("open", "closed"),
    ("rich", "poor"),
    ("sweet", "sour"),
    ("thick", "thin"),
]
TASK = "Turn this into a JSON record.\n"

SPECIAL = {"pad_token": "<|pad|>", "eos_token": "<|end|>"}
ROLES = ["<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{{ message['content'] }}<|end|>{% endgeneration %}{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Person = dict[str, Any]


def draw_person(draw: random.Random) -> Person:
    """Returns an invented person."""
    job, pronoun = draw.choice(JOBS), draw.choice(["he", "she"])
    return {
        "name": f"{draw.choice(FIRST)} {draw.choice(LAST)}",
        "age": draw.randint(18, 79),
        "city": draw.choice(CITIES),
        "job": job,
        "a_job": f"{'an' if job[0] in 'aeiou' else 'a'} {job}",
        "he": pronoun,
        "He": pronoun.capitalize(),
    }


def describe(draw: random.Random, person: Person) -> str:
    """Returns one sentence that tells all four facts."""
    return SENTENCES[draw.randrange(len(SENTENCES))].format(**person)


def pretraining_row(draw: random.Random) -> tuple[str, str]:
    """Returns an instruction and its answer; no JSON."""
    kind = draw.random()
    if kind < 0.45:
        return _question(draw)
    if kind < 0.65:
        person = draw_person(draw)
        first, second = draw.sample(SENTENCES, 2)
        return f"Rewrite the sentence.\n{first.format(**person)}", second.format(**person)
    if kind < 0.78:
        return _words(draw)
    if kind < 0.9:
        one, two = draw_person(draw), draw_person(draw)
        question, key, _ = draw.choice([QUESTIONS[index] for index in (0, 2, 4)])
        asked = draw.choice([one, two])
        facts = f"{describe(draw, one)} {describe(draw, two)}"
        return f"{facts}\n{question.format(**asked)} Answer briefly.", str(asked[key])
    if kind < 0.95:
        pair = list(draw.choice(OPPOSITES))
        draw.shuffle(pair)
        return f"What is the opposite of {pair[0]}?", f"The opposite of {pair[0]} is {pair[1]}."
    one, two = draw.randint(0, 20), draw.randint(0, 20)
    return f"What is {one} plus {two}?", f"{one} plus {two} is {one + two}."


def _question(draw: random.Random) -> tuple[str, str]:
    person = draw_person(draw)
    sentence = describe(draw, person)
    question, key, answer = draw.choice(QUESTIONS)
    question, answer = question.format(**person), answer.format(**person)
    style = draw.random()
    if style < 0.6:
        short = str(person[key])
        question += " Answer briefly." if style < 0.3 else " Answer in quotes."
        answer = short if style < 0.3 else f'"{short}"'
    return (f"{sentence}\n{question}" if draw.random() < 0.6 else f"{question}\n{sentence}"), answer


def _words(draw: random.Random) -> tuple[str, str]:
    words = [draw.choice(draw.choice([FIRST, LAST, CITIES, JOBS])) for _ in range(draw.randint(2, 5))]
    listed = ", ".join(words)
    style = draw.random()
    if style < 0.5:
        return f"Put each word in quotes.\n{listed}", ", ".join(f'"{word}"' for word in words)
    if style < 0.75:
        return f"Repeat the list.\n{listed}", listed
    return f"Which word comes first?\n{listed}", words[0]


def target_row(draw: random.Random) -> tuple[str, str]:
    """Returns a row of the skill that the demonstration teaches."""
    person = draw_person(draw)
    record = {key: person[key] for key in ("name", "age", "city", "job")}
    return TASK + describe(draw, person), json.dumps(record)


def make_tokenizer(vocabulary: int) -> Any:
    """Returns a byte-level BPE tokenizer with a chat template; it has seen both kinds of rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    rows = [pretraining_row(draw) for _ in range(20_000)] + [target_row(draw) for _ in range(2_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(row) for row in rows), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **SPECIAL, additional_special_tokens=ROLES, model_max_length=512
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


class PretrainingText:
    """A dataset of `length` stretches of 128 tokens: rows one after the other, made from the stretch's own seed."""

    def __init__(self, tokenizer: Any, length: int, seed: int) -> None:
        self.tokenizer, self.length, self.seed = tokenizer, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        draw, ids = random.Random(f"{self.seed}-{index}"), []
        while len(ids) < 128:
            question, answer = pretraining_row(draw)
            text = f"<|user|>{question}<|end|><|assistant|>{answer}<|end|>"
            ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_ids": ids[:128], "labels": ids[:128]}


def pretrain(options: argparse.Namespace, tokenizer: Any) -> Any:
    """Returns the pretrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from finetune import Trainer, TrainingArguments

    set_seed(options.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    args = TrainingArguments(
        str(options.output_dir / "pretraining"),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        adam_beta2=0.98,
        weight_decay=0.01,
        logging_steps=100,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        use_cpu=True,
        seed=options.seed,
    )
    text: Any = PretrainingText(tokenizer, 16 * options.steps, options.seed)
    trainer = Trainer(model=model, args=args, train_dataset=text)
    trainer.train(resume_from_checkpoint="auto")
    return trainer.model


def write_rows(path: Path, seed: int, number: int, without: set[str]) -> set[str]:
    """Writes `number` rows about people that are not in `without`, and returns their prompts."""
    draw, prompts = random.Random(seed), set[str]()
    with path.open("w", encoding="utf-8") as file:
        while len(prompts) < number:
            prompt, answer = target_row(draw)
            if prompt in prompts or prompt in without:
                continue
            prompts.add(prompt)
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            file.write(json.dumps(row) + "\n")
    return prompts


def main() -> None:
    """Writes the files."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-model"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the last bit of the weights, depends on the number of threads
    options.output_dir.mkdir(parents=True, exist_ok=True)
    train = write_rows(options.output_dir / "train.jsonl", 1, 2000, without=set())
    write_rows(options.output_dir / "test.jsonl", 2, 200, without=train)
    tokenizer = make_tokenizer(vocabulary=1536)
    model = pretrain(options, tokenizer)
    # Half the size, and the weights are exact again when the demonstration loads them as float32.
    model.bfloat16().save_pretrained(options.output_dir / "model")
    tokenizer.save_pretrained(options.output_dir / "model")


if __name__ == "__main__":
    main()
