"""Writes the model card from what the run recorded: no number in it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# held-out files with at most this share of their lines in the training data count as new
NEW_FILE_SHARE = 0.25


def write_card(folder: Path) -> Path:
    """``README.md`` of a model folder, from its ``data.json``, ``training.json`` and ``evaluation.json``.

    What precision costs is added where ``precision.json`` stands beside them.
    """
    data, training, evaluation = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("data", "training", "evaluation")
    )
    precision_path = folder / "precision.json"
    sections = (
        _front_matter(),
        _introduction(folder, training, evaluation),
        _use(folder),
        _results(evaluation),
        *([_precisions(json.loads(precision_path.read_text()))] if precision_path.exists() else []),
        _positions(evaluation["by_position"]),
        _training(training),
        _data(data),
        _completions(evaluation["completions"]),
        _limits(evaluation),
        _packages(data),
    )
    path = folder / "README.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path


def _front_matter() -> str:
    lines = ("license: apache-2.0", "library_name: transformers", "pipeline_tag: text-generation")
    return "\n".join(("---", *lines, "tags: [mamba, python, fill-in-the-middle]", "---"))


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _introduction(folder: Path, training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    config = training["config"]
    return f"""# {folder.name}

A Mamba language model of {training["parameters"]:,} parameters that completes Python code and its docstrings and
fills in the middle. It exists so that this server has something real to serve from the first minute, with nothing
downloaded. It is small: it writes plausible Python, not correct Python.

Trained from nothing in {training["elapsed_seconds"] / 60:.1f} minutes on one {training["device"]} with this
repository's own model code and kernels, on {training["tokens"]:,} tokens. Held-out files cost
**{_bits_per_byte(evaluation["trained"]):.3f} bits per byte**.

{
        _table(
            ("what", "value"),
            (
                ("architecture", f"`{config['architectures'][0]}`, Mamba (Gu & Dao 2023)"),
                ("hidden size, layers", f"{config['hidden_size']}, {config['num_hidden_layers']}"),
                (
                    "state size, expansion, convolution",
                    f"{config['state_size']}, {config['expand']}, {config['conv_kernel']}",
                ),
                ("vocabulary", f"{config['vocab_size']:,}, byte-level BPE, input and output embeddings tied"),
                ("weights", f"bf16 (A_log and D in fp32), {training['weight_bytes'] / 1e6:.1f} MB of safetensors"),
                ("licence", "Apache-2.0"),
            ),
        )
    }"""


def _use(folder: Path) -> str:
    return f"""## Use

```python
import mamba_core  # registers the model class
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "models/{folder.name}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("def fibonacci(n):\\n", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

To fill in the middle, ask for `<|fim_prefix|>` + before + `<|fim_suffix|>` + after + `<|fim_middle|>`; the model ends
with `<|endoftext|>`. `<|im_start|>` and `<|im_end|>` are reserved and untrained: this is not a chat model."""


def _bits_per_byte(result: dict[str, Any], chosen: Sequence[int] | None = None) -> float:
    indices = range(len(result["bits"])) if chosen is None else chosen
    return float(sum(result["bits"][i] for i in indices) / sum(result["bytes"][i] for i in indices))


def _results(evaluation: dict[str, Any]) -> str:
    baselines = evaluation["baselines"]
    ngram = {"bits": baselines["ngram_bits"], "bytes": baselines["bytes"]}
    shares = baselines["repeated_line_share"]
    new = [i for i, share in enumerate(shares) if share <= NEW_FILE_SHARE]
    num_bytes = sum(baselines["bytes"])
    xz_name, xz_bits = min(baselines["xz_bits"].items(), key=lambda item: float(item[1]))
    rows = [("this model", evaluation["trained"]), ("order-5 byte n-gram", ngram)]
    table = [_result_row(name, result, new) for name, result in rows]
    table.append((f"`xz -9`, {xz_name.replace('_', ' ')}", f"{xz_bits / num_bytes:.3f}", "–"))
    table.append(_result_row("this architecture, untrained", evaluation["untrained"], new))
    per_token = sum(evaluation["trained"]["bytes"]) / sum(evaluation["trained"]["tokens"])
    other = {name: bits / num_bytes for name, bits in baselines["xz_bits"].items() if name != xz_name}
    also = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in other.items())
    return f"""## Held-out bits per byte

{len(shares)} files that neither the model, nor the tokenizer, nor the n-gram saw, {num_bytes:,} bytes: each file from
a fresh state, whole lines up to 48 KiB of it, its end-of-text token included in the model's cost.

{_table(("method", "all files", f"the {len(new)} files that are mostly new"), table)}

"Mostly new": at most {NEW_FILE_SHARE:.0%} of a file's lines (of 24 bytes and more) stand verbatim anywhere in the
training data. The n-gram is interpolated after Witten and Bell over contexts of 0 to 5 bytes and was trained on the
same {baselines["ngram_train_bytes"]:,} bytes. For `xz` the better of two ways is shown ({also}). The tokenizer
takes {per_token:.2f} bytes per token on these files."""


def _result_row(name: str, result: dict[str, Any], new: Sequence[int]) -> tuple[str, str, str]:
    return name, f"{_bits_per_byte(result):.3f}", f"{_bits_per_byte(result, new):.3f}" if new else "–"


def _precisions(record: dict[str, Any]) -> str:
    by_way: dict[str, dict[str, dict[str, Any]]] = {"prompts": {}, "steps": {}}
    for result in record["results"]:
        by_way[result["way"]][_name_of(result)] = result
    names = list(dict.fromkeys(map(_name_of, record["results"])))
    rows = [(name, *(_against(results, name) for results in by_way.values())) for name in names]
    header = ("weights and activations", *(f"{way}{_extent(results)}" for way, results in by_way.items()))
    return f"""## What precision costs

The same measure on a CPU (torch {record["torch"]}), in the forms that a server gives the weights. A prompt is taken all
at once; what the model has written itself is taken one step after another, by other code. In brackets: against fp32.

{_table(header, rows)}

int8 is a form of the matrices alone, one scale per output. Measured by `python -m models.recipe.precision`."""


def _extent(results: dict[str, dict[str, Any]]) -> str:
    sizes: list[int] = next((result["bytes"] for result in results.values()), [])
    return f", {len(sizes)} files of {sum(sizes):,} bytes"


def _name_of(result: dict[str, Any]) -> str:
    quantization = result["quantization"]
    return str(result["dtype"] if quantization == "none" else f"{result['dtype']}, {quantization} matrices")


def _against(results: dict[str, dict[str, Any]], name: str) -> str:
    if name not in results:
        return "–"
    value = _bits_per_byte(results[name])
    exact = results.get("float32")
    return f"{value:.5f}" if exact is None else f"{value:.5f} ({value / _bits_per_byte(exact) - 1:+.3%})"


def _positions(result: dict[str, Any]) -> str:
    if not result["buckets"]:
        return "## Loss by position\n\nThe held-out files are too short to measure it."
    wanted = [bucket for bucket in result["buckets"] if _starts_at_power_of_two(bucket)]
    rows = [
        (
            f"{bucket['begin']:,} – {bucket['end']:,}",
            f"{bucket['loss']:.3f} ± {bucket['standard_error']:.3f}",
            f"{bucket['reset_loss']:.3f}",
        )
        for bucket in wanted
    ]
    train_length = result["train_length"]
    inside = [bucket["loss"] for bucket in result["buckets"] if bucket["end"] <= train_length]
    beyond = [bucket["loss"] for bucket in result["buckets"] if bucket["begin"] >= train_length]
    means = (
        f"Mean loss inside the training length: {sum(inside) / len(inside):.3f}; beyond it, up to "
        f"{result['length'] // train_length} times that length: {sum(beyond) / max(1, len(beyond)):.3f}."
    )
    return f"""## Loss by position, beyond the training length

Trained on rows of {train_length:,} tokens. Here {result["rows"]} rows of {result["length"]:,} tokens: held-out files
end to end with end-of-text between them, the state running on from the first token to the last.

![held-out loss by position](loss_by_position.png)

{_table(("position", "loss, nats per token", f"same tokens, state reset every {train_length:,}"), rows)}

{means} All buckets stand in `evaluation.json`."""


def _starts_at_power_of_two(bucket: dict[str, Any]) -> bool:
    units = bucket["begin"] // (bucket["end"] - bucket["begin"])
    return bool(units & (units - 1) == 0 or units % 8 == 7)


def _training(training: dict[str, Any]) -> str:
    settings = training["settings"]
    last = training["log"][-1]
    validation = training["validation"]
    held = f" and {validation[-1]['loss']:.3f} on held-out text" if validation else ""
    steady = sorted(record["tokens_per_second"] for record in training["log"])[len(training["log"]) // 2]
    return f"""## Training

![loss curve](loss_curve.png)

{
        _table(
            ("what", "value"),
            (
                (
                    "tokens seen",
                    f"{training['tokens']:,} in {training['step']:,} steps, {training['epochs']:.2f} epochs",
                ),
                ("batch", f"{settings['rows_per_batch']} rows of {settings['row_length']:,} tokens"),
                ("wall clock of training", f"{training['elapsed_seconds']:.0f} s, median {steady:,.0f} tokens/s"),
                ("device", f"{training['device']}, torch {training['torch']}, Python {training['python']}"),
                ("optimizer", f"AdamW, betas {settings['betas']}, decay {settings['weight_decay']} on projections"),
                (
                    "learning rate",
                    f"{settings['peak']} after {settings['warmup_share']:.0%} warm-up, cosine to "
                    f"{settings['floor_share']:.0%} at the end of the budget",
                ),
                ("gradient norm", f"clipped at {settings['clip_norm']}"),
                ("precision", training["precision"]),
                (
                    "fill-in-the-middle",
                    f"{settings['fim_share']:.0%} of documents, cut between characters, anew per epoch",
                ),
                ("seed", settings["seed"]),
            ),
        )
    }

Final loss {last["loss"]:.3f} nats per token on training rows{held}. The whole log stands in `training.json`.
To train it again: `python models/train.py` (see `models/README.md`)."""


def _data(data: dict[str, Any]) -> str:
    train, heldout = data["train"], data["heldout"]
    used = [entry for entry in data["included"] if entry["train_files"]]
    refused = ", ".join(f"{reason} {count:,}" for reason, count in data["refused_files"].items() if count)
    return f"""## Data

The `.py` files of {len(used)} permissively licensed distributions that were installed on the training machine, Python
{data["python"]}'s standard library among them: {train["files"]:,} files of {train["bytes"]:,} bytes for training,
{heldout["files"]:,} files of {heldout["bytes"]:,} bytes held out. Accepted licences: the MIT, BSD, Apache-2.0, PSF,
ISC, Zlib, Boost, Unlicense and CC0 families, read from each distribution's metadata; anything else or unknown is left
out, and so are folders of vendored copies and files with a notice of their own that is not permissive.

Files are deduplicated by a hash of their text with white space collapsed, and held out by that hash (about one in a
hundred), before the tokenizer was trained. No package has more than its share of all bytes. Files refused:
{refused}."""


def _completions(results: list[dict[str, Any]]) -> str:
    blocks = []
    for number, result in enumerate(results, 1):
        kind = "completion" if result["suffix"] is None else "fill in the middle"
        blocks.append(f"### {number}. {kind}, ended by {result['stopped_by']}")
        blocks.append(_fenced(result["prefix"]))
        blocks.append("continues as" if result["suffix"] is None else "before")
        if result["suffix"] is not None:
            blocks.append(_fenced(result["suffix"]))
            blocks.append("is filled with")
        blocks.append(_fenced(result["completion"]))
    return "\n\n".join(("## Ten fixed prompts, greedy, good and bad alike", *blocks))


def _fenced(text: str) -> str:
    return f"````python\n{text}\n````"


def _limits(evaluation: dict[str, Any]) -> str:
    shares = sorted(evaluation["baselines"]["repeated_line_share"])
    return f"""## Limits

- Its Python is often wrong: undefined names, invented functions, repetition. Nothing it writes should run unread.
- It knows the style of a few dozen libraries and English docstrings; other languages and prose are outside it.
- Held-out files come from the same packages as the training files, and packages repeat themselves: near copies that
  differ by more than white space are not removed. In the median held-out file
  {shares[len(shares) // 2]:.0%} of the lines stand verbatim in the training data; the table above shows the
  mostly new files on their own.
- It can reproduce passages of its training data, whose licences ask for attribution: the packages are named below.
- Trained on rows of {evaluation["by_position"]["train_length"]:,} tokens; what happens beyond is shown above."""


def _packages(data: dict[str, Any]) -> str:
    used = sorted(
        (entry for entry in data["included"] if entry["train_files"]), key=lambda entry: -entry["train_bytes"]
    )
    rows = [
        (entry["package"], entry["version"], entry["licence"], f"{entry['train_files']:,}", f"{entry['train_bytes']:,}")
        for entry in used
    ]
    excluded = [(entry["package"], entry["version"], entry["reason"]) for entry in data["excluded"]]
    return f"""## Packages

<details><summary>{len(rows)} distributions learnt from</summary>

{_table(("package", "version", "licence", "files", "bytes"), rows)}

</details>

<details><summary>{len(excluded)} distributions left out</summary>

{_table(("package", "version", "reason"), excluded)}

</details>

The held-out files are listed with their hashes in `data.json`."""
