"""Outcomes of all tries, counted, and the table that is printed."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

OUTCOMES = ("same", "named", "unnamed", "silent", "refused", "traceback", "hang", "crash", "harm")
"""Possible outcomes of a try.

same        the result is that of a run without the fault
named       exit code 2, and one sentence that names the file or the key
unnamed     exit code 2, and a sentence that does not
silent      exit code 0, and another result
refused     a run that should have gone on ended with exit code 2
traceback   exit code 1
hang        no end within ten seconds
crash       ended by a signal
harm        code that a file named was run, a file outside was written, or memory was not kept
"""
GOOD = {"same", "named"}


def outcome_of(code: int | None) -> str:
    """Outcome by the exit code alone; None is a command that did not end."""
    return {None: "hang", 0: "same", 1: "traceback", 2: "named"}.get(code, "crash")


class Table:
    """Rows of `fault, command -> outcomes`."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.allowed: dict[tuple[str, str], set[str]] = {}
        self.examples: list[str] = []

    def add(
        self,
        fault: str,
        command: str,
        outcome: str,
        example: str = "",
        *,
        allowed: Iterable[str] = (),
    ) -> None:
        """Count a try; `allowed` are outcomes that the format of the file cannot prevent."""
        key = fault, command
        self.counts.setdefault(key, Counter())[outcome] += 1
        self.allowed.setdefault(key, set()).update(allowed)
        if outcome not in GOOD | self.allowed[key]:
            self.examples.append(f"{outcome}: {fault}, {command}: {example}")
            print(self.examples[-1], flush=True)

    def tries(self) -> int:
        """Number of tries."""
        return sum(counts.total() for counts in self.counts.values())

    def bad(self) -> int:
        """Number of tries with an outcome that must not be."""
        return sum(
            count
            for key, counts in self.counts.items()
            for outcome, count in counts.items()
            if outcome not in GOOD | self.allowed[key]
        )

    def lines(self) -> list[str]:
        """Lines of the table in Markdown; outcomes that the format allows are in brackets."""
        lines = [
            "| " + " | ".join(("fault", "command", "tries", *OUTCOMES)) + " |",
            "|" + "---|" * (3 + len(OUTCOMES)),
        ]
        for (fault, command), counts in self.counts.items():
            cells = [
                f"({counts[outcome]})"
                if counts[outcome] and outcome in self.allowed[fault, command] - GOOD
                else str(counts[outcome] or "")
                for outcome in OUTCOMES
            ]
            lines.append(" | ".join((f"| {fault}", command, str(counts.total()), *cells)) + " |")
        total: Counter[str] = sum(self.counts.values(), Counter())
        cells = [str(total[outcome] or "") for outcome in OUTCOMES]
        lines.append(" | ".join(("| all", "", str(total.total()), *cells)) + " |")
        return lines

    def write(self, path: Path) -> None:
        """Write the table, and an example of every outcome that must not be."""
        path.write_text("\n".join([*self.lines(), "", *self.examples, ""]))
