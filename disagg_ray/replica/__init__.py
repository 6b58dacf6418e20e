"""What runs inside an actor: one stage, its pool, and the calls a driver makes; and how large each pool is.

`actor` is a plain class that Ray wraps where it is launched; `stage` turns tensors into tensors without Ray or memory
management; `messages` are all that Ray carries between a driver and a replica.
"""
