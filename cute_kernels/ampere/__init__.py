"""Kernels for sm_80, 86 and 89: cp.async, ldmatrix, mma.sync.  They run on sm_90 as well."""
