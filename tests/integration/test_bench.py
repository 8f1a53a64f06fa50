"""make bench: what it writes after a small run, with and without its peers. Figures are not tested, only their form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from html_elements import Elements

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *options: str, path: str | None = None) -> tuple[subprocess.CompletedProcess[str], Any, Elements]:
    """A quick run of one repetition: how it ended, its JSON and its page."""
    output = folder / "bench.json"
    command = [sys.executable, str(ROOT / "bench/run.py"), "--quick", "--repeat", "1", "--json", str(output), *options]
    environment = {**os.environ, "PATH": path or os.environ["PATH"]}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert output.exists(), done.stderr
    page = Elements(output.with_suffix(".html").read_text())
    assert page.loads_nothing
    return done, json.loads(output.read_text()), page


def only(document: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (each for each in document["benchmarks"] if each["name"] == name)
    assert isinstance(found, dict)
    return found


def test_a_run_gives_figures_claims_and_a_page_with_all_of_them(tmp_path: Path) -> None:
    done, document, page = run(tmp_path, "--only", "hit")
    assert done.returncode == 0, done.stderr
    (hit,) = document["benchmarks"]
    assert (hit["name"], hit["error"], hit["repeat"], hit["quick"]) == ("hit", None, 1, True)
    by_peer = {each["peer"] for each in hit["figures"]}
    assert {"dynacut", "undisturbed", "floor"} <= by_peer
    for figure in hit["figures"]:
        assert figure["count"] == len(figure["values"]) > 0
        assert 0 < figure["min"] <= figure["median"] <= figure["p90"] <= figure["max"]
    assert hit["claims"]
    for claim in hit["claims"]:
        assert f"claim {claim['claim']}: {claim['figure']}: " in done.stdout
        assert claim["claim"] in page.texts and claim["figure"] in page.texts
    assert sum("holds" in text or "does not hold" in text for text in page.texts) >= len(hit["claims"])
    # A bar for each case and peer, and a dot for each value.
    assert len(page.styles("bar")) == len(hit["figures"])
    assert len(page.styles("dot")) == sum(each["count"] for each in hit["figures"])
    for table in hit["tables"]:
        assert any(table["title"] in text for text in page.texts)
    assert any("--quick" in text for text in page.texts)


def test_what_is_missing_or_fails_is_said_and_loses_nothing_else(tmp_path: Path) -> None:
    """A PATH without programs: no compiler for what has programs of its own, no gdb, no valgrind."""
    programs = tmp_path / "bin"
    programs.mkdir()
    done, document, page = run(tmp_path, "--only", "library", "kill", path=str(programs))
    assert done.returncode == 1
    library, kill = only(document, "library"), only(document, "kill")
    assert "gcc" in library["error"] and library["figures"] == library["claims"] == []
    assert kill["error"] is None and kill["figures"] and all(claim["holds"] for claim in kill["claims"])
    assert f"bench: library: {library['error']}" in done.stderr
    assert any(library["error"] in text for text in page.texts)
    missing = {each["name"]: each["not_measured"] for each in document["peers"]}
    assert "gdb is not installed" in missing["gdb"] and "valgrind is not installed" in missing["callgrind"]
    assert page.texts.count("NOT MEASURED") >= 2
    # A later run of one benchmark keeps the others, and puts its own in place of the older one.
    done, again, _ = run(tmp_path, "--only", "library", "--keep", path=str(programs))
    assert done.returncode == 1
    assert [each["name"] for each in again["benchmarks"]] == ["library", "kill"]
    assert only(again, "kill") == kill
    assert only(again, "library")["date"] >= library["date"]
