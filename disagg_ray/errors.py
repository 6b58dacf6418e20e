"""Every error this package raises on purpose.

DisaggError
├── InputError (ValueError)     invalid input; names field, value and remedy
│   ├── ConfigError             a configuration key
│   │   └── GraphError          the cut of the model into stages
│   ├── RequestError            a request
│   │   └── RequestInFlight     another request has its id and is not finished
│   ├── CheckpointError         a model folder or hub repository
│   ├── OutputError             where or how to write a result
│   └── PlanError               a profile, or the GPUs to plan for
├── StartError                  stages did not become ready
├── StageError                  a stage failed one request
├── EncodeError                 frames did not become a whole file
├── SaveError                   a finished video's place did not take it
├── TransferError               tensors did not arrive whole
├── ReplicaLost                 a replica died, hung or cannot be reached
├── Overloaded                  the queue is full, and the caller would not wait
├── PoolError                   a pool cannot hold what it was asked to
└── Cancelled                   the request or its attempt was cancelled
"""

from __future__ import annotations


class DisaggError(Exception):
    """Base of every error below."""


class InputError(DisaggError, ValueError):
    """Invalid input: names the field, the value and the remedy."""


class ConfigError(InputError):
    """A configuration key is unknown, or its value is invalid."""


class GraphError(ConfigError):
    """The stages do not form a graph: unknown block, missing producer, cycle."""


class RequestError(InputError):
    """A request asks for something this model or this configuration cannot do."""


class RequestInFlight(RequestError):
    """A service still computes another request of this id, for another client."""


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, unsafe or of another kind than the configuration says."""


class OutputError(InputError):
    """A result cannot be written there, or not in that format."""


class PlanError(InputError):
    """A profile cannot be read, or no layout fits the GPUs."""


class StartError(DisaggError):
    """The stages did not become ready in time, or cannot on this cluster."""


class StageError(DisaggError):
    """A stage failed one request; others continue."""


class EncodeError(DisaggError):
    """Frames did not become a whole video file: the encoder is missing, failed or hangs."""


class SaveError(DisaggError):
    """A finished video could not be saved where it was asked for; names the place where it was saved instead."""


class ReplicaLost(DisaggError):
    """A replica died, hung or cannot be reached; `with_node`: its whole node is gone."""

    def __init__(self, reason: str, *, with_node: bool = False) -> None:
        super().__init__(reason)
        self.with_node = with_node


class Overloaded(DisaggError):
    """The queue is full (`limits.max_queued`), and the caller would not wait."""


class PoolError(DisaggError):
    """A pool cannot hold what it was asked to, or was closed."""


class Cancelled(DisaggError):
    """The request or its attempt was cancelled."""


class TransferError(DisaggError):
    """Tensors did not arrive whole.

    `session` is the peer's Mooncake name (`host:port`), `nbytes` what was asked of it, `code` Mooncake's return code
    (0 when the bytes arrived and were wrong).
    """

    def __init__(self, reason: str, session: str, nbytes: int, code: int) -> None:
        super().__init__(reason, session, nbytes, code)
        self.reason, self.session, self.nbytes, self.code = reason, session, nbytes, code

    def __str__(self) -> str:
        return f"{self.reason} (session {self.session}, {self.nbytes} bytes, code {self.code})"
