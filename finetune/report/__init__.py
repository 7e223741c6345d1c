"""The report: what a run, or several beside each other, came to, as one HTML file for people."""

from finetune.report.write import show, write_report

__all__ = ["show", "write_report"]
