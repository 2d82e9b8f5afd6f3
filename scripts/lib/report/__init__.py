"""The parts of report.py: what is measured, by chapter, and how each chapter says it; the page of all."""
