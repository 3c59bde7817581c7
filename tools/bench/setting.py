"""What both sides of a comparison share: the model, its examples, and the clock; see `measure.py`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from atlantis_ds.config.schema import Prompt
from atlantis_ds.data.prompts import render_prompt
from atlantis_ds.data.relation import read_semeval, read_spert
from atlantis_ds.data.rows import Found
from atlantis_ds.errors import InputError
from atlantis_ds.lm.encode import Encoded, Encoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEMPLATE = "Which relation holds from [E1] to [E2]: {options}?\n{marked_sentence}"

MEANINGS = """Which relation holds from [E1] to [E2]?
Kill: the person [E1] killed the person [E2]
Live_In: the person [E1] lives or lived in the place [E2]
Located_In: the place [E1] lies in the place [E2]
OrgBased_In: the organisation [E1] has its seat in the place [E2]
Work_For: the person [E1] works or worked for the organisation [E2]
{marked_sentence}"""


class Setting:
    """The model, its tokenizer, and the examples: read once, before any clock runs."""

    def __init__(self, options: dict[str, Any]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(options["threads"])
        torch.manual_seed(0)
        self.options = options
        path, dtype = Path(options["model"]), DTYPES[options["dtype"]]
        self.tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
        if path.is_dir():
            self.lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        else:  # a config file: the real shape with random weights
            config = AutoConfig.from_pretrained(path)
            config.num_hidden_layers = options.get("layers", config.num_hidden_layers)
            config.layer_types = ["full_attention"] * config.num_hidden_layers
            config.vocab_size = options.get("vocab_size", config.vocab_size)
            self.lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        found = list(read_file(Path(options["data"])))
        self.labels = sorted({example.target for example in found})

        def render(template: str, example: Found) -> str:
            return render_prompt(template, example.fields, Prompt(), self.labels)

        solved = [next(e for e in reversed(found) if e.target == label) for label in self.labels]
        shots = "".join(f"{render(TEMPLATE, e)}\n{e.target}\n\n" for e in solved[: options.get("shots", 0)])
        question = MEANINGS if options.get("meanings") else TEMPLATE
        examples = sorted(found, key=attrgetter("id"))[: options["examples"]]
        self.prompts = [shots + render(question, example) for example in examples]
        self.targets = [example.target for example in examples]
        self.encoder = Encoder(self.tokenizer, self.lm.config, self.labels)

    def having(self, **options: Any) -> Setting:
        self.options = {**self.options, **options}
        return self

    def pairs(self) -> list[Encoded]:
        """The examples as token ids, folded into a vocabulary that was made smaller."""
        size = self.lm.config.vocab_size

        def fold(ids: list[int]) -> list[int]:
            return [token % size for token in ids]

        encoded = self.encoder.pairs(self.prompts, self.targets)
        return [Encoded(fold(pair.prompt), fold(pair.label), pair.eos % size) for pair in encoded]

    def every_pair(self) -> list[Encoded]:
        """Each example with each label, the labels of an example one after another."""
        prompts = [prompt for prompt in self.prompts for _ in self.labels]
        return list(self.encoder.pairs(prompts, self.labels * len(self.prompts)))

    def texts(self) -> list[tuple[str, str]]:
        return [(f"{prompt}\n", target) for prompt, target in zip(self.prompts, self.targets)]


def read_file(path: Path) -> Iterator[Found]:
    """The examples of a file of SemEval-2010 Task 8 or CoNLL04."""

    def refuse(where: str, what: str) -> None:
        raise InputError(f"{where}: {what}")

    return read_semeval(path, refuse) if path.suffix == ".TXT" else read_spert(path, "train", 0, 0, refuse)


def peak_gib(reset: bool = False) -> float:
    """Largest resident memory of this process since the last reset, so that loading the model does not count."""
    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def clocked(work: Callable[[], Any], examples: int, tokens: int) -> tuple[dict[str, float], Any]:
    peak_gib(reset=True)
    start = time.monotonic()
    result = work()
    seconds = time.monotonic() - start
    return {
        "seconds": seconds,
        "examples_per_s": examples / seconds,
        "tokens_per_s": tokens / seconds,
        "peak_gib": peak_gib(),
    }, result
