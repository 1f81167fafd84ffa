"""The report of a run: one self-contained page, and its figures as PNG files."""

from loralloc.report.page import write_report

__all__ = ["write_report"]
