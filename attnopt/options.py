"""Every command and its options. Nothing here imports torch, so that help and completion are there at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from attnopt.arguments import (
    budget_percent,
    count,
    count_or_none,
    memory,
    names,
    not_negative,
    numbers_or_none,
    one_length,
    positive,
    speedup,
    whole_numbers,
)
from attnopt.parsing import HELP, CommandsParser, Parser

START = """\
  attnopt examine MODEL   what would be done to the attention of your model, or why not
  attnopt demo            the whole path on the small trained model that ships with attnopt
  attnopt --help          every command"""
EXAMPLES = {
    "examine": "attnopt examine demo\nattnopt examine --config llama --tiny\n"
    "attnopt examine ./my-llama --length 512 --lengths 4096,32768 --time --json",
    "profile": "attnopt profile demo --out profile.safetensors\n"
    "cat *.txt | attnopt profile ./my-llama --text - --lengths 1024,4096 --out p.safetensors",
    "merge": "attnopt merge monday.safetensors tuesday.safetensors --out both.safetensors",
    "distill": "attnopt distill demo --profile profile.safetensors --out fitted.safetensors\n"
    "attnopt distill ./my-llama --profile p.safetensors --features 64 --windows 128 --steps 400 --out f.safetensors",
    "calibrate": "attnopt calibrate --heads 32 --kv-heads 8 --head-dim 128 --dtype bf16\n"
    "attnopt calibrate --model demo --lengths 2048,8192 --json",
    "plan": "attnopt plan demo --profile profile.safetensors --max-loss-increase 1% --length 8192 --out plan.json\n"
    "attnopt plan demo --profile p.safetensors --objective memory --max-kv-memory 40% --protect 0 --out plan.json\n"
    "attnopt plan demo --profile p.safetensors --device-preset h100 --tensor-parallel 2 --length 1000000 --out p.json",
    "show": "attnopt show plan.json\nattnopt show profile profile.safetensors --svg heads.svg",
    "explain": "attnopt explain plan.json layers.3.self_attn.5\n"
    "attnopt explain plan.json 3.5 --profile profile.safetensors --all",
    "diff": "attnopt diff monday.json tuesday.json\nattnopt diff --exit-code a.safetensors b.safetensors",
    "bench": "attnopt bench demo --plan plan.json --lengths 4096,8192 --dtype bf16\n"
    "attnopt bench demo --plan plan.json --lengths 4096 --generate 64",
    "bisect": "attnopt bisect demo --length 512\nattnopt bisect -- python check.py",
    "env": "attnopt env --json",
    "demo": "attnopt demo\nattnopt demo --out report-folder --quick",
    "completion": "attnopt completion bash > ~/.local/share/bash-completion/completions/attnopt\n"
    "attnopt completion zsh > ~/.zfunc/_attnopt",
}
# What is left after Ctrl-C; nothing, of a command that is not here.
ONWARD = "run the same command again to go on."
INTERRUPTED = {
    "profile": f"What was profiled so far is kept beside the output; {ONWARD}",
    "distill": f"What was fitted and tried so far is kept beside the output; {ONWARD}",
    "calibrate": f"The lengths that were timed are kept; {ONWARD}",
    "plan": f"The kernels timed and the losses measured so far are kept; {ONWARD}",
    "bench": "Nothing is kept: times taken apart would not compare.",
    "demo": f"What was measured so far is kept in the folder; {ONWARD}",
}


def with_progress(made: Parser) -> None:
    made.add_argument(
        "--progress",
        choices=("auto", "always", "never"),
        default="auto",
        help="a bar on a terminal (auto), also a line now and then where there is none (always), or nothing (never)",
    )


def with_settings(made: Parser, of: str = "") -> None:
    """In what dtype, where and with which attention a model is loaded."""
    made.add_argument("--dtype", default="fp32", help=f"{of}fp32, bf16 or fp16 (default fp32)")
    made.add_argument("--device", default="cpu", help=f"{of}cpu or cuda (default cpu)")
    made.add_argument("--attention", default="sdpa", help="transformers' attn_implementation (default sdpa)")


def with_model(made: Parser, optional: bool = False) -> None:
    with_progress(made)
    help = "demo, a directory, a hub name, or module:callable"
    made.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=help)
    with_settings(made)


def with_text(made: Parser) -> None:
    made.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text files, - for standard input; default: Python's own library source; "
        "to profile also .jsonl conversations",
    )
    made.add_argument("--seed", type=int, default=0)


def examine(made: Parser) -> None:
    with_model(made, optional=True)
    made.add_argument(
        "--config", metavar="NAME",
        help="a model with random weights in place of MODEL: a model type, a class of transformers or a config.json",
    )  # fmt: skip
    made.add_argument("--tiny", action="store_true", help="with --config: a few small layers of every type it has")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="with --config: change a field; may be repeated"
    )
    made.add_argument("--length", type=one_length, help="tokens of the traced input (default 256)")
    made.add_argument(
        "--lengths", type=whole_numbers, default=[1024, 8192], help="count savings at these (default 1024,8192)"
    )
    made.add_argument("--time", action="store_true", help="time each attention before and after, at --length")
    made.add_argument("--dynamic", action="store_true", help="trace with symbolic lengths (torch.compile's dynamic)")
    made.add_argument(
        "--prompt-only", action="store_true", help="trace one prompt: no decoding, nothing that recompiles"
    )
    made.add_argument("--padded", action="store_true", help="trace with a padding mask")
    made.add_argument("--html", metavar="FILE", help="also write a page")


def profile(made: Parser) -> None:
    with_model(made)
    with_text(made)
    made.add_argument("--out", required=True, metavar="FILE", help="the profile (safetensors)")
    made.add_argument(
        "--lengths",
        type=whole_numbers,
        default=[1024, 2048, 4096],
        help="tokens of the sequences (default 1024,2048,4096)",
    )
    made.add_argument("--samples", type=count, default=4, help="sequences at each length (default 4)")
    made.add_argument("--windows", type=whole_numbers, default=None, help="windows observed")
    made.add_argument(
        "--labels",
        choices=("model", "data", "continuation"),
        default="model",
        help="drawn from the model (default), the tokens that follow, or drawn on a text's "
        "continuation by the model itself",
    )
    made.add_argument("--draws", type=count, default=1, help="draws of labels, each a backward pass (default 1)")
    made.add_argument(
        "--forward-only", action="store_true", help="no backward pass: how far outputs move, not damages in nats"
    )
    made.add_argument(
        "--recompute", action="store_true", help="run each layer again in the backward pass: less memory, more time"
    )
    made.add_argument("--greedy", action="store_true", help="continue by the most likely token, not by sampling")
    made.add_argument(
        "--probe",
        type=count_or_none,
        metavar="N",
        help="beside the text N documents of key-value lines and late questions at each length, for "
        "heads that reach far (default 2; none with --forward-only)",
    )


def merge(made: Parser) -> None:
    made.add_argument("profiles", nargs="+", metavar="PROFILE")
    made.add_argument("--out", required=True, metavar="FILE", help="their sum (safetensors)")
    made.add_argument("--mixed", action="store_true", help="also add profiles whose losses were of something else")


def distill(made: Parser) -> None:
    with_model(made)
    with_text(made)
    made.add_argument("--profile", required=True, metavar="FILE", help="of this model: its lengths are tried")
    made.add_argument("--out", required=True, metavar="FILE", help="what was fitted and tried (safetensors)")
    made.add_argument(
        "--features",
        type=whole_numbers,
        default=[32, 64],
        help="of exponential maps, random or learned (default 32,64)",
    )
    made.add_argument("--ranks", type=whole_numbers, default=[8], help="of second-order expansions (default 8)")
    made.add_argument(
        "--windows", type=whole_numbers, default=[64, 128, 256], help="kept exactly beside them (default 64,128,256)"
    )
    made.add_argument("--sinks", type=numbers_or_none, default=[4], help="first keys kept exactly (default 4)")
    made.add_argument(
        "--steps",
        type=count_or_none,
        default=200,
        metavar="N",
        help="of training a learned map; 0: none is learned (default 200)",
    )
    made.add_argument(
        "--samples", type=count, default=4, help="sequences to fit on, and to try on at each length (default 4)"
    )
    made.add_argument(
        "--families",
        type=names,
        metavar="FAMILIES",
        help="what is fitted and tried, all that a plan is to weigh in one run, as it takes one file (default: "
        "linear,taylor,compensation,prune; others: blocks,threshold,tokens)",
    )


def with_constraints(made: Parser) -> None:
    made.add_argument("--min-speedup", type=speedup, metavar="X", help="of what the objective weighs, at --length")
    made.add_argument(
        "--max-kv-memory", type=memory, metavar="SHARE|BYTES", help="for example 40%% of dense, or 512MiB a sequence"
    )
    made.add_argument("--max-rules", type=count, metavar="R", help="distinct spans of one layer (prefill: default 4)")
    made.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="LAYER[.HEAD]",
        help="leave dense; by name or number, may be repeated",
    )
    made.add_argument("--protect-top", type=count, metavar="K", help="leave dense the K heads whose removal hurts most")
    made.add_argument(
        "--dense-below", type=count_or_none, metavar="N",
        help="under this length all heads run dense (default: where the plan is predicted to save nothing; 0: never)",
    )  # fmt: skip


def plan(made: Parser) -> None:
    with_model(made)
    with_text(made)
    made.add_argument("--profile", required=True, metavar="FILE", help="of this model")
    made.add_argument("--out", required=True, metavar="FILE", help="the plan (JSON)")
    budget = made.add_mutually_exclusive_group()
    budget.add_argument("--max-loss-increase", type=budget_percent, default=1.0, metavar="PERCENT", help="default 1%%")
    budget.add_argument("--max-kl", type=not_negative, metavar="NATS", help="nats per token instead")
    made.add_argument("--length", type=count, default=8192, help="key length the plan is fastest at (default 8192)")
    made.add_argument(
        "--objective",
        default="prefill",
        choices=("prefill", "decode", "memory", "mixed"),
        help="what costs are weighed: prefill (default), decoding by what a step reads of the cache, memory by what it "
        "keeps, or half prefill and half decoding",
    )
    with_constraints(made)
    made.add_argument(
        "--exact",
        type=positive,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="solve with HiGHS as well, at most so long for each point tried (default 10)",
    )
    made.add_argument("--fitted", metavar="FILE", help="what `attnopt distill` fitted and tried: weighed beside spans")
    made.add_argument(
        "--allow",
        type=names,
        metavar="FAMILIES",
        help="of linear, taylor, compensation, prune, blocks, threshold and tokens, those weighed (default with "
        "--fitted: all that were tried but prune, which removes heads); tokens count in decoding alone",
    )
    made.add_argument(
        "--device-preset",
        metavar="NAME",
        help="a100, h100, h200, b200 or mi300x: costs by its peak figures, not measured",
    )
    made.add_argument("--tensor-parallel", type=count, default=1, metavar="D", help="of such devices (default 1)")
    made.add_argument("--devices", metavar="FILE", help="figures of devices in place of attnopt's (TOML)")
    made.add_argument(
        "--verify-lengths", type=whole_numbers, default=None, help="default: those profiled, and one beyond them"
    )
    made.add_argument(
        "--retrieval",
        type=not_negative,
        metavar="W",
        help="what a nat per answer of the profiled probe counts, in nats per token of text (default 0.05; 0: nothing)",
    )
    made.add_argument(
        "--samples", type=count, default=16, help="sequences of each verified length, 8 or more (default 16)"
    )
    made.add_argument(
        "--probe",
        type=count_or_none,
        default=4,
        metavar="N",
        help="documents of each length whose far lines are asked for (default 4)",
    )
    made.add_argument("--html", metavar="FILE", help="also write a page with the search and its front")


def calibrate(made: Parser) -> None:
    with_progress(made)
    made.add_argument("--model", metavar="MODEL", help="time the kernels of its attentions")
    for name in ("--heads", "--kv-heads", "--head-dim", "--head-dim-v"):
        made.add_argument(name, type=count)
    made.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16, or several: fp32,bf16 (default fp32)")
    made.add_argument("--lengths", type=whole_numbers, default=[1024, 2048, 4096, 8192])
    made.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    made.add_argument("--attention", default="sdpa", help="transformers' attn_implementation (default sdpa)")
    made.add_argument("--rounds", type=count, default=5, help="of which medians are kept (default 5)")


def show(made: Parser) -> None:
    made.add_argument("file", nargs="+", metavar="FILE", help="a plan or a profile; its kind may stand before it")
    made.add_argument("--svg", metavar="FILE", help="also draw a profile's maps (needs matplotlib)")
    made.add_argument("--png", metavar="FILE", help="the same as PNG")
    made.add_argument("--html", metavar="FILE", help="also write a page")
    made.add_argument("--profile", metavar="FILE", help="of a plan: with it the page has candidates and the front")
    made.add_argument("--fitted", metavar="FILE", help="what `attnopt distill` fitted for the plan")
    made.add_argument("--model", metavar="MODEL", help="of a plan: with it the page has graphs and kernels")
    with_settings(made, "of the model: ")


def explain(made: Parser) -> None:
    made.add_argument("plan", metavar="PLAN")
    made.add_argument(
        "head",
        metavar="SITE.HEAD",
        help="for example model.layers.3.self_attn.5, or layers.3.5, or 3.5: head 5 of the fourth site",
    )
    made.add_argument("--profile", metavar="FILE", help="the plan's own (default: found in the plan's folder)")
    made.add_argument("--fitted", metavar="FILE", help="what `attnopt distill` fitted: what was tried for the head")
    made.add_argument("--model", metavar="MODEL", help="the plan's own: how its heads share keys, and their sizes")
    with_settings(made, "of the model: ")
    made.add_argument("--all", action="store_true", help="also the candidates that are best at no price")


def diff(made: Parser) -> None:
    made.add_argument("one", metavar="ONE", help="a plan or a profile")
    made.add_argument("other", metavar="OTHER", help="another of its kind")
    made.add_argument("--exit-code", action="store_true", help="end with 1 where they differ, else with 0")


def bench(made: Parser) -> None:
    with_model(made)
    with_text(made)
    made.add_argument("--plan", metavar="FILE")
    made.add_argument("--lengths", type=whole_numbers, default=[4096])
    made.add_argument("--rounds", type=count, default=5)
    made.add_argument("--padded", action="store_true", help="with a padding mask")
    made.add_argument(
        "--generate",
        type=count,
        nargs="?",
        const=32,
        metavar="N",
        help="time `model.generate` instead: N new tokens after a prompt (default 32), with "
        "transformers' caches, attnopt's exact one and the plan's",
    )
    made.add_argument("--batch", type=count, default=1, help="sequences that are generated at once (default 1)")


def bisect(made: Parser) -> None:
    with_model(made, optional=True)
    made.usage = "attnopt bisect [options] MODEL\n       attnopt bisect [--json] -- COMMAND ..."
    made.before_command = "of_command"
    made.add_argument("--plan", metavar="FILE", help="rewrite by a plan; needs --tolerance")
    made.add_argument("--length", type=count, default=256, help="tokens of the input (default 256)")
    made.add_argument(
        "--tolerance",
        type=positive,
        metavar="X",
        help="relative difference of a token's logits from eager's that is right "
        "(default: by the dtype, and at least four times eager's own difference from a wider one)",
    )


def demo(made: Parser) -> None:
    with_progress(made)
    made.add_argument("--out", default="attnopt-demo", metavar="FOLDER", help="default attnopt-demo")
    made.add_argument("--quick", action="store_true", help="short lengths and few samples: a minute, for tests")


def completion(made: Parser) -> None:
    made.add_argument("shell", choices=("bash", "zsh", "tcsh"))


OPTIONS: dict[str, Callable[[Parser], None]] = {
    "examine": examine,
    "profile": profile,
    "merge": merge,
    "distill": distill,
    "plan": plan,
    "calibrate": calibrate,
    "show": show,
    "explain": explain,
    "diff": diff,
    "bench": bench,
    "bisect": bisect,
    "env": lambda made: None,
    "demo": demo,
    "completion": completion,
}
# These print no document: what comes out is a script.
WITHOUT_JSON = ("completion",)


def build_parser() -> Parser:
    from attnopt import __version__

    parser = CommandsParser(prog="attnopt", description="Make the attention of any PyTorch model cheaper.")
    parser.add_argument("--version", action="version", version=f"attnopt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, told in HELP.items():
        made: Parser = commands.add_parser(
            name,
            help=told,
            description=told.capitalize() + ".",
            epilog="examples:\n  " + EXAMPLES[name].replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name not in WITHOUT_JSON:
            made.add_argument("--json", action="store_true", help="print one JSON document on standard output")
        OPTIONS[name](made)
    return parser
