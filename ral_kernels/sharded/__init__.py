"""Policies of sequences that are spread over ranks.

| file | what |
|---|---|
| `policy.py` | `ShardedPolicy` and `ShardedSnapshot` |
| `layout.py` | which rank holds which positions, what its rows see, bytes |
| `exchange.py` | the collectives, with their gradients |
| `keys_stay.py` | the form in which keys stay and rows move |
"""

from .layout import BytesMoved, sharded_bytes
from .policy import ShardedPolicy, ShardedSnapshot

__all__ = ["BytesMoved", "ShardedPolicy", "ShardedSnapshot", "sharded_bytes"]
