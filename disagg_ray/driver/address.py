"""The address of a Ray cluster: its form, and whether a cluster answers there that this machine can join.

`ray.init` itself tries a wrong address for minutes in native code, which ignores signals, and gives no reason.
"""

from __future__ import annotations

import logging
import re
import time

import grpc
import psutil
from ray._private import services
from ray._private.authentication.authentication_token_setup import (
    ensure_token_if_auth_enabled,
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from disagg_ray import environment
from disagg_ray.errors import ConfigError, StartError
from disagg_ray.text import printable, shown

ANSWER_S = 5.0
"""How long a cluster may take to answer, and to list this machine's node."""
RETRY_S = 0.2
HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
AUTO = "auto"
LOCAL = "local"
"""Ray's words for a cluster that runs on this machine, and for a new one."""
FORM = "write HOST:PORT of the head's GCS, as 10.0.0.1:6379 (`ray start --head` prints it)"
STATUS = "run `ray status` on its head node, or correct --address, cluster.address or RAY_ADDRESS"
TOKEN = "export RAY_AUTH_MODE=token here and copy the head's ~/.ray/auth_token"


def find_cluster(given: str | None) -> str:
    """Return the `host:port` of a cluster that this machine can join: `given`, in RAY_ADDRESS, or of this machine.

    Raises:
        ConfigError: it is no address of a cluster.
        StartError: no cluster answers there within seconds, or this machine cannot join it.
    """
    key = "cluster.address" if given is not None else "RAY_ADDRESS"
    asked = given or environment.ray_address() or AUTO
    if asked == AUTO:
        key, address = "cluster.address", _find_here()
    else:
        check_form(key, asked)
        address = asked
    if _is_here(address):
        logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)  # it warns
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray does for a cluster that it finds
    if (refused := _why_refused(address)) is not None:
        reason, remedy = refused
        raise StartError(f"{key}: {shown(asked)} cannot be joined: {reason}; {remedy}")
    return address


def check_form(key: str, address: str) -> None:
    """Check the form of a cluster's address.

    Raises:
        ConfigError: it is invalid; says what it may be instead.
    """
    parts = HOST_PORT.fullmatch(address)
    if address.startswith(("http://", "https://")):
        reason = f"this is the dashboard's address, for `ray job submit`: {FORM}"
    elif address.startswith("ray://"):
        reason = f"Ray's client protocol is not supported: run on a node of the cluster, and {FORM}"
    elif address == LOCAL:
        reason = f"no cluster that runs has this address: {FORM}, or start one with `ray start --head`"
    elif parts is None or not 0 < int(parts[2]) < 2**16:
        reason = FORM
    else:
        return
    raise ConfigError(f"{key}: invalid address {shown(address)}: {reason}")


def _find_here() -> str:
    try:
        return str(services.canonicalize_bootstrap_address(AUTO))
    except (ConnectionError, ValueError) as error:
        reason = "no Ray cluster runs on this machine"
        remedy = "start one with `ray start --head`"
        raise StartError(f"cluster.address: {AUTO!r} cannot be joined: {reason}; {remedy}") from error


def _is_here(address: str) -> bool:
    """Return whether an address is this machine's, to which the user's token may be sent."""
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return address.rpartition(":")[0].strip("[]") in {"localhost", *own}


def _why_refused(address: str) -> tuple[str, str] | None:
    """Return why this machine cannot join the cluster at `host:port`, and the remedy; None if it can."""
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)
    except (AuthenticationError, RuntimeError):
        return "RAY_AUTH_MODE requires a token and this machine has none", "copy the head's ~/.ray/auth_token"
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            nodes = _ask_nodes(address)
        except grpc.RpcError as error:
            is_token = error.code() == grpc.StatusCode.UNAUTHENTICATED
            return _reason(address, error), TOKEN if is_token else STATUS
        if nodes & set(services.find_node_ids()):
            return None
        if time.monotonic() > deadline:
            reason = f"this machine is not one of its {len(nodes)} nodes"
            return reason, f"run on one of them, or `ray start --address={address}` here"
        time.sleep(RETRY_S)  # it may be starting


def _ask_nodes(address: str) -> set[str]:
    """Return the ids of a cluster's living nodes."""
    alive = gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE  # type: ignore[attr-defined]
    channel = init_grpc_channel(address, [("grpc.use_local_subchannel_pool", 1)])  # not an earlier answer
    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        request = gcs_service_pb2.GetAllNodeInfoRequest()  # type: ignore[attr-defined]
        answer = stub.GetAllNodeInfo(request, timeout=ANSWER_S)
    finally:
        channel.close()
    return {node.node_id.hex() for node in answer.node_info_list if node.state == alive}


def _reason(address: str, error: grpc.RpcError) -> str:
    code, details = error.code(), str(error.details())
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return f"the cluster at {address} requires another token, or any"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"nothing answers at {address} within {ANSWER_S:g} s"
    if code == grpc.StatusCode.UNIMPLEMENTED or "HTTP/2" in details:
        return f"what answers at {address} is not a Ray cluster's GCS (8265 is the dashboard's port, 6379 the GCS')"
    return f"nothing answers at {address}: {printable(details.rpartition(': ')[2])}"
