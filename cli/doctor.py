"""dynacut doctor: what works on this machine, what each missing piece costs, and how to mend it."""

from __future__ import annotations

import argparse

from dynacut.cli.arguments import add_output_options
from dynacut.cli.console import SCHEMA, print_json, print_table
from dynacut.shared.errors import ExitStatus, printable

HELP = "what works on this machine, and how to mend what does not"
USAGE = ("dynacut doctor",)
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
    add_output_options(parser)


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
    elif not arguments.quiet:
        rows = [[str(each.area), each.name, str(each.state), each.found] for each in findings]
        print_table("this machine", ["for", "piece", "state", "found"], rows)
        for each in findings:
            if each.state is not State.OK:
                print(f"\n{each.name} ({each.state}): {each.costs}\n  to mend: {printable(each.mend)}")
        print("\n" + ", ".join(f"{name}: {'works' if good else 'does not work'}" for name, good in working.items()))
    return ExitStatus.DONE if working[Area.LIVE] else ExitStatus.REFUSED
