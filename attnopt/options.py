"""Every command and its options. Nothing here imports torch, so that help and completion are there at once."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from typing import Any, NoReturn

from attnopt.arguments import (
    budget_percent,
    count,
    count_or_none,
    memory,
    names,
    not_negative,
    numbers_or_none,
    positive,
    speedup,
    whole_numbers,
)

EXAMPLES = {
    "examine": "attnopt examine demo\nattnopt examine ./my-llama --length 512 --json",
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
    "explain": "attnopt explain plan.json model.layers.3.self_attn.5 --profile profile.safetensors",
    "bench": "attnopt bench demo --plan plan.json --lengths 4096,8192 --dtype bf16\n"
    "attnopt bench demo --plan plan.json --lengths 4096 --generate 64",
    "bisect": "attnopt bisect demo --length 512\nattnopt bisect -- python check.py",
    "env": "attnopt env --json",
    "demo": "attnopt demo\nattnopt demo --out report-folder --quick",
}
HELP = {
    "examine": "list every attention of a model: what was recognised, what would be done, or why not",
    "profile": "measure what dropping keys would do to the loss, head by head",
    "merge": "add up profiles of one model over different text",
    "distill": "fit what may stand in for heads' far keys, and measure what it does to the loss",
    "calibrate": "time the kernels of this device, once, for all plans made here",
    "plan": "choose the fastest spans that keep a loss budget, measured end to end",
    "show": "show a plan or a profile",
    "explain": "the candidates that were weighed for one head, and why the choice won",
    "bench": "time a model: eager, inductor, attnopt exact and planned, interleaved",
    "bisect": "find the rewrite that breaks a model's output, or the check of any command",
    "env": "versions, hardware and settings, to paste into a report",
    "demo": "the whole path on the small trained model that ships with attnopt",
}


class Parser(argparse.ArgumentParser):
    """An unknown command or option names the nearest one and exits with 2."""

    # Where it takes a command line of its own after --: what that is called, None without one.
    before_command = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if not self.before_command:
            return super().parse_known_args(args, namespace)
        given = list(args)
        at = given.index("--") if "--" in given else len(given)
        found, left = super().parse_known_args(given[:at], namespace)
        setattr(found, self.before_command, given[at + 1 :] if at < len(given) else None)
        return found, left

    def error(self, message: str) -> NoReturn:
        words = [w.strip(":,()").partition("=")[0] for w in message.replace("'", " ").split()]
        known = [*HELP, *self.options_known()]
        unknown = [w for w in words if (w.startswith("--") or f"'{w}'" in message) and w not in known]
        near = next((m for w in unknown for m in difflib.get_close_matches(w, known, 1)), "")
        hint = f"\n  Did you mean {near}?" if near else f"\n  See `{self.prog} --help`."
        self.exit(2, f"{self.prog}: {message}{hint}\n")

    def options_known(self) -> list[str]:
        """The options of this parser and, since leftovers are only found at the top, of its commands."""
        inner = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [p for choices in inner for p in choices.values()]
        return [*self._option_string_actions, *(o for p in parsers for o in p._option_string_actions)]


def with_model(made: Parser, optional: bool = False) -> None:
    help = "demo, a directory, a hub name, or module:callable"
    made.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=help)
    made.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16 (default fp32)")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    made.add_argument("--attention", default="sdpa", help="transformers' attn_implementation (default sdpa)")


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
    with_model(made)
    made.add_argument("--length", type=int, default=256, help="tokens of the traced input (default 256)")
    made.add_argument("--padded", action="store_true", help="trace with a padding mask")
    made.add_argument("--html", metavar="FILE", help="also write a page")


def profile(made: Parser) -> None:
    with_model(made)
    with_text(made)
    made.add_argument("--out", required=True, metavar="FILE")
    made.add_argument("--lengths", type=whole_numbers, default=[1024, 2048, 4096])
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
    made.add_argument("--out", required=True, metavar="FILE")
    made.add_argument("--mixed", action="store_true", help="also add profiles whose losses were of something else")


def distill(made: Parser) -> None:
    with_model(made)
    with_text(made)
    made.add_argument("--profile", required=True, metavar="FILE", help="of this model: its lengths are tried")
    made.add_argument("--out", required=True, metavar="FILE")
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
        help="what is fitted and tried (default: linear,taylor,compensation,prune)",
    )


def plan(made: Parser) -> None:
    with_model(made)
    with_text(made)
    made.add_argument("--profile", required=True, metavar="FILE")
    made.add_argument("--out", required=True, metavar="FILE")
    budget = made.add_mutually_exclusive_group()
    budget.add_argument("--max-loss-increase", type=budget_percent, default=1.0, metavar="PERCENT", help="default 1%%")
    budget.add_argument("--max-kl", type=not_negative, metavar="NATS", help="nats per token instead")
    made.add_argument("--length", type=count, default=8192, help="key length the plan is fastest at (default 8192)")
    made.add_argument(
        "--objective",
        default="prefill",
        choices=("prefill", "decode", "memory", "mixed"),
        help="what costs are weighed: prefill (default), decoding or memory by what the cache keeps, or half of both",
    )
    made.add_argument("--min-speedup", type=speedup, metavar="X", help="of what the objective weighs, at --length")
    made.add_argument(
        "--max-kv-memory", type=memory, metavar="SHARE|BYTES", help="for example 40%% of dense, or 512MB a sequence"
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
    made.add_argument("--dense-below", type=count, metavar="N", help="under this length all heads run dense")
    made.add_argument(
        "--exact",
        type=positive,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="solve with HiGHS as well, at most so long for each point tried (default 10)",
    )
    made.add_argument("--fitted", metavar="FILE", help="what `attnopt distill` fitted: weigh it beside spans")
    made.add_argument(
        "--allow",
        type=names,
        metavar="FAMILIES",
        help="of linear, taylor, compensation and prune, those weighed (default with --fitted: all but "
        "prune, which removes heads)",
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
    made.add_argument("--samples", type=count, default=16, help="sequences of each verified length (default 16)")
    made.add_argument(
        "--probe",
        type=count_or_none,
        default=4,
        metavar="N",
        help="documents of each length whose far lines are asked for (default 4)",
    )


def calibrate(made: Parser) -> None:
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


def explain(made: Parser) -> None:
    made.add_argument("plan", metavar="PLAN")
    made.add_argument("head", metavar="SITE.HEAD", help="for example model.layers.3.self_attn.5")
    made.add_argument("--profile", required=True, metavar="FILE")
    made.add_argument("--fitted", metavar="FILE", help="what `attnopt distill` fitted: what was tried for the head")


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
    made.add_argument("--out", default="attnopt-demo", metavar="FOLDER", help="default attnopt-demo")
    made.add_argument("--quick", action="store_true", help="short lengths and few samples: a minute, for tests")


OPTIONS: dict[str, Callable[[Parser], None]] = {
    "examine": examine,
    "profile": profile,
    "merge": merge,
    "distill": distill,
    "plan": plan,
    "calibrate": calibrate,
    "show": show,
    "explain": explain,
    "bench": bench,
    "bisect": bisect,
    "env": lambda made: None,
    "demo": demo,
}


def build_parser() -> Parser:
    from attnopt import __version__

    parser = Parser(prog="attnopt", description="Make the attention of any PyTorch model cheaper.")
    parser.add_argument("--version", action="version", version=f"attnopt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, told in HELP.items():
        made: Parser = commands.add_parser(
            name,
            help=told,
            description=told.capitalize() + ".",
            epilog="examples:\n  " + EXAMPLES[name].replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print one JSON document on standard output")
        OPTIONS[name](made)
    return parser
