"""The ragged cache: how many slots each KV head of a layer has, and where (`layout.py`), and which heads select what
they read of it (`tokens.py`)."""

from attnopt.cache.layout import Layout, layouts_of
from attnopt.cache.tokens import TokenTable, token_tables, tokens_of

__all__ = ["Layout", "TokenTable", "layouts_of", "token_tables", "tokens_of"]
