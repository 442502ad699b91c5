"""What runs on a board: TVM's RPC server, kept alive, without TVM's compiler.

TVM 0.27 starts a process for each session, and raises in the thread that listens when that process ends badly
(``tvm/rpc/server.py``, ``_serving``): after the first candidate that crashes, the board is registered no more. Here such a session is
logged, and the next one served. The server runs in the process that was started, where TVM's would start another interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform

from bnntvm.errors import BnnError
from bnntvm.targets.isa import host_flags
from bnntvm.targets.tile_permission import tile_permission

#: Ports that are tried, from the first one on.
PORTS = 1000


def serve(tracker, key, *, host="0.0.0.0", port=9090, address=None, threads=1, silent=False):
    """Register with a tracker and serve until killed.

    Parameters
    ----------
    tracker : (str, int)
    key : str
        The name of this kind of board.
    host, port
        Where to listen: the first free port from ``port`` on.
    address : str, optional
        What the tracker tells others to connect to, where it is not the address it sees.
    threads : int
        Threads of a kernel.
    silent : bool
        Log errors only.

    Raises
    ------
    BnnError
        If no tracker answers, or no port is free.
    """
    server = _server(threads)
    from bnntvm.remote.client import boards

    boards(tracker, key)  # whether there is a tracker: TVM's thread would try for a minute, and end alone
    tile_permission()  # the processes of sessions inherit it
    multiprocessing.set_start_method("fork", force=True)  # a session's process takes its socket along
    _tolerate_crashes(server)
    _register()
    try:
        state = server.PopenRPCServerState(host, port, port + PORTS, tracker_addr=tracker, key=key, custom_addr=address, silent=silent)
    except (OSError, ValueError) as error:
        raise BnnError("the board cannot listen", where=f"{host}:{port}", why=str(error), hint="give another --port") from error
    state.thread.join()


def _server(threads):
    """``tvm.rpc.server`` with nothing but the runtime library behind it; the environment is settled before TVM reads it."""
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ["TVM_NUM_THREADS"] = str(threads)
    from bnntvm.runtime import import_tvm_ffi

    import_tvm_ffi()
    from tvm.rpc import server

    return server


def _tolerate_crashes(server):
    serve_session = server._serving

    def serving(sock, addr, opts, load_library):
        folder = os.getcwd()
        try:
            serve_session(sock, addr, opts, load_library)
        except RuntimeError as error:
            server.logger.warning("%s", error)
            os.chdir(folder)
            sock.close()

    server._serving = serving


def about():
    """What this board is, as JSON: ``machine``, ``flags`` of its processor, ``threads``."""
    flags = sorted(host_flags() - ({"amx_tile"} if not tile_permission() else set()))
    return json.dumps({"machine": platform.machine(), "flags": flags, "threads": int(os.environ["TVM_NUM_THREADS"])})


def _register():
    """Functions that the other side of a session may call, beyond TVM's."""
    import tvm_ffi

    from bnntvm.profiling.measure import measure
    from bnntvm.tuning import surroundings  # noqa: F401  (its functions are called from afar)

    tvm_ffi.register_global_func("bnntvm.board.about", about)
    tvm_ffi.register_global_func("bnntvm.board.measure", measure)
