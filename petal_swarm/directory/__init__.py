"""Who serves which blocks: signed, expiring announcements, and the places they are kept and asked for.

`records` is the format and its checks, `book` the merging of records from several sources. Three
directories share one interface (`directory`): `dht` for members of the Kademlia network, `remote` for
clients outside of it, `memory` for tests and the simulator. `announcer` keeps a server's own record
alive, `service` answers those who ask by a stream.
"""
