"""Which kernel: the target's, of the instances that the build has; the plan of a call."""
