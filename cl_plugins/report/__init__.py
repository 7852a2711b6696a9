"""Reports about runs: one HTML file that needs no network."""

from .page import render_report, write_report

__all__ = ["render_report", "write_report"]
