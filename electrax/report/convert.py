"""What a person sees of a conversion: what became of the tensors, and what was left out and why."""

from collections.abc import Mapping

from electrax.experiment.foreign import REPORT_FILE, ConvertConfig
from electrax.experiment.saved import convert
from electrax.report.common import show_line

MOST_NAMES = 3  # of tensors left out for one reason


def convert_and_report(config: ConvertConfig) -> None:
    """The command `convert`."""
    report = convert(config)
    show_line("from", config.source)
    show_line("to", f"{config.out} ({report['to']})")
    for folder, names in report.get("written", {}).items():
        show_line("written", f"{len(names)} tensors" + (f" in {folder}" if folder else ""))
    if "used" in report:
        show_line("used", f"{len(report['used'])} tensors")
    for reason, names in _by_reason(report.get("left_out", {})).items():
        shown = ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if names[MOST_NAMES:] else "")
        show_line("left out", f"{shown}: {reason}")
    show_line("report", f"{config.out}/{REPORT_FILE}")


def _by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
