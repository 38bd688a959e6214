"""A folder for sys.path, in which `sru` and `cuda_functional` are found: see cusru.torch.__main__."""
