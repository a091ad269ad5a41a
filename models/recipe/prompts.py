"""The ten fixed prompts whose completions stand in the model card, good and bad alike."""

from __future__ import annotations

from dataclasses import dataclass

from models.recipe.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands before the cursor, and for the two to be filled in, what stands behind it."""

    prefix: str
    suffix: str | None = None

    @property
    def text(self) -> str:
        """As the model reads it."""
        if self.suffix is None:
            return self.prefix
        return f"{FIM_PREFIX}{self.prefix}{FIM_SUFFIX}{self.suffix}{FIM_MIDDLE}"


PROMPTS = (
    Prompt("def fibonacci(n):\n"),
    Prompt('def is_prime(n: int) -> bool:\n    """Return True if n is a prime number."""\n'),
    Prompt("import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser("),
    Prompt("class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"),
    Prompt('def read_json(path):\n    """Read a JSON file and return its content.'),
    Prompt("def test_addition():\n"),
    Prompt("import numpy as np\n\n\ndef softmax(x, axis=-1):\n"),
    Prompt("try:\n    import numpy as np\nexcept ImportError"),
    Prompt(
        "def average(values):\n    if not values:\n        raise ValueError(",
        ")\n    return sum(values) / len(values)\n",
    ),
    Prompt(
        'def count_words(text):\n    """Return how often each word occurs in the text."""\n    counts = {}\n'
        "    for word in text.split():\n",
        "    return counts\n",
    ),
)
