"""The documentation builds as a site without a warning, asks for nothing from a network, and leaves nothing out."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from sphinx.application import Sphinx

import attnopt
from attnopt.completion import parsers_of
from attnopt.options import build_parser
from attnopt.parsing import HELP
from attnopt.plan.schema import plan_schema
from attnopt.registry import CANDIDATES

from .blocks import ROOT, pages

Built = tuple[Path, str]
FETCHED = re.compile(
    r'<(?:script|img|iframe|source|object|embed)\b[^>]*\b(?:src|data|srcset)="([^"]*)"|<link\b[^>]*href="([^"]*)"'
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The folder of the pages, and the warnings: as `make docs` builds them."""
    folder, warnings = tmp_path_factory.mktemp("site"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        app = Sphinx(
            ROOT / "docs", ROOT / "docs", folder, folder / ".doctrees", "html",
            confoverrides={"nitpicky": True}, status=None, warning=warnings,
        )  # fmt: skip
        app.build()
    return folder, warnings.getvalue()


def text_of(built: Built, page: str) -> str:
    return (built[0] / f"{page}.html").read_text(encoding="utf-8")


def test_it_builds_without_a_warning(built: Built) -> None:
    """Links to pages and their headings among them."""
    assert not built[1]
    assert all((built[0] / f"{page[5:-3]}.html").exists() for page in pages() if page.startswith("docs/"))


def test_it_asks_nothing_of_a_network(built: Built) -> None:
    """Scripts, styles, pictures and fonts are files of the site; other addresses are links to follow."""
    asked = [a or b for path in built[0].rglob("*.html") for a, b in FETCHED.findall(path.read_text("utf-8"))]
    styles = [
        url for path in built[0].rglob("*.css") for url in re.findall(r"url\(['\"]?([^'\")]+)", path.read_text("utf-8"))
    ]
    imports = [path.name for path in built[0].rglob("*.css") if re.search(r"@import\b", path.read_text("utf-8"))]
    outside = [url for url in asked + styles if re.match(r"(https?:)?//", url)]
    assert len(asked) > 100 and not outside and not imports


def test_every_page_is_in_the_sidebar_and_names_the_version(built: Built) -> None:
    first = text_of(built, "index")
    tree = first[first.index("sidebar-tree") :]
    for page in pages():
        if page.startswith("docs/") and page != "docs/index.md":
            assert f'href="{page[5:-3]}.html"' in tree, page
    assert f"attnopt {attnopt.__version__}" in first and "Edit this page" not in first


def test_the_command_reference_has_every_option(built: Built) -> None:
    page = text_of(built, "reference/commands")
    commands = {parser.prog.split()[-1]: parser for parser in parsers_of(build_parser())[1:]}
    assert set(commands) == set(HELP)
    for name, parser in commands.items():
        section = page.split(f'<section id="{name}">')[1].split("<section id=")[0]
        options = [option for action in parser._actions for option in action.option_strings if "-h" not in option]
        assert all(f">{option}</span>" in section for option in options), (name, options)


def test_the_plan_reference_has_every_key_and_candidate(built: Built) -> None:
    page = text_of(built, "plan-file")
    keys = plan_schema()["properties"]
    assert all(f'<span class="pre">{key}</span>' in page for key in (*keys, *keys["predicted"]["properties"]))
    assert all(f'<span class="pre">{name}</span>' in page for name, _ in CANDIDATES)


def test_the_python_reference_has_every_public_name(built: Built) -> None:
    page = text_of(built, "api")
    assert all(f'id="attnopt.{name}"' in page for name in attnopt.__all__)


def test_a_link_that_leads_out_of_the_folder_says_where(built: Built) -> None:
    page = text_of(built, "index")
    assert "CONTRIBUTING.md" in page and 'href="../CONTRIBUTING' not in page
    assert not list(built[0].rglob("CONTRIBUTING*"))
