"""README.md does what it says: its Python runs. The files that it and the pages of docs/ point to exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "README.md").read_text()


def test_the_language_model_of_the_readme_learns_with_two_lines_more_than_with_adam() -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(snippet.splitlines()) <= 28
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    losses = names["losses"]
    assert isinstance(losses, list)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda page: page.name)
def test_every_file_that_a_page_points_to_exists(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text) + re.findall(r'src="(?!https?:)([^"]+)"', text)
    assert links or page.name != "README.md"
    for link in links:
        assert (page.parent / link).exists(), link
