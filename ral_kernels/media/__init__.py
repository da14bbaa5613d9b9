"""Readers of pictures and videos, for `attention_map`, the command line and `ral.data`.

`ral_kernels.viz` makes them public.
"""
