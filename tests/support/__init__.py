"""What tests of several folders share: problems, judges, the simulator, random problems."""
