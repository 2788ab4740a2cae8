"""The committed results and the page made of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))


@pytest.mark.parametrize("about", sorted((ROOT / "results").glob("*/about.yaml")), ids=lambda path: path.parent.name)
def test_results_are_whole(about: Path) -> None:
    """Each stored result has the id that its config hashes to, was measured, and holds no path of a machine."""
    from sdae.config import parse, run_id

    files = sorted((about.parent / "runs").glob("*/result.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text())
        assert result["id"] == file.parent.name == run_id(parse(result["config"]))
        assert result["synthetic"] is False
        path = result["config"]["data"]["path"]
        assert path is None or path.startswith("${SDAE_DATA}/")


def test_the_page_is_what_the_results_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import make_results

    monkeypatch.setattr(make_results, "PICTURES", tmp_path)
    assert make_results.page() == make_results.PAGE.read_text()
