"""A hook of MkDocs: pages that lie elsewhere and are linked into docs/ find their neighbours.

README.md, examples/gpt3_1.3b/README.md and benchmarks/convergence/README.md are read in the
repository too, where their links are other ones than in the site.
"""

from typing import Any

# {what a link begins with in the repository: in the site}. The first three are README.md's.
LINKS = {
    "](examples/": "](",
    "](benchmarks/": "](",
    "](docs/": "](",
    "](../../docs/": "](../",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's text with links that hold in the site."""
    for ours, sites in LINKS.items():
        markdown = markdown.replace(ours, sites)
    return markdown
