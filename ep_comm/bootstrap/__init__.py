"""How ranks find each other before there is shared memory: a store, then one socket per pair.

Only fixed structs cross, each with magic, version, length and checksum; nothing is ever unpickled.
Every rank reads every other rank's struct, so all come to the same verdict about a disagreement.

group        whose construction it is: a caller's group, as ranks over a store
hello        what a rank says of itself, and the verdict when ranks disagree
exchange     rounds over the store, in which every rank reads what all have published
sockets      one connection to every rank of this host; its end tells of a death
descriptors  files that travel over a socket, and what it means that there are no more
"""

from ep_comm.bootstrap.descriptors import no_descriptors, receive_fds, send_fds
from ep_comm.bootstrap.exchange import Exchange, died_early
from ep_comm.bootstrap.group import Group, StoreGroup, resolve_group
from ep_comm.bootstrap.hello import Hello, check_agreement, group_token, host_identity
from ep_comm.bootstrap.sockets import Listener, Mesh, why_cut

__all__ = [
    "Group",
    "StoreGroup",
    "resolve_group",
    "Hello",
    "check_agreement",
    "group_token",
    "host_identity",
    "Exchange",
    "died_early",
    "Listener",
    "Mesh",
    "why_cut",
    "no_descriptors",
    "receive_fds",
    "send_fds",
]
