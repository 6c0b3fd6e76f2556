"""A small task for comparing formats of one model: 122 questions with four answers each, scored by log-likelihood.

A kind of question is a template with rows "what fills it = right answer". The wrong answers are those of the next three rows, so every
answer is right once and wrong three times: a model that only prefers frequent words gets a quarter. The answer with the largest sum of
its tokens' log-probabilities counts, as in the multiple-choice tasks of Brown et al. 2020 (GPT-3).
"""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minivllm import LLM

CHOICES = 4
KINDS = {
    "The capital of {} is": "France = Paris, Japan = Tokyo, Egypt = Cairo, Italy = Rome, Peru = Lima, Kenya = Nairobi, Norway = Oslo, "
                            "Cuba = Havana, Greece = Athens, Portugal = Lisbon, Poland = Warsaw, Austria = Vienna",
    "The opposite of {} is": "hot = cold, big = small, early = late, rich = poor, wet = dry, hard = soft, empty = full, strong = weak, "
                             "high = low, old = new, open = closed, sharp = blunt",
    "The day after {} is": "Monday = Tuesday, Tuesday = Wednesday, Wednesday = Thursday, Thursday = Friday, Friday = Saturday, "
                           "Saturday = Sunday, Sunday = Monday",
    "The month after {} is": "January = February, February = March, March = April, April = May, May = June, June = July, July = August, "
                             "August = September, September = October, October = November, November = December, December = January",
    "The number after {} is": "two = three, three = four, four = five, five = six, six = seven, seven = eight, eight = nine, nine = ten, "
                              "ten = eleven, eleven = twelve",
    "{} =": "1 + 1 = 2, 2 + 1 = 3, 2 + 2 = 4, 3 + 2 = 5, 4 + 2 = 6, 4 + 3 = 7, 6 + 2 = 8, 5 + 4 = 9, 7 + 3 = 10, 6 + 5 = 11, "
            "8 + 4 = 12, 7 + 6 = 13",
    "A young {} is called a": "dog = puppy, cat = kitten, cow = calf, sheep = lamb, horse = foal, bear = cub, goat = kid, pig = piglet, "
                              "duck = duckling, deer = fawn, frog = tadpole",
    "The job of a person who {} is": "flies planes = pilot, grows crops = farmer, treats teeth = dentist, repairs pipes = plumber, "
                                     "puts out fires = firefighter, writes novels = writer, defends people in court = lawyer, "
                                     "makes bread = baker, cuts hair = barber",
    "{} is a country in": "Spain = Europe, China = Asia, Nigeria = Africa, Chile = South America, Sweden = Europe, Thailand = Asia, "
                          "Ghana = Africa, Bolivia = South America, Ireland = Europe, Nepal = Asia, Zambia = Africa, "
                          "Uruguay = South America",
    "The chemical symbol for {} is": "gold = Au, iron = Fe, sodium = Na, silver = Ag, lead = Pb, potassium = K, copper = Cu, tin = Sn, "
                                     "carbon = C, oxygen = O",
    "Most people in {} speak": "Brazil = Portuguese, Mexico = Spanish, Egypt = Arabic, Austria = German, Australia = English, "
                               "France = French, China = Chinese, Greece = Greek",
    "The color of {} is": "snow = white, coal = black, a ripe banana = yellow, the clear sky = blue, blood = red, grass = green, "
                          "a pumpkin = orange",
}


def questions() -> list[tuple[str, list[str]]]:
    """(beginning of a sentence, its possible ends): the first one is right."""
    found = []
    for template, text in KINDS.items():
        rows = [row.rsplit(" = ", 1) for row in text.split(", ")]
        found += [(template.format(subject), [rows[(i + k) % len(rows)][1] for k in range(CHOICES)]) for i, (subject, _) in enumerate(rows)]
    return found


def likelihoods(llm: LLM) -> list[list[float]]:
    """Per question: the log-likelihood of each answer."""
    from minivllm import SamplingParams

    asked, tokenizer = questions(), llm.get_tokenizer()
    prompts = [{"prompt_token_ids": tokenizer.encode(f"{prompt} {answer}")} for prompt, answers in asked for answer in answers]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    outputs = iter(llm.generate(prompts, params, use_tqdm=False))

    def likelihood(begin: int) -> float:
        output = next(outputs)
        pairs = zip(output.prompt_token_ids[begin:], output.prompt_logprobs[begin:], strict=True)
        return math.fsum(entry[token].logprob for token, entry in pairs)

    return [[likelihood(len(tokenizer.encode(prompt))) for _ in answers] for prompt, answers in asked]


def score(llm: LLM) -> list[bool]:
    """Per question: whether the right answer has the largest likelihood."""
    return [right > max(wrong) for right, *wrong in likelihoods(llm)]


def standard_error(right: int, count: int) -> float:
    """Of the share right / count, for questions that are drawn independently."""
    return math.sqrt(right / count * (1 - right / count) / count)
