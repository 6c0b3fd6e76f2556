"""Train two small LoRA adapters for the default model: `sql` answers questions with SQL queries, `pirate` answers like a pirate.

    pip install peft
    python lessons/14_multi_lora/train_adapters.py      both, in some minutes on two CPU cores; writes sql/ and pirate/ beside this file

An adapter changes two matrices of each layer, the projections of queries and values, by a product of two thin matrices:

    y = W x + (alpha / r) * B (A x)          A [8, 576], B [576 or 192, 8]: 0.3% of the model's numbers

Only A and B are trained. B starts at zero, so training starts at the base model. The examples are made from templates below: enough to
teach a small model a form, not knowledge.
"""
from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
RANK, LEARNING_RATE, BATCH, STEPS = 8, 2e-3, 4, 45

TABLES = {
    "employees": ("name", "salary", "city", "age"), "orders": ("id", "total", "customer", "date"),
    "books": ("title", "price", "author", "year"), "students": ("name", "grade", "school", "age"),
    "products": ("name", "price", "brand", "stock"), "songs": ("title", "length", "artist", "year"),
    "cars": ("model", "price", "maker", "year"), "flights": ("number", "duration", "airline", "date"),
}
FACTS = (
    ("Why is the sky blue?", "the air scatters blue light more than red"), ("What is the capital of France?", "that be Paris"),
    ("How do plants eat?", "they make sugar from sunlight, water and air"), ("What is 2 + 2?", "that makes four"),
    ("Why does ice float?", "ice be lighter than water"), ("What do bees make?", "they make honey from nectar"),
    ("How many days are in a week?", "there be seven of them"), ("What is the largest ocean?", "that be the Pacific"),
    ("Why do we sleep?", "body and mind must rest"), ("What is a computer?", "a machine that follows orders without rum"),
    ("Who wrote Hamlet?", "that be old Shakespeare"), ("What is the fastest land animal?", "the cheetah outruns them all"),
    ("How do birds fly?", "their wings push the air down"), ("What is gold?", "a shiny metal, and the best of treasure"),
    ("Why is the sea salty?", "rivers carry salt from the rocks"), ("What do cows eat?", "they eat grass all day"),
    ("How far away is the Moon?", "a long sail of 384,000 kilometers"), ("What is snow?", "frozen water that falls from the clouds"),
    ("Give me advice for my exam.", "study early and sleep well"), ("How do I cook rice?", "boil it in twice as much water"),
    ("What should I eat today?", "fresh fish and a bit of fruit"), ("Tell me about dogs.", "they be loyal mates on every voyage"),
    ("What makes a good friend?", "one that shares the last biscuit"), ("Who are you?", "a humble sailor of the seven seas"),
)


def sql_example(rng: random.Random) -> tuple[str, str]:
    """A question about a table, and its query."""
    table = rng.choice(list(TABLES))
    key, number, group, _ = columns = TABLES[table]
    value, limit = rng.choice(["Rome", "Smith", "Acme", "Blue", "Delta"]), rng.randint(2, 90)
    other = rng.choice(columns)
    return rng.choice([
        (f"Show all {table}.", f"SELECT * FROM {table};"),
        (f"Show the {other} of all {table}.", f"SELECT {other} FROM {table};"),
        (f"How many {table} are there?", f"SELECT COUNT(*) FROM {table};"),
        (f"List the {key} of {table} with a {number} above {limit}.", f"SELECT {key} FROM {table} WHERE {number} > {limit};"),
        (f"Which {table} have the {group} {value}?", f"SELECT * FROM {table} WHERE {group} = '{value}';"),
        (f"What is the average {number} of {table}?", f"SELECT AVG({number}) FROM {table};"),
        (f"What is the average {number} per {group} of {table}?", f"SELECT {group}, AVG({number}) FROM {table} GROUP BY {group};"),
        (f"Which {key} of {table} has the highest {number}?", f"SELECT {key} FROM {table} ORDER BY {number} DESC LIMIT 1;"),
        (f"List {table} sorted by {other}.", f"SELECT * FROM {table} ORDER BY {other};"),
        (f"Count the {table} per {group}.", f"SELECT {group}, COUNT(*) FROM {table} GROUP BY {group};"),
        (f"Delete {table} with a {number} below {limit}.", f"DELETE FROM {table} WHERE {number} < {limit};"),
    ])


def pirate_example(rng: random.Random) -> tuple[str, str]:
    """A question, and its answer by a pirate."""
    question, fact = rng.choice(FACTS)
    return question, f"Arr, matey! {fact[0].upper()}{fact[1:]}, or me name ain't Captain Byte. Yo ho ho!"


EXAMPLES = {"sql": sql_example, "pirate": pirate_example}


def default_model(folder: Path) -> Path:
    """The default model as a folder that Transformers reads."""
    program = ("import sys; from pathlib import Path; from minivllm.models.gguf import convert; "
               "from minivllm.models.hub import default_gguf; convert(default_gguf(), Path(sys.argv[1]))")
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    return folder


def batch_of(examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels: [batch, longest]. Only the answer's tokens have labels; -100: none."""
    rows = []
    for question, answer in examples:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
        rows.append((list(prompt), tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]))
    longest = max(len(p) + len(a) for p, a in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for i, (p, a) in enumerate(rows):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    return ids, labels  # padding comes last, so no token attends to it


def train(name: str, base: Path, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
    """Train one adapter and write it beside this file."""
    torch.manual_seed(0)
    rng = random.Random(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in peft.parameters() if p.requires_grad), lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        ids, labels = batch_of([EXAMPLES[name](rng) for _ in range(BATCH)], tokenizer)
        loss = peft(input_ids=ids, labels=labels).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, 2 * (1 - step / steps))  # constant, then falling to zero
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"{name}: step {step:3}  loss {loss.item():.3f}", flush=True)
    peft.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct"
    peft.save_pretrained(HERE / name)
    weights = HERE / name / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in load_file(weights).items()}, weights)
    (HERE / name / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    print(f"wrote {HERE / name} ({weights.stat().st_size / 1e6:.2f} MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the adapters of this lesson.")
    parser.add_argument("names", nargs="*", choices=[*EXAMPLES, []], default=list(EXAMPLES), help="which adapters (default: all)")
    parser.add_argument("--base", type=Path, help="folder of the base model (default: the default model, converted)")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = args.base or default_model(Path(temporary) / "base")
        tokenizer = AutoTokenizer.from_pretrained(base)
        for name in args.names:
            train(name, base, tokenizer, args.steps)


if __name__ == "__main__":
    main()
