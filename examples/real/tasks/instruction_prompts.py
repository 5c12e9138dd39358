"""Prompts that say what form an answer must have, and the check of it: the verifiable instructions of IFEval
(arXiv 2311.07911), with prompts of our own, so that they need no hub.

16 questions times 20 instructions, one instruction a prompt. The checks are the harness's own, those that need no
downloaded sentence splitter.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset


@dataclass(frozen=True)
class Topic:
    """A question with an answer of a few sentences."""

    question: str
    words: tuple[str, str]
    """Words that may well be in an answer."""
    obvious: tuple[str, str]
    """Words that are in most answers."""


TOPICS = (
    Topic("Why is the sky blue?", ("air", "wave"), ("scatter", "sunlight")),
    Topic("How does a bicycle stay upright?", ("speed", "rider"), ("balance", "wheel")),
    Topic("What should I pack for a week at the sea?", ("towel", "book"), ("sunscreen", "clothes")),
    Topic("Describe a market in the early morning.", ("bread", "noise"), ("fresh", "people")),
    Topic("Explain to a child what a bank does.", ("coin", "trust"), ("money", "save")),
    Topic("Write about a dog that is afraid of rain.", ("door", "blanket"), ("wet", "storm")),
    Topic("How do I learn to cook?", ("soup", "mistake"), ("recipe", "ingredients")),
    Topic("What is a library good for?", ("quiet", "card"), ("books", "read")),
    Topic("Recommend a way to spend a rainy Sunday.", ("tea", "window"), ("movie", "relax")),
    Topic("Why do leaves fall in autumn?", ("cold", "branch"), ("tree", "chlorophyll")),
    Topic("Write a letter to a neighbour about a loud party.", ("sleep", "kind"), ("noise", "music")),
    Topic("How does a refrigerator work?", ("pump", "door"), ("heat", "cool")),
    Topic("What makes a good teacher?", ("question", "time"), ("students", "patience")),
    Topic("Describe a train journey through mountains.", ("tunnel", "snow"), ("view", "beautiful")),
    Topic("How can a town save water?", ("garden", "pipe"), ("leaks", "reduce")),
    Topic("Tell the story of a lost key.", ("pocket", "stairs"), ("found", "search")),
)


def instructions(topic: Topic, number: int) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Of the topic with that number: name and arguments in the harness, and the sentence that asks for it."""
    few, many = 2 + number % 3, 40 + 20 * (number % 4)
    one, two = topic.words
    first, second = topic.obvious
    end = ("That is all I know.", "Is there anything else?", "Thank you for asking.", "Good luck!")[
        number % 4
    ]
    start = ("However", "Sometimes", "Then", "Today")[number % 4]
    yield "keywords:existence", {"keywords": [one, two]}, f"Use the words {one} and {two}."
    yield (
        "keywords:frequency",
        {"keyword": first, "frequency": few, "relation": "at least"},
        f"Use the word {first} at least {few} times.",
    )
    yield (
        "keywords:forbidden_words",
        {"forbidden_words": [first, second]},
        f"Do not use the words {first} and {second}.",
    )
    yield (
        "length_constraints:number_words",
        {"num_words": many, "relation": "at least"},
        f"Answer with at least {many} words.",
    )
    yield (
        "length_constraints:number_words",
        {"num_words": many // 2, "relation": "less than"},
        f"Answer with less than {many // 2} words.",
    )
    yield (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": few},
        f"Answer in exactly {few} paragraphs, and separate them with the line ***.",
    )
    yield (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": few, "nth_paragraph": 2, "first_word": start},
        f"Answer in exactly {few} paragraphs with an empty line between them, and start the second with the word "
        f"{start}.",
    )
    yield (
        "detectable_content:number_placeholders",
        {"num_placeholders": few},
        f"Use at least {few} placeholders in square brackets, such as [name].",
    )
    yield (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Add a postscript at the end that starts with P.S.",
    )
    yield (
        "detectable_format:number_bullet_lists",
        {"num_bullets": few},
        f"Answer with exactly {few} bullet points, each on a line that starts with * and a space.",
    )
    yield (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": few},
        f"Highlight at least {few} parts of your answer with asterisks, *like this*.",
    )
    yield (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": few},
        f"Answer in {few} sections that begin with Section 1, Section 2, and so on.",
    )
    yield "detectable_format:json_format", {}, "Write the whole answer as JSON, and nothing else."
    yield "detectable_format:title", {}, "Give your answer a title in double angular brackets, <<like this>>."
    yield (
        "combination:two_responses",
        {},
        "Give two different answers, and separate them with ****** and nothing else.",
    )
    yield (
        "combination:repeat_prompt",
        {"prompt_to_repeat": topic.question},
        "First repeat the sentence before this one word for word, then answer.",
    )
    yield "startend:end_checker", {"end_phrase": end}, f'End with exactly this sentence: "{end}"'
    yield "change_case:english_capital", {}, "Write in capital letters only."
    yield "change_case:english_lowercase", {}, "Write in lower case only, without any capital letters."
    yield "startend:quotation", {}, "Put the whole answer between double quotation marks."


def prompts(**_: Any) -> dict[str, Dataset]:
    """All of them as the split `test`, in the columns of IFEval; arguments that an instruction has not are null."""
    asked = [
        (topic, name, arguments, sentence)
        for number, topic in enumerate(TOPICS)
        for name, arguments, sentence in instructions(topic, number)
    ]
    return {
        "test": Dataset.from_list(
            [
                {
                    "key": key,
                    "prompt": f"{topic.question} {sentence}",
                    "instruction_id_list": [name],
                    "kwargs": [arguments],
                }
                for key, (topic, name, arguments, sentence) in enumerate(asked)
            ]
        )
    }
