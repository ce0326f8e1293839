"""Links that lead out of this folder, to a file of the repository: on the site, the file's path instead.

A forge follows such a link; the site has no copy of the file, and says where it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class NameTheFile(SphinxTransform):
    """[the rules](../CONTRIBUTING.md) -> the rules (`CONTRIBUTING.md`). What leads nowhere stays, and is warned of."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        folder, docs = Path(self.env.doc2path(self.env.docname)).parent, Path(self.env.srcdir)
        links = [*self.document.findall(addnodes.download_reference), *self.document.findall(addnodes.pending_xref)]
        for node in links:
            target = (folder / node["reftarget"]).resolve()
            if node.get("refdomain") == "doc" and not target.exists():
                target = target.with_name(f"{target.name}.md")
            if target.is_relative_to(docs) or not target.exists():
                continue
            name = target.relative_to(docs.parent).as_posix()
            told = list(node.children)
            if target.name not in node.astext():
                told += [nodes.Text(" ("), nodes.literal(name, name), nodes.Text(")")]
            node.replace_self(told)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(NameTheFile)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
