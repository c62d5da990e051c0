"""README.md does what it says: its Python runs, its files exist."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_every_file_the_readme_points_to_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE) + re.findall(r'src="(?!https?:)([^"]+)"', PAGE)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
