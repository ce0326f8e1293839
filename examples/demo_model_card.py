"""The figures that evaluate_demo_model.py measures: in the terminal, as pictures, and as the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Bindings of a document that are asked for.
ASKED = 16
LOCAL_WINDOWS = (64, 128, 256)
LOCAL_SHARE = 0.9
ABLATION_DISTANCE = 2048


def local_window(outside: Sequence[float]) -> int | None:
    """The smallest window that holds LOCAL_SHARE of a head's mass, if one of LOCAL_WINDOWS does."""
    return next((w for w, share in zip(LOCAL_WINDOWS, outside, strict=True) if 1 - share >= LOCAL_SHARE), None)


def grid_of_heads(figures: dict[str, Any], key: str) -> list[list[str]]:
    return [[str(local_window(head) or "–") for head in layer] for layer in figures["heads"][key]]


def spelled(heads: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in heads)


def share(figure: Mapping[str, Any]) -> str:
    return f"{figure['right'] / max(1, figure['asked']):.1%} ({figure['right']} of {figure['asked']})"


def show(figures: dict[str, Any]) -> None:
    console = Console()
    table = Table("context", "bits per byte", "nats per token", "tokens", title="Held-out text")
    for context, f in figures["bits_per_byte"].items():
        table.add_row(context, f"{f['bits_per_byte']:.3f}", f"{f['nats_per_token']:.3f}", str(f["tokens"]))
    console.print(table)
    table = Table("distance", "recalled in full", "nats per answer token", title="Recall by distance")
    for distance, f in figures["recall"].items():
        table.add_row(distance, share(f), f"{f['loss']:.3f}")
    table.add_row(f"{ABLATION_DISTANCE}, value removed", share(figures["recall_without_binding"]), "")
    console.print(table)
    for key, title in (("outside", "window alone"), ("outside_sinks", "4 sinks + window")):
        heads = figures["heads"]
        table = Table(
            "layer",
            *(f"head {n}" for n in range(len(heads["mass"][0]))),
            title=f"Smallest window holding 90 %: {title}",
        )
        for n, row in enumerate(grid_of_heads(figures, key)):
            table.add_row(str(n), *row)
        console.print(table)
    table = Table(
        "narrowed (layer.head)",
        "recall",
        "nats per answer token",
        title=f"Recall at {ABLATION_DISTANCE} tokens, narrowed",
    )
    for f in (figures["screen"], *figures["alone"][:10], *figures["pairs"]):
        table.add_row(spelled(f["heads"]) or "none", share(f), f"{f['loss']:.3f}")
    table.add_section()
    table.add_row("none (more documents)", share(figures["dense"]), f"{figures['dense']['loss']:.3f}")
    for f in figures["greedy"]:
        table.add_row(f"+ {spelled(f['heads'])}", share(f), f"{f['loss']:.3f}")
    console.print(table)
    console.print(f"measured in {figures['seconds']:.0f} s")


def draw(figures: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = figures["heads"]
    mass, buckets = heads["mass"], heads["buckets"]
    retrieves = {tuple(head) for step in figures["greedy"] for head in step["heads"]}
    figure, axes = plt.subplots(len(mass), len(mass[0]), figsize=(12, 8), sharex=True, sharey=True)
    for layer, row in enumerate(axes):
        for head, axis in enumerate(row):
            window = local_window(heads["outside_sinks"][layer][head])
            color = "tab:red" if (layer, head) in retrieves else "tab:blue" if window else "0.55"
            axis.bar(range(len(buckets)), mass[layer][head], color=color, width=0.9)
            axis.set_title(f"{layer}.{head}", fontsize=8, pad=2)
            axis.set_xticks([0, 4, 7, 10], ["0", "8", "64", "512"], fontsize=7)
            axis.tick_params(axis="y", labelsize=7)
    figure.suptitle(
        "Mean attention mass by distance (blue: local beside 4 sinks, red: narrowing them breaks recall)", fontsize=11
    )
    figure.supxlabel("tokens back (powers of two)", fontsize=9)
    figure.tight_layout()
    figure.savefig(folder / "heads.png", dpi=80)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(
        [int(d) for d in figures["recall"]], [100 * f["right"] / f["asked"] for f in figures["recall"].values()], "o-"
    )
    axis.axhline(95, color="0.6", ls=":")
    axis.set_xscale("log", base=2)
    axis.set_xticks([int(d) for d in figures["recall"]], list(figures["recall"]))
    axis.set(
        xlabel="tokens from binding to query",
        ylabel="answers recalled in full (%)",
        ylim=(0, 104),
        title="attnopt demo model: recall",
    )
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "recall.png", dpi=90)
    plt.close(figure)


def training_facts(config: Mapping[str, Any]) -> str:
    heads = f"{config['num_attention_heads']} query heads over {config['num_key_value_heads']} key/value heads"
    return (
        f"Llama, {config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, {heads} of size "
        f"{config['head_dim']}, feed-forward {config['intermediate_size']}, vocabulary {config['vocab_size']} "
        f"(byte-level BPE), tied embedding, RoPE base {config['rope_parameters']['rope_theta']:,.0f}, "
        f"context {config['max_position_embeddings']}, bfloat16"
    )


def verdict(figures: dict[str, Any]) -> str:
    """Whether the aims of the model are met, said plainly."""
    bits = max(f["bits_per_byte"] for f in figures["bits_per_byte"].values())
    far = {d: f["right"] / f["asked"] for d, f in figures["recall"].items() if int(d) >= 2000}
    missed = [f"{d} ({s:.1%})" for d, s in far.items() if s < 0.95]
    met = [f"{d} ({s:.1%})" for d, s in far.items() if s >= 0.95]
    said = f"The aim of at most 1.6 bits per byte is {'met' if bits <= 1.6 else 'missed'}. "
    said += f"The aim of 95 % recall at 2,000 tokens and more is met at {', '.join(met) or 'no distance'}"
    return said + (
        f" and **missed at {', '.join(missed)}**: do not count on recall there."
        if missed
        else ", every distance measured."
    )


def card(figures: dict[str, Any], config: Mapping[str, Any]) -> str:
    bits = "\n".join(
        f"| {c} | {f['bits_per_byte']:.3f} | {f['nats_per_token']:.3f} | {f['tokens']:,} |"
        for c, f in figures["bits_per_byte"].items()
    )
    recalls = "\n".join(f"| {d} | {share(f)} | {f['loss']:.3f} |" for d, f in figures["recall"].items())
    count = len(figures["heads"]["mass"][0])
    header = "| layer | " + " | ".join(f"head {n}" for n in range(count)) + " |\n|---" + "|---" * count + "|"
    local, beside = (
        "\n".join(f"| {n} | {' | '.join(row)} |" for n, row in enumerate(grid_of_heads(figures, key)))
        for key in ("outside", "outside_sinks")
    )
    narrowings = "\n".join(
        f"| {spelled(f['heads']) or 'none'} | {share(f)} | {f['loss']:.3f} |"
        for f in (figures["screen"], *figures["alone"][:6], *figures["pairs"])
    )
    greedy = "\n".join(f"| + {spelled(f['heads'])} | {share(f)} | {f['loss']:.3f} |" for f in figures["greedy"])
    broken = figures["greedy"][-1]["right"] / figures["greedy"][-1]["asked"] < 0.5
    names = spelled([h for f in figures["greedy"] for h in f["heads"]])
    outcome = (
        f"Narrowing {names} together breaks recall."
        if broken
        else f"Narrowing {names} together does not yet break recall."
    )
    return f"""# attnopt's demo model

A small language model of Python code that recalls names bound far above. It ships with attnopt so that
every command can be tried without a download and every claim about plans can be checked on a trained model
in minutes. This card is written by `python examples/evaluate_demo_model.py --write-card`; all figures are
measured.

## Data

The source of Python 3.11.7's standard library, under the [PSF
License](https://docs.python.org/3/license.html). A file's split is a hash of its path inside the library
(`attnopt/corpus.py`): of 20 buckets, 17 are trained on and three (`verify`, `final`, `calibrate`) never
are, by the tokenizer or by the model. The figures below are of `final`. Into the training text, recall
lines of random names were mixed: `left_right=blue_tree` far above, `assert left_right==blue_tree` below.

## Model and training

{training_facts(config)}; {figures["parameters"]:,} parameters.

Trained from random weights by `examples/train_demo_model.py` for about 1,930 steps of 8,192 tokens (15.8
million tokens): 6.5 million in sequences of 512, 2048 up to 8.0 million and 8192 up to 10.0 million; then,
resumed twice, 3.5 million at 2048 with positions spread over the whole context and 2.4 million at 8192. Muon
on the hidden matrices, AdamW on the embedding and the norms, peak learning rate 0.003 with a linear warm-up
(of 0.4 million tokens) and a cool-down to nothing by 10.0 million; each resumed part starts again below the
peak (0.0024, 0.0013) and cools down too, the last one early; bfloat16 autocast. So the curriculum is not the
script's default to the digit. Before the positions were spread, recall at 7,500 tokens was 22 %.

![training loss](loss.png)

## Held-out text

| context | bits per byte | nats per token | tokens |
|---|---|---|---|
{bits}

Windows of pieces spread over the whole split; boundaries between files are not counted. Both contexts read
the same text.

## Recall by distance

| tokens from binding to query | recalled in full | nats per answer token |
|---|---|---|
{recalls}

Bindings stand in held-out code with others that are never asked for. An answer counts only if every token
of it is the most likely one, given those before it. Control, at {ABLATION_DISTANCE} tokens with the bound
values overwritten: {share(figures["recall_without_binding"])}.
The queries of a distance come from few documents of {ASKED} each, and documents differ: on a denser one, used
below, recall at {ABLATION_DISTANCE} tokens is {share(figures["screen"])}.

{verdict(figures)}

![recall by distance](recall.png)

## What the heads do

The smallest window (of {", ".join(map(str, LOCAL_WINDOWS))} tokens) that holds 90 % of a head's attention
on {figures["heads"]["length"]} tokens of held-out code, "–" where none does. Window alone:

{header}
{local}

Beside the first four tokens (attention sinks):

{header}
{beside}

![attention distance of every head](heads.png)

Heads (layer.head) narrowed to four sinks and a window of 64, recall at {ABLATION_DISTANCE} tokens; on one
document, each head alone (the six that matter most, by recall and then by the answers' loss) and pairs of
the first four:

| narrowed | recalled in full | nats per answer token |
|---|---|---|
{narrowings}

One more head at a time, always the one that costs most on that document, measured on others (none narrowed:
{share(figures["dense"])}):

| narrowed | recalled in full | nats per answer token |
|---|---|---|
{greedy}

{outcome}

## Use and limits

Meant for attnopt's own demonstration, tests and documentation: profiles, plans and their verification on a
model whose heads really differ. It is no assistant and no code completer: it has seen one library, writes
plausible-looking but wrong Python, and may reproduce passages of what it was trained on. Recall is of the
trained line format; it says nothing about other questions over long text. What a plan saves here does not
predict what it saves on a large model.
"""
