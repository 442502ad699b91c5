"""What runs on a board of a farm: TVM's RPC server, kept alive.

TVM 0.27 starts a process for each session, and raises in the thread that listens when that process ends badly
(``tvm/rpc/server.py``, ``_serving``): after the first candidate that crashes, the board is registered no more. Here such a session is
logged, and the next one served.
"""

from __future__ import annotations

import os

from bnntvm.targets.tile_permission import tile_permission


def tolerate_crashes():
    """Runs in the server's process, before it listens."""
    from tvm.rpc import server

    from bnntvm.tuning import surroundings  # noqa: F401  (its functions are called from afar)

    tile_permission()  # the processes of sessions inherit it

    serve = server._serving

    def serving(sock, addr, opts, load_library):
        folder = os.getcwd()
        try:
            serve(sock, addr, opts, load_library)
        except RuntimeError as error:
            server.logger.warning("%s", error)
            os.chdir(folder)
            sock.close()

    server._serving = serving


def serve(tracker, key, *, host="0.0.0.0", port=9090, address=None, threads=1, silent=False):
    """Serve until killed.

    Parameters
    ----------
    tracker : (str, int)
    key : str
    host, port
        Where to listen: the first free port from ``port`` on.
    address : str, optional
        What the tracker tells others to connect to, where it is not the address it sees.
    threads : int
        Threads of a kernel.

    Returns
    -------
    tvm.rpc.Server
    """
    os.environ["TVM_NUM_THREADS"] = str(threads)
    from tvm import rpc

    return rpc.Server(
        host, port, port + 1000, tracker_addr=tracker, key=key, custom_addr=address, silent=silent, server_init_callback=tolerate_crashes
    )
