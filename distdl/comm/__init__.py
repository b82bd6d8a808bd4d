"""The process group and the few collectives that everything above is built from."""

from distdl.comm.together import PeerFailed, share_problem, together
from distdl.comm.world import World

__all__ = ["PeerFailed", "World", "share_problem", "together"]
