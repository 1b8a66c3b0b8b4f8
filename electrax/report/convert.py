"""What a person sees of a conversion: what became of the tensors, and what was left out and why."""

from electrax.experiment.foreign import REPORT_FILE, ConvertConfig, by_reason
from electrax.experiment.saved import convert
from electrax.report.common import show_line


def convert_and_report(config: ConvertConfig) -> None:
    """The command `convert`."""
    report = convert(config)
    show_line("from", config.source)
    show_line("to", f"{config.out} ({report['to']})")
    for folder, names in report.get("written", {}).items():
        show_line("written", f"{len(names)} tensors" + (f" in {folder}" if folder else ""))
    if "used" in report:
        show_line("used", f"{len(report['used'])} tensors")
    for line in by_reason(report.get("left_out", {})):
        show_line("left out", line)
    show_line("report", f"{config.out}/{REPORT_FILE}")
