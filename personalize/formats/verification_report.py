"""What the verification of an adapter found, file by file."""

from __future__ import annotations

from dataclasses import dataclass

from personalize.errors import UserError


@dataclass(frozen=True)
class FileReport:
    """The result of comparing one file: how many modules (or tensors) match, the largest deviation, the problems.

    note: said in place of these, if there was nothing to compare with.
    """

    file: str
    matched: int
    total: int
    deviation: float
    worst: str
    problems: tuple[str, ...]
    unit: str = "modules"
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return f"note: {self.note}"
        text = f"{self.file}: {self.matched} / {self.total} {self.unit} match, largest deviation {self.deviation:.1e}"
        lines = [text + (f" ({self.worst})" if self.deviation else "")]
        listed, omitted = [f"  {problem}" for problem in self.problems[:20]], len(self.problems) - 20
        return "\n".join([*lines, *listed, *([f"  and {omitted} more"] if omitted > 0 else [])])


@dataclass(frozen=True)
class VerificationReport:
    """The results of verifying an adapter, file by file."""

    files: tuple[FileReport, ...]

    @property
    def ok(self) -> bool:
        """True if no file has a problem."""
        return not any(file.problems for file in self.files)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.files), "verified" if self.ok else "NOT verified"])

    def require(self) -> VerificationReport:
        """This report if it has no problem; otherwise UserError with the first problem and their number."""
        problems = [f"{file.file}: {problem}" for file in self.files for problem in file.problems]
        if problems:
            raise UserError(f"the adapter does not verify, {len(problems)} problem(s); first: {problems[0]}")
        return self
