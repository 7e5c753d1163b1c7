"""The notebook of the README is examples/notebook.py, word for word; tests/test_docs.py runs it."""

from __future__ import annotations

from examples.conftest import EXAMPLES


def test_the_readme_shows_the_file_word_for_word() -> None:
    text = (EXAMPLES / "notebook.py").read_text(encoding="utf-8")
    assert f"```python\n{text}```\n" in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 20
