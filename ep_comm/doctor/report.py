"""What checks found, a line each:

[ok|warn|skip|fail] Dn subject: measured (need ...); effect; fix
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

Status = Literal["ok", "warn", "skip", "fail"]

JSON_VERSION: Final = 1  # of the keys below; raised when one changes its meaning


@dataclass(frozen=True)
class Finding:
    """One line. `measured` says what was found, or for "skip" why it could not be looked for."""

    check: str  # "D1" to "D11"
    status: Status
    subject: str
    measured: str
    need: str = ""
    effect: str = ""
    fix: str = ""
    code: str = ""  # of ep_comm.errors, when a Buffer would raise it

    def line(self) -> str:
        """For people and for grep; never longer than one line."""
        parts = [self.measured + (f" (need {self.need})" if self.need else "")]
        effect = " ".join(part for part in (self.code, self.effect) if part)
        parts += [part for part in (effect, self.fix) if part]
        text = f"[{self.status}] {self.check} {self.subject}: {'; '.join(parts)}"
        return " ".join(text.split())


@dataclass(frozen=True)
class Report:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]
    seconds: float
    environment: dict[str, Any]  # what `env_report()` gives

    @property
    def exit_code(self) -> int:
        """0 = ok or skipped, 1 = a warning, 2 = a failure."""
        found = {finding.status for finding in self.findings}
        return 2 if "fail" in found else 1 if "warn" in found else 0

    def as_dict(self) -> dict[str, Any]:
        """The same facts for scripts; stable keys."""
        return {
            "json_version": JSON_VERSION,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 2),
            "findings": [asdict(finding) for finding in self.findings],
            "environment": self.environment,
        }


def unmet(findings: Sequence[Finding], check: str, asked: str) -> list[Finding]:
    """`findings`, with those of a check that somebody requires made failures unless they are ok."""
    return [
        Finding(
            f.check, "fail", f.subject, f.measured, f.need or asked, f"required: {asked}",
            f.fix or "run without --require", f.code or "E404",
        )
        if f.check == check and f.status != "ok"
        else f
        for f in findings
    ]  # fmt: skip
