"""top_tokens: while decoding the head attends to the keys of the largest scores, found now and then, or earlier.

    keep j < sink or p - j < recent or j in T,    T: the k largest q.j when it was last selected

every, similar: selected anew after so many steps, or once the query is less similar than this to the one that selected,
as in Recycled Attention (Xu et al., "Recycled Attention: Efficient inference for long-context language models") and
TokenSelect (Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic
Token-Level KV Cache Selection"). behind: nothing is selected, and the tokens of the layer so many attentions before
are used, as in TidalDecode (Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse
Attention"), where every head selects for itself. `every` and `similar` are then 1 and 0.
"""

from __future__ import annotations

from attnopt.candidates import Param, Params
from attnopt.candidates._tokens import MOST_STEPS, Tokens
from attnopt.codegen.reference_tokens import TokenRule
from attnopt.ir import Choice
from attnopt.registry import CANDIDATES

MOST_LAYERS = 1 << 10
# Layers between one that selects and those that read it, where distilling tries it.
OFFERED_BEHIND = (1, 2, 3, 4, 6, 8)


class TopTokens(Tokens):
    name = "top_tokens"
    params = (
        *Tokens.kept,
        Param("every", int, 1, MOST_STEPS),
        Param("similar", float, 0.0, 1.0, 1 / 64),
        Param("behind", int, 0, MOST_LAYERS),
    )

    def menu(self, length: int) -> list[Choice]:
        """Found in each step, or in some, or by a guard; and read from layers before, as far as there are some."""
        alone = {"every": 1, "similar": 0.0, "behind": 0}
        ways = [alone, {**alone, "every": 8}, {**alone, "every": 64, "similar": 7 / 8}]
        ways += [{**alone, "behind": behind} for behind in OFFERED_BEHIND]
        return [choice for own in ways for choice in self.offered(own, length)]

    def token_rule(self, params: Params) -> TokenRule:
        count, sink, recent, every = (int(params[name]) for name in ("k", "sink", "recent", "every"))
        return TokenRule(count, sink, recent, every, float(params["similar"]))

    def behind(self, params: Params) -> int:
        return int(params["behind"])


CANDIDATES.register("top_tokens")(TopTokens())
