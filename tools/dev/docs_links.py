"""A hook of MkDocs: pages that lie elsewhere and are linked into docs/ find their neighbours.

README.md, CONTRIBUTING.md, CHANGELOG.md and the README.md of the examples and of the studies in
benchmarks/ are read in the repository too, where links differ from the site's.
"""

from typing import Any

# {what a link begins with in the repository: in the site}.
LINKS = {
    "](examples/early_bird/": "](early_bird_gpt3/",  # early_bird.md has the other name
    "](examples/": "](",
    "](benchmarks/policies/": "](policies_study/",  # policies.md has the other name
    "](benchmarks/early_bird/": "](early_bird_study/",
    "](benchmarks/": "](",
    "](docs/": "](",
    "](CONTRIBUTING.md": "](contributing.md",
    "](CHANGELOG.md": "](changelog.md",
    "](../../docs/": "](../",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's text with links that hold in the site."""
    for ours, sites in LINKS.items():
        markdown = markdown.replace(ours, sites)
    return markdown
