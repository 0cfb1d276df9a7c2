"""Attention kernels for sm_90a (H100, H200): TMA loads, warp-specialised warpgroups, WGMMA."""
