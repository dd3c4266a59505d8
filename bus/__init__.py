"""How it travels: subjects and bytes. Knows no actor; NATS is spoken in this folder only.

subjects    THE TABLE: read it first
errors      what can go wrong, as a tree
codec       messages ↔ msgpack
connection  one process's link to the server
provision   makes streams and consumers; nothing else does
log         append with the commit rule, read, follow
work        wake-ups: publish, take, acknowledge
dead        messages that no handler could take
store       key-value buckets, objects by content hash
blobs       images and other large observations
policy      which weights are current
private     the part of a task that scorers only may read
lease       who is the one that acts
holders     who keeps a trajectory's session, and asking it
room        how full the stores are
archive     what they hold of one run: to copy, to delete
embedded    a nats-server of our own
"""
