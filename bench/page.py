"""The results of the benchmarks as one page for a browser, which loads nothing and runs no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.charts import charts_of
from dynacut.cli.pages import FILES, page

_HERE = Path(__file__).parent
_STYLES = (FILES / "picture.css", FILES / "bars.css", _HERE / "page.css")


def page_of(document: dict[str, Any]) -> str:
    """The page for the JSON of bench/run.py."""
    benchmarks = document["benchmarks"]
    claims = [claim for each in benchmarks for claim in each["claims"]]
    return page(
        _HERE / "page.html.j2",
        _STYLES,
        machine=document["machine"],
        peers=document["peers"],
        claims=len(claims),
        holding=sum(claim["holds"] for claim in claims),
        quick=any(each["quick"] for each in benchmarks),
        benchmarks=[
            {
                **each,
                "paragraphs": [text.replace("\n", " ") for text in each["about"].split("\n\n")],
                "charts": [chart.drawn() for chart in charts_of(each["name"], each["figures"])],
                "day": each["date"].replace("T", " ").replace("Z", " UTC"),
            }
            for each in benchmarks
        ],
    )
