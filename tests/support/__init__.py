"""Tests of several folders share problems, judges, the simulator and random problems."""
