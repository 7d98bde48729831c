"""Models: specifications, data, flat parameter vectors, local training, merging, encodings, prediction.

Nothing here imports trio or a socket. Torch is imported only by `flat`, `training`, `central` and the worker
process, and inside the functions of a specification: naming, data loading, partition and encoding work
without it.
"""
