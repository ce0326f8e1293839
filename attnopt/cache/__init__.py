"""The ragged cache: how many slots each KV head of a layer has, and where. See `layout.py`."""

from attnopt.cache.layout import Layout, layouts_of

__all__ = ["Layout", "layouts_of"]
