"""The CUDA source, as package data: `sru.cu` is the entry point, `sru.cuh` the passes, `step.cuh` the mathematics."""
