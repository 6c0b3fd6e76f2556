"""The prompts that `minivllm train-draft` uses by default: every form with every topic, in an order that mixes both.

Prompts about the last topics are kept for the held-out measurement, so that no answer about the same topic is trained on.
"""
from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from minivllm.errors import InvalidInput

FORMS = (
    "Explain {} to a beginner.", "What are the main advantages and disadvantages of {}?", "Write a short story about {}.",
    "Give me five tips for {}.", "What is {}?", "Write a poem about {}.", "Summarize what is known about {} in one paragraph.",
    "How does {} work?", "Write an email to a friend about {}.", "List ten interesting facts about {}.",
    "Why is {} important?", "Describe {} in three sentences.", "Compare {} today with a hundred years ago.",
    "Write a dialogue between two people who talk about {}.", "What are common mistakes with {}?", "Create a lesson plan about {}.",
    "Who should I talk to if I want to know more about {}?", "Write a step-by-step guide to {}.",
    "Can you recommend some books about {}?", "What questions do people ask about {}?", "Tell me a joke about {}.",
    "Write a product description for something related to {}.", "How can I start with {}?", "What is the history of {}?",
    "Write a Python function that has something to do with {}.", "What would the world be like without {}?",
    "Write a news article about {}.", "Translate this sentence into French: I like {}.", "Make a table of words about {}.",
    "I have a problem with {}. What can I do?", "Rewrite this more formally: hey, I really love {}!",
    "Is {} expensive? Explain your answer.",
)
TOPICS = (
    "photosynthesis", "learning to cook", "the solar system", "personal finance", "gardening", "machine learning", "the French Revolution",
    "running a marathon", "electric cars", "black holes", "writing a resume", "climate change", "playing chess", "the human heart",
    "democracy", "baking bread", "public speaking", "the stock market", "dogs", "Roman architecture", "databases", "sleep",
    "learning a new language", "volcanoes", "time management", "jazz music", "the immune system", "traveling alone", "renewable energy",
    "Shakespeare", "basic algebra", "coffee", "the internet", "meditation", "dinosaurs", "job interviews", "the water cycle",
    "video games", "healthy breakfasts", "the Great Wall of China", "sorting a list", "friendship", "vaccines", "photography",
    "the Olympic Games", "inflation", "bicycles", "whales", "mental health", "space travel", "weather forecasts", "cats", "the moon",
    "a small business", "probability", "recycling", "yoga", "poetry", "earthquakes", "robots", "the ocean", "tea", "working from home",
    "antibiotics", "painting", "gravity", "a city in the rain", "elections", "the Amazon rainforest", "file systems", "birthday parties",
    "bees", "the Renaissance", "swimming", "credit cards", "a lost key",
    # held out
    "football", "DNA", "moving to another country", "prime numbers", "chocolate", "the Cold War", "remote sensing", "an old lighthouse",
)
HELD_OUT_TOPICS = 8


def default_prompts(count: int) -> list[str]:
    """The first `count` prompts for training."""
    return _mixed(TOPICS[:-HELD_OUT_TOPICS], count)


def held_out_prompts(count: int) -> list[str]:
    """The first `count` prompts about topics that `default_prompts` never has."""
    return _mixed(TOPICS[-HELD_OUT_TOPICS:], count)


def _mixed(topics: Sequence[str], count: int) -> list[str]:
    """Forms and topics in turns; each round pairs them differently. After all pairs they come again."""
    pairs = ((form, topics[(i + shift) % len(topics)]) for shift in itertools.count() for i, form in enumerate(FORMS))
    return [form.format(topic) for form, topic in itertools.islice(pairs, count)]


def read_prompts(file: str) -> list[str]:
    """One prompt per line, or one JSON object with a field `prompt` per line in a .jsonl file. Raises `InvalidInput`."""
    path = Path(file).expanduser()
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"prompts file {file!r} cannot be read ({error}): name a text file in UTF-8", "prompts") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"prompts file {file!r} has a line that is no JSON object with a field prompt ({error!r}): correct it",
                           "prompts") from None
    if len(prompts) < 2 or not all(isinstance(prompt, str) for prompt in prompts):
        raise InvalidInput(f"prompts file {file!r} needs at least 2 prompts, each a string, and has {len(prompts)}: give more", "prompts")
    return prompts
