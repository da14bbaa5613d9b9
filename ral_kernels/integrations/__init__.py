"""Adapters to other libraries; none of them is imported before it is asked for."""
