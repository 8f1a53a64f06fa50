"""dynacut doctor: what works on this machine, what each missing piece costs, and how to mend it."""

from __future__ import annotations

import argparse

from dynacut.cli.console import print_json, print_table
from dynacut.shared.errors import ExitStatus, printable
from dynacut.shared.report import SCHEMA

HELP = "what works on this machine, and how to mend what does not"
DESCRIPTION = (
    "Try out what dynacut needs: the kernel, permissions, CRIU, gdb, the compiler. For each piece that is missing, say "
    "what it costs and how to get it. Nothing is changed. Exit status 0 if running processes can be patched, else 1."
)
EPILOG = """examples:
  dynacut doctor
  dynacut doctor --json
"""


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="twice: trace back errors")


def run(arguments: argparse.Namespace) -> ExitStatus:
    """Looks, and says what was found."""
    from dynacut.live import diagnosis as live
    from dynacut.offline import diagnosis as offline
    from dynacut.shared import diagnosis
    from dynacut.shared.diagnosis import Area, State, works

    found = [*live.diagnose(), *offline.diagnose(), *diagnosis.basis()]
    findings = [each for area in Area for each in found if each.area is area]
    working = {str(area): works(findings, area) for area in Area if area is not Area.BASIS}
    if arguments.json:
        checks = [
            {
                "name": each.name,
                "area": str(each.area),
                "state": str(each.state),
                "found": printable(each.found),
                "costs": each.costs,
                "mend": each.mend,
            }
            for each in findings
        ]
        print_json({"schema": SCHEMA, "works": working, "checks": checks})
    else:
        rows = [[str(each.area), each.name, str(each.state), each.found] for each in findings]
        print_table("this machine", ["for", "piece", "state", "found"], rows)
        for each in findings:
            if each.state is not State.OK:
                print(f"\n{each.name} ({each.state}): {each.costs}\n  to mend: {printable(each.mend)}")
        print("\n" + ", ".join(f"{name}: {'works' if good else 'does not work'}" for name, good in working.items()))
    return ExitStatus.DONE if working[Area.LIVE] else ExitStatus.REFUSED
