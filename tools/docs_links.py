"""A hook of MkDocs: pages that lie elsewhere and are linked into docs/ find their neighbours.

examples/gpt3_1.3b/README.md and benchmarks/convergence/README.md are read in the repository too,
where ``../../docs/planning.md`` is what in the site is ``../planning.md``.
"""

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's text with links that hold in the site."""
    return markdown.replace("](../../docs/", "](../")
