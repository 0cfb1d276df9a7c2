"""Happens-before: who must know of whose accesses."""
