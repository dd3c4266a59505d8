"""How it travels: subjects and bytes. Knows no actor; NATS is spoken in this folder only.

subjects    THE TABLE: read it first
permissions what each role may do, from it
errors      what can go wrong, as a tree
codec       messages ↔ msgpack
connection  one process's link to the server
waits       for answers, and what ends them: a refusal, a lost link
logins      who is let in as what, as files
provision   makes streams and consumers; nothing else does
log         append with the commit rule, read, follow
work        wake-ups: publish, take, acknowledge
dead        messages that no handler could take
store       key-value buckets, objects by content hash
blobs       images and other large observations
policy      which weights are current
private     the part of a task that scorers only may read
lease       who is the one that acts
bookmark    where a dispatcher begins to read the log
holders     who keeps a trajectory's session, and asking it
room        how full the stores are
archive     what they hold of one run: to copy, to delete
embedded    a nats-server of our own
server_config what a nats-server is told: accounts, permissions, TLS
certificates  made for TLS
"""
