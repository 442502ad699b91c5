"""Boards, by TVM's RPC and its tracker: one runs :mod:`.server`, the machine that compiles talks to it through :mod:`.client`."""
