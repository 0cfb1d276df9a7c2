"""PTX: its text as instructions, and straight runs of these as numpy functions."""
