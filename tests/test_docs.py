"""What the documents show is what the code has, and what holds for all of the code."""

from __future__ import annotations

import ast
from pathlib import Path

from supervisor.tenant.lifecycle import TABLE

ROOT = Path(__file__).resolve().parents[1]


def test_the_lifecycle_in_the_design_is_the_table():
    lines = {
        f"{state.value:<9} --{happening.value:-<10}> {following.value}"
        for (state, happening), following in TABLE.items()
    }
    text = (ROOT / "docs" / "design.md").read_text()
    drawn = text.partition("<!-- lifecycle")[2].partition("```\n")[2].partition("```")[0]
    assert set(drawn.splitlines()) == lines


def test_every_document_that_is_linked_exists():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "fixtures" / "README.md"]:
        for link in document.read_text().split("](")[1:]:
            target = link.partition(")")[0].partition("#")[0]
            if target and "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_nothing_is_raised_in_an_except_star():
    """Before Python 3.11.4 it comes out in a group again, which no `except` of its type catches."""
    for source in [*(ROOT / "supervisor").rglob("*.py"), *(ROOT / "agent").rglob("*.py")]:
        for tried in ast.walk(ast.parse(source.read_text())):
            if isinstance(tried, ast.TryStar):
                raised = [
                    node for handler in tried.handlers for node in ast.walk(handler) if isinstance(node, ast.Raise)
                ]
                assert not raised, f"{source}:{raised[0].lineno}"
