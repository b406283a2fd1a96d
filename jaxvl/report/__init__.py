"""What a person watches while a run goes, and reads when it is over. The faces; each module here does one thing."""

from jaxvl.progress import progress, say
from jaxvl.report.log import RunLog, open_log
from jaxvl.report.metrics import read_metrics
from jaxvl.report.options import LogOptions, check
from jaxvl.report.page import write_report
from jaxvl.report.summary import last_line, print_values

__all__ = [
    "LogOptions",
    "RunLog",
    "check",
    "last_line",
    "open_log",
    "print_values",
    "progress",
    "read_metrics",
    "say",
    "write_report",
]
